"""Python: train, evaluate and predict as functions. Only the names in `trainer/__init__.py` are public."""
