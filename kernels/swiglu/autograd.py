"""Autograd registration shared by the Triton and CUDA backends of `swiglu`."""

from collections.abc import Callable

import torch


def register_autograd(forward: torch.library.CustomOpDef, backward: torch.library.CustomOpDef) -> Callable:
    """Register `backward` as the gradient of `forward`; returns the op that calls them. Only the inputs are saved.

    Args:
        forward: (gate_up `[…, 2H]`, bias `[2H]` or None) → out `[…, H]`.
        backward: (d_out, gate_up, bias, summed) → d_gate_up; d_bias, empty unless `summed`.
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
