"""Artefacts: the manifest and its golden scores, loading, merging, verifying."""
