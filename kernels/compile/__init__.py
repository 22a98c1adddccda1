"""`torch.compile` of networks that call the ops: modes, graph passes, recomputation policy."""
