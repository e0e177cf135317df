"""Checks of a model folder, of a running server, and of a consumer's view of a model."""
