"""What train.py stands on: losses, what is computed once, labels of a teacher, logs."""
