"""Artifacts: the manifest and its golden scores, hashes, loading, and safetensors files."""
