import torch

from kernels.arguments import accumulation_dtype
from kernels.registry import Backend


def adaln_rms_norm(x, weight, shift, scale, eps, *, out_dtype=None):
    acc_dtype = accumulation_dtype(x)
    x_hat = rms_normalize(x.to(acc_dtype), eps)
    y = x_hat * weight.to(acc_dtype) * (1 + scale.to(acc_dtype)[:, None])
    if shift is not None:
        y = y + shift.to(acc_dtype)[:, None]
    return y.to(out_dtype or x.dtype)


def rms_normalize(x: torch.Tensor, eps: float) -> torch.Tensor:
    """`x` `[…, D]` divided by the root mean square of each row; already in the dtype to compute in."""
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)


BACKEND = Backend("reference", adaln_rms_norm)
