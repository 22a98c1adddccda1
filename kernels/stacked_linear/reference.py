import torch

from kernels.registry import Backend


def stacked_linear(x, weights, biases):
    """x [B, D], weights L × [K, D], biases L × [K] → [L, B, K]."""
    layers = x.expand(len(weights), *x.shape)  # [L, B, D]
    return torch.baddbmm(torch.stack(biases)[:, None], layers, torch.stack(weights).mT)


BACKEND = Backend("reference", stacked_linear)
