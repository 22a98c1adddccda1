"""What the backends of all ops share: launches of Triton and CUDA kernels, operators of `torch.library`, the device."""
