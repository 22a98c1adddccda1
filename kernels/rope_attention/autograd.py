"""Autograd registration shared by the Triton and CUDA backends of `rope_attention`."""

from collections.abc import Callable

import torch

from kernels.backends.layout import contiguous, dense_rows

MAX_WIDTH = 128


def register_autograd(forward: torch.library.CustomOpDef, backward: torch.library.CustomOpDef) -> Callable:
    """Register `backward` as the gradient of `forward`; returns the op that calls them.

    Rows of the tensors they are given are dense.

    Args:
        forward: (qkv `[B, N, 3, H, D]`, bias `[3·H·D]`, table `[N, D/2, 2]` float32, q_weight `[D]`, k_weight `[D]`,
            eps) → out `[B, N, H·D]`, lse `[B, H, N]` float32. All but qkv and eps may be None. `table` holds cos and
            sin of each pair, lse is log2 Σ exp of the scores.
        backward: (d_out, qkv, bias, table, q_weight, k_weight, out, lse, eps, summed) → d_qkv, contiguous; d_q_weight
            and d_k_weight, empty without weights; d_bias, empty unless `summed`.
    """

    def save(ctx, inputs, output):
        *tensors, ctx.eps = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.set_materialize_grads(False)  # lse has no gradient: do not make one of zeros

    def gradients(ctx, d_out, _):
        if d_out is None:
            return (None,) * 6
        saved = ctx.saved_tensors  # read once: activation checkpointing allows no more
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
    """Tables `[N, D]` → `[N, D/2, 2]` float32: each angle once, its cos and sin side by side.

    Plain torch operations, so that a compiled model makes the result once for all its layers.
    """
    return torch.stack((cos[:, ::2], sin[:, ::2]), dim=-1).float()


def width_reasons(qkv: torch.Tensor, max_width: int = MAX_WIDTH) -> list[str]:
    """Why kernels cannot take these heads; empty if they can."""
    width = qkv.shape[-1]
    return [f"heads are {width} wide, above {max_width} in {qkv.dtype}"] if width > max_width else []
