"""What the backends with kernels share: a call of `rope_attention` around their two operators, and its gradient."""

from collections.abc import Callable

import torch

from kernels.layout import contiguous, dense_rows

WIDEST = 128


def differentiate(forward: torch.library.CustomOpDef, backward: torch.library.CustomOpDef) -> Callable:
    """Give one operator its gradient by the other; returns the op as these two compute it.

    Args:
        forward: (qkv, table, q_weight, k_weight, eps) → the result; log2 Σ exp of the scores, `[B, heads, N]` float32.
            `table` `[N, d/2, 2]` float32: cos and sin of each pair. Rows of `qkv` are dense, its weights contiguous.
        backward: (gradient of the result, qkv, result, log-sum-exp, table, q_weight, k_weight, eps) → the gradients of
            `qkv` (packed, contiguous) and, if there are any, of `q_weight` and `k_weight`.
    """

    def save(ctx, inputs, output):
        *tensors, ctx.eps = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.set_materialize_grads(False)  # the log-sum-exp gets no gradient: not one of zeros either

    def gradients(ctx, d_out, _):
        if d_out is None:
            return (None,) * 5
        qkv, *turn, out, lse = ctx.saved_tensors
        d_qkv, *d_weights = backward(dense_rows(d_out), qkv, out, lse, *turn, ctx.eps)
        return d_qkv, None, *(d_weights or (None, None)), None

    forward.register_autograd(gradients, setup_context=save)

    def rope_attention(qkv, cos, sin, q_weight=None, k_weight=None, eps=1e-6):
        table = None if cos is None else pairs(cos, sin)
        return forward(dense_rows(qkv), table, contiguous(q_weight), contiguous(k_weight), eps)[0]

    return rope_attention


def pairs(cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Tables `[N, d]` → `[N, d/2, 2]` float32: each angle once, its cos and sin side by side, read in one go.

    Plain torch operations, so that a compiled model makes it once for all its layers.
    """
    return torch.stack((cos[:, ::2], sin[:, ::2]), dim=-1).float()


def too_wide(qkv: torch.Tensor) -> list[str]:
    """Why kernels cannot take these heads; empty if they can."""
    width = qkv.shape[-1]
    return [f"heads are {width} wide, above {WIDEST}"] if width > WIDEST else []
