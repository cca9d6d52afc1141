"""A pretended CUDA device: see README.md."""
