"""Training: trainer, building and restoring it, DeepSpeed engines, optimizer, loader, checkpoints, log, dry run."""
