"""Testing and measuring ops: cases, checks, tolerance rule, expectations, emulation of CUDA on a CPU."""
