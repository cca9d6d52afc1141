"""Several micro-batches in one forward and backward, with the bits of single ones. Start with packs.py."""
