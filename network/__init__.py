"""What model.py is made of: the attention over tasks, loading and checking weights, what fits a smaller GPU, and
another stage 1."""
