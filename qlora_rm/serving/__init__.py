"""Serve a reward model over HTTP: queued requests are scored together, and each shared prompt is computed once."""
