"""The activation of SwiGLU with its tangent, in one pass: `silu'(gate) · gate_t · up + silu(gate) · up_t`.

    swiglu_jvp(gate_up, gate_up_tangent, *, bias=None) → (activated, activated_tangent)

Args:
    gate_up, bias: as `kernels.swiglu` takes them. The bias has no tangent.
    gate_up_tangent: as `gate_up`.

Returns:
    `activated`, and its tangent in the same shape and dtype: the Jacobian of `kernels.swiglu` with respect to
    `gate_up`, times `gate_up_tangent`. The arithmetic is float32 (float64 for float64 input), each result rounded once.

Gradients flow to `gate_up` and `bias` through `activated` alone: the tangent is a constant to autograd.

Raises:
    ValueError: as `kernels.swiglu`, and for a tangent that is not like its argument.

`silu'(x) = sigmoid(x)·(1 + x·(1 − sigmoid(x)))`.
"""

import torch

from kernels.arguments import check_tangent
from kernels.registry import Op
from kernels.swiglu import check_arguments


def check(gate_up: torch.Tensor, gate_up_tangent: torch.Tensor, *, bias: torch.Tensor | None = None) -> None:
    check_arguments(NAME, gate_up, bias)
    check_tangent(NAME, "gate_up", gate_up, gate_up_tangent)


NAME = "swiglu_jvp"
OP = Op(NAME, check, differentiable=("gate_up", "bias"), forward_mode_of="swiglu")
