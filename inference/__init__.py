"""From photos to maps and from maps to files: what model.infer, sample.py and evaluate.py share."""
