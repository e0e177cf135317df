"""Training: objectives, the trainer, the engine it runs in, checkpoints and curves."""
