"""Resources a run needs, computed before any weight is loaded: bytes, GPUs, the fastest setting that fits."""
