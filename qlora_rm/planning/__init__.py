"""What a run needs of a machine, told before any weight is loaded: bytes, cards, the fastest setting that fits."""
