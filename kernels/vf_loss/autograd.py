"""Autograd registration shared by the Triton and CUDA backends of `vf_loss`."""

from collections.abc import Callable

import torch


def register_autograd(forward: torch.library.CustomOpDef, backward: torch.library.CustomOpDef) -> Callable:
    """Give one operator its gradients by the other; returns the op as these two compute it.

    Both terms are symmetric in `z` and `f`: one operator gives either gradient, where it is asked for.

    Args:
        forward: (z, f, distmat_margin, cos_margin) → distmat, cos and `kept`, `[3, B, N]` float32: the norms of `z`,
            those of `f`, the products z·f.
        backward: (z, f, kept, gradient of distmat, of cos, distmat_margin, cos_margin, swapped) → the gradient of `z`;
            with `swapped`, `z` and `f` are the other way round than in `kept`.
    """

    def setup_context(ctx, inputs, output):
        z, f, *ctx.margins = inputs
        ctx.save_for_backward(z, f, output[2])

    def gradients(ctx, d_distmat, d_cos, _):
        z, f, kept = ctx.saved_tensors
        of_z, of_f = ctx.needs_input_grad[:2]
        d_z = backward(z, f, kept, d_distmat, d_cos, *ctx.margins, False) if of_z else None
        d_f = backward(f, z, kept, d_distmat, d_cos, *ctx.margins, True) if of_f else None
        return d_z, d_f, None, None

    forward.register_autograd(gradients, setup_context=setup_context)

    def vf_loss(z, f, distmat_margin, cos_margin):
        return forward(z, f, float(distmat_margin), float(cos_margin))[:2]

    return vf_loss
