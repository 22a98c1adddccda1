"""Shared by the backends of all ops: launches of Triton and CUDA kernels, `torch.library` operators, device queries."""
