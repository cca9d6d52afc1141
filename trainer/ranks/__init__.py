"""Processes that work together: who they are, how they meet, what they say, and what if one is lost."""
