"""Autograd registration shared by the Triton and CUDA backends of `gated_residual_adaln_rms_norm`."""

from collections.abc import Callable

import torch

from kernels.adaln_rms_norm.autograd import where_wanted


def register_autograd(forward: torch.library.CustomOpDef, backward: torch.library.CustomOpDef) -> Callable:
    """Give one operator its gradient by the other; returns the op as these two compute it.

    Args:
        forward: (x, branch, gate, weight, shift, scale, branch_bias, eps) → x', y, and what `backward` takes besides:
            `kept`, if anything.
        backward: (x', branch, gate, weight, shift, scale, branch_bias, *kept, gradient of x', gradient of y, eps,
            vector_grads) → the gradients of forward's seven tensors, in their order; the last five empty unless
            `vector_grads`. One of the two gradients it is given may be None.
    """

    def save(ctx, inputs, output):
        _, *tensors, ctx.eps = inputs
        x_new, _, *kept = output
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x_new, *tensors, *kept)

    def gradients(ctx, d_x_new, d_y, *_):
        if d_x_new is None and d_y is None:
            return (None,) * 8
        wanted = ctx.needs_input_grad[:7]
        found = backward(*ctx.saved_tensors, d_x_new, d_y, ctx.eps, any(wanted[2:]))
        return *where_wanted(found, wanted), None

    forward.register_autograd(gradients, setup_context=save)

    def gated_residual_adaln_rms_norm(x, branch, gate, weight, shift, scale, eps, *, branch_bias=None):
        return forward(x, branch, gate, weight, shift, scale, branch_bias, eps)[:2]

    return gated_residual_adaln_rms_norm
