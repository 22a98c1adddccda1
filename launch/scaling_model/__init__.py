"""Step time, traffic, checkpoints and failures on many GPUs, computed from one GPU's rate: see `launch/scaling.md`."""
