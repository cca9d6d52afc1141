"""One run from the config to the saved model."""
