"""Training: the loop, DeepSpeed engines, the optimizer, the loader, checkpoints and logs."""
