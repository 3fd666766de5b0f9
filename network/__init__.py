"""What model.py is made of: the attention over tasks, weights as people have them, what fits a smaller GPU, and another
stage 1."""
