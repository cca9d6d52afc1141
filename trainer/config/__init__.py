"""The JSON file: its keys, their types and ranges, and what contradicts what. Loads no torch."""
