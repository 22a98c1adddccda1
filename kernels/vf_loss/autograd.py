"""Autograd registration shared by the Triton and CUDA backends of `vf_loss`."""

from collections.abc import Callable

import torch


def register_autograd(forward: torch.library.CustomOpDef, backward: torch.library.CustomOpDef) -> Callable:
    """Register `backward` as the gradient of `forward`; returns the op that calls them.

    Both terms are symmetric in `z` and `f`: one operator computes either gradient, where it is asked for.

    Args:
        forward: (z `[B, C, h, w]`, f, distmat_margin, cos_margin) → distmat, cos, and saved `[3, B, h·w]` float32: the
            norms of z, those of f, the products z·f.
        backward: (z, f, saved, d_distmat, d_cos, distmat_margin, cos_margin, swapped) → d_z; with `swapped`, z and f
            are exchanged with respect to `saved`.
    """

    def setup_context(ctx, inputs, output):
        z, f, *ctx.margins = inputs
        ctx.save_for_backward(z, f, output[2])

    def gradients(ctx, d_distmat, d_cos, _):
        z, f, saved = ctx.saved_tensors
        wants_z, wants_f = ctx.needs_input_grad[:2]
        d_z = backward(z, f, saved, d_distmat, d_cos, *ctx.margins, False) if wants_z else None
        d_f = backward(f, z, saved, d_distmat, d_cos, *ctx.margins, True) if wants_f else None
        return d_z, d_f, None, None

    forward.register_autograd(gradients, setup_context=setup_context)

    def vf_loss(z, f, distmat_margin, cos_margin):
        return forward(z, f, float(distmat_margin), float(cos_margin))[:2]

    return vf_loss
