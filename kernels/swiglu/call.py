"""What a call of `swiglu` is on either compiler's kernels: the op on two operators, with autograd."""

from collections.abc import Callable


def differentiate(forward, backward) -> Callable:
    """The op, which saves nothing but its inputs.

    Args:
        forward: the operator `(gate_up, bias) → out`.
        backward: the operator `(d_out, gate_up, bias, summed) → d_gate_up, d_bias`; the latter empty unless `summed`.
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
