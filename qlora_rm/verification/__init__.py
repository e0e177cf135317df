"""Checks of a model folder, of a running server, and of what a consumer sees."""
