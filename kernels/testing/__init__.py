"""How ops are tested and measured: cases, checks, the tolerance rule, the emulation of CUDA on a CPU."""
