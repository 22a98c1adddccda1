"""Autograd registration shared by the Triton and CUDA backends of `rope_attention`."""

from collections.abc import Callable

import torch

from kernels.backends.layout import contiguous, dense_rows

WIDEST = 128


def register_autograd(forward: torch.library.CustomOpDef, backward: torch.library.CustomOpDef) -> Callable:
    """Give one operator its gradient by the other; returns the op as these two compute it.

    Args:
        forward: (qkv, bias, table, q_weight, k_weight, eps) → the result; log2 Σ exp of the scores, `[B, heads, N]`
            float32. `table` `[N, d/2, 2]` float32: cos and sin of each pair. Rows of `qkv` are dense, and all vectors.
        backward: (gradient of the result, qkv, bias, table, q_weight, k_weight, result, log-sum-exp, eps, summed) → the
            gradients of `qkv` (packed, contiguous), of `q_weight` and of `k_weight`, empty where there are none, and of
            `bias`, empty unless `summed`.
    """

    def save(ctx, inputs, output):
        *tensors, ctx.eps = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.set_materialize_grads(False)  # the log-sum-exp gets no gradient: not one of zeros either

    def gradients(ctx, d_out, _):
        if d_out is None:
            return (None,) * 6
        saved = ctx.saved_tensors  # asked for once: activation checkpointing allows no more
        normed, summed = saved[3] is not None, ctx.needs_input_grad[1]
        d_qkv, d_q_weight, d_k_weight, d_bias = backward(dense_rows(d_out), *saved, ctx.eps, summed)
        d_weights = (d_q_weight, d_k_weight) if normed else (None, None)
        return d_qkv, d_bias if summed else None, None, *d_weights, None

    forward.register_autograd(gradients, setup_context=save)

    def rope_attention(qkv, cos, sin, q_weight=None, k_weight=None, eps=1e-6, *, bias=None):
        table = None if cos is None else pairs(cos, sin)
        q_weight, k_weight, bias = map(contiguous, (q_weight, k_weight, bias))
        return forward(dense_rows(qkv), bias, table, q_weight, k_weight, eps)[0]

    return rope_attention


def pairs(cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Tables `[N, d]` → `[N, d/2, 2]` float32: each angle once, its cos and sin side by side, read in one go.

    Plain torch operations, so that a compiled model makes it once for all its layers.
    """
    return torch.stack((cos[:, ::2], sin[:, ::2]), dim=-1).float()


def width_reasons(qkv: torch.Tensor, widest: int = WIDEST) -> list[str]:
    """Why kernels cannot take these heads; empty if they can."""
    width = qkv.shape[-1]
    return [f"heads are {width} wide, above {widest} in {qkv.dtype}"] if width > widest else []
