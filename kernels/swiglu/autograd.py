"""Autograd registration shared by the Triton and CUDA backends of `swiglu`."""

from collections.abc import Callable

import torch


def register_autograd(forward: torch.library.CustomOpDef, backward: torch.library.CustomOpDef) -> Callable:
    """Give one operator its gradient by the other; returns the op as these two compute it. It saves its inputs only.

    Args:
        forward: (gate_up, bias) → the result.
        backward: (its gradient, gate_up, bias, summed) → the gradients of `gate_up` and, empty unless `summed`, `bias`.
    """

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    def gradients(ctx, d_out):
        gate_up, bias = ctx.saved_tensors
        summed = bias is not None and ctx.needs_input_grad[1]
        d_gate_up, d_bias = backward(d_out, gate_up, bias, summed)
        return d_gate_up, d_bias if summed else None

    forward.register_autograd(gradients, setup_context=setup_context)

    def swiglu(gate_up, *, bias=None):
        return forward(gate_up, bias)

    return swiglu
