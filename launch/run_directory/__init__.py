"""What a run leaves in its directory, read without writing anything: rows of the log, checkpoints, the lock."""
