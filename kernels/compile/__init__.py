"""`torch.compile` around the ops: its modes, the passes over a graph, activation checkpointing."""
