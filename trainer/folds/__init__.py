"""`cross-validate`: k folds, each an ordinary run, and an interval that allows for what folds share."""
