"""Attention of torch and flash-attention, with what comes before it: bias, norms and rotation are in the time."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.baselines.interface import Adapter, Provider
from kernels.rope_attention.reference import apply_rope


def sdpa(backend: SDPBackend) -> Adapter:
    """`scaled_dot_product_attention` on one of its backends; norm and rotation by torch, op by op, as the published
    model has them: the tables are float32, and queries and keys are rounded after the rotation."""

    def run(qkv, cos, sin, q_weight=None, k_weight=None, eps=1e-6, *, bias=None):
        q, k, v = _biased(qkv, bias).permute(2, 0, 3, 1, 4).unbind(0)  # each [B, heads, N, d]
        q, k = _normed(q, q_weight, eps), _normed(k, k_weight, eps)
        if cos is not None:
            q, k = (apply_rope(t, cos, sin).to(qkv.dtype) for t in (q, k))
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).flatten(2)

    return Adapter(run)


def _biased(qkv: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return qkv if bias is None else qkv + bias.to(qkv.dtype).view(qkv.shape[2:])


def _normed(t: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    return t if weight is None else F.rms_norm(t, t.shape[-1:], weight.to(t.dtype), eps)


def flash_attn(attention: Callable[..., torch.Tensor]) -> Adapter:
    """flash-attention on q, k, v `[B, N, heads, d]`, rotated by its own Triton kernel, out of place."""
    from flash_attn.layers.rotary import apply_rotary_emb

    def arrange(qkv, cos, sin, **rest):
        # One number for each pair of neighbours, in the dtype of the queries, as its rotary module caches them.
        half = (None, None) if cos is None else (t[:, ::2].to(qkv.dtype).contiguous() for t in (cos, sin))
        return {"qkv": qkv, **dict(zip(("cos", "sin"), half, strict=True)), **rest}

    def run(qkv, cos, sin, q_weight=None, k_weight=None, eps=1e-6, *, bias=None):
        q, k, v = _biased(qkv, bias).unbind(2)
        q, k = _normed(q, q_weight, eps), _normed(k, k_weight, eps)
        if cos is not None:
            q, k = (apply_rotary_emb(t, cos, sin, interleaved=True) for t in (q, k))
        out = attention(q, k, v, causal=False)
        return (out[0] if isinstance(out, tuple) else out).flatten(2)  # some versions add the log-sum-exp

    return Adapter(run, arrange)


def flash_attn_2() -> Adapter:
    from flash_attn import flash_attn_func

    return flash_attn(flash_attn_func)


def flash_attn_3() -> Adapter:
    from flash_attn_interface import flash_attn_func

    return flash_attn(flash_attn_func)


def _half_precision_only(qkv, **rest) -> list[str]:
    return [] if qkv.dtype in (torch.float16, torch.bfloat16) else [f"takes float16 and bfloat16, not {qkv.dtype}"]


_EAGER = "bias, norm and rotation by torch, op by op"
ATTENTION = (
    *(
        Provider(f"sdpa-{name}", lambda backend=backend: sdpa(backend), unsupported, _EAGER, also_compiled=compiled)
        for name, backend, unsupported, compiled in (
            ("flash", SDPBackend.FLASH_ATTENTION, _half_precision_only, True),
            ("cudnn", SDPBackend.CUDNN_ATTENTION, _half_precision_only, True),
            ("efficient", SDPBackend.EFFICIENT_ATTENTION, lambda **inputs: [], False),
            ("math", SDPBackend.MATH, lambda **inputs: [], False),
        )
    ),
    *(
        Provider(name, load, _half_precision_only, f"bias and norm by torch, rotation by {whose} kernel", package)
        for name, load, whose, package in (
            ("flash-attn-2", flash_attn_2, "its own", "flash-attn"),
            ("flash-attn-3", flash_attn_3, "flash-attn's", "flash-attn-3"),
        )
    ),
)
