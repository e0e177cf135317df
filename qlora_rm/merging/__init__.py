"""Merging in the memory of one tensor: the base's files are read, changed and written weight by weight."""
