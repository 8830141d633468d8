"""Turn a trained adapter into files that other programs load: the adapter itself, or merged checkpoints."""
