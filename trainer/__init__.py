"""Exact strong scaling: any number of ranks, the same model bit for bit."""

__version__ = "0.1.0"
