import torch

from kernels.adaln_rms_norm.reference import rms_normalize
from kernels.arguments import accumulation_dtype
from kernels.registry import Backend


def rope_attention(qkv, cos, sin, q_weight=None, k_weight=None, eps=1e-6, *, bias=None):
    acc_dtype = accumulation_dtype(qkv)
    packed = qkv.to(acc_dtype) if bias is None else qkv.to(acc_dtype) + bias.to(acc_dtype).view(qkv.shape[2:])
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)  # [B, heads, N, d] each
    if q_weight is not None:
        q = rms_normalize(q, eps) * q_weight.to(acc_dtype)
        k = rms_normalize(k, eps) * k_weight.to(acc_dtype)
    if cos is not None:
        q, k = (apply_rope(t, cos.to(acc_dtype), sin.to(acc_dtype)) for t in (q, k))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # [B, heads, N, N]
    out = scores.softmax(dim=-1) @ v  # [B, heads, N, d]
    return out.transpose(1, 2).flatten(2).to(qkv.dtype)


def apply_rope(u: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate each pair of neighbours of `u` `[…, N, d]` by the angle of its position: tables `[N, d]`, `u`'s dtype."""
    even, odd = u.unflatten(-1, (-1, 2)).unbind(-1)
    return u * cos + torch.stack((-odd, even), dim=-1).flatten(-2) * sin


BACKEND = Backend("reference", rope_attention)
