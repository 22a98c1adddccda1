import torch

from kernels.arguments import accumulation_dtype
from kernels.registry import Backend
from kernels.rope_attention.reference import apply_rope


def rope_attention_jvp(qkv, qkv_tangent, cos, sin, q_weight=None, k_weight=None, eps=1e-6, *, bias=None):
    acc_dtype = accumulation_dtype(qkv)
    packed = qkv.to(acc_dtype) if bias is None else qkv.to(acc_dtype) + bias.to(acc_dtype).view(qkv.shape[2:])
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)  # [B, heads, N, d] each
    q_t, k_t, v_t = qkv_tangent.to(acc_dtype).permute(2, 0, 3, 1, 4).unbind(0)  # [B, heads, N, d] each
    if q_weight is not None:
        q, q_t = rms_norm_jvp(q, q_t, q_weight.to(acc_dtype), eps)
        k, k_t = rms_norm_jvp(k, k_t, k_weight.to(acc_dtype), eps)
    if cos is not None:
        q, k, q_t, k_t = (apply_rope(t, cos.to(acc_dtype), sin.to(acc_dtype)) for t in (q, k, q_t, k_t))
    scale = q.shape[-1] ** -0.5
    p = ((q * scale) @ k.transpose(-1, -2)).softmax(dim=-1)  # [B, heads, N, N]
    out = p @ v  # [B, heads, N, d]
    with torch.no_grad():
        scores_t = (q_t * scale) @ k.transpose(-1, -2) + (q * scale) @ k_t.transpose(-1, -2)  # [B, heads, N, N]
        p_t = p * (scores_t - (p * scores_t).sum(dim=-1, keepdim=True))
        out_t = p_t @ v + p @ v_t  # [B, heads, N, d]
    return tuple(t.transpose(1, 2).flatten(2).to(qkv.dtype) for t in (out, out_t))


def rms_norm_jvp(x, x_t, weight, eps):
    """rms_norm(x) · weight over rows `[…, d]`, and its tangent."""
    r = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    x_hat = x * r
    with torch.no_grad():
        x_hat_t = r * (x_t - x_hat * (x_hat * x_t).mean(dim=-1, keepdim=True))
        y_t = x_hat_t * weight
    return x_hat * weight, y_t


BACKEND = Backend("reference", rope_attention_jvp)
