"""Merge an adapter into its base weight by weight, in the memory of one tensor."""
