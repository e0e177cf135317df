"""A reward model behind HTTP: requests that wait together are scored together, each shared prompt once."""
