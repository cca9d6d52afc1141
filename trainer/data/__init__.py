"""Data of a user's own: read, cleaned, cached, and turned into tensors."""
