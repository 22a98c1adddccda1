"""Equally wide linear layers of one input with their tangent, by one product: also `x_tangent · weightᵀ` of each.

    stacked_linear_jvp(x, x_tangent, weights, biases) → (y, y_tangent)

Args:
    x, weights, biases: as `kernels.stacked_linear` takes them. Weights and biases have no tangents.
    x_tangent: as `x`.

Returns:
    `y` and `y_tangent`, `[L, B, K]` each, in the dtype of `x`; parts of one buffer.

Gradients flow to `x`, `weights` and `biases` through `y` alone: the tangent is a constant to autograd.

Raises:
    ValueError: as `kernels.stacked_linear`, and for a tangent that is not like its argument.
"""

import torch

from kernels.arguments import check_tangent
from kernels.registry import Op
from kernels.stacked_linear import check_arguments


def check(x: torch.Tensor, x_tangent: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor]) -> None:
    check_arguments(NAME, x, weights, biases)
    check_tangent(NAME, "x", x, x_tangent)


NAME = "stacked_linear_jvp"
OP = Op(
    NAME,
    check,
    differentiable=("x", "weights", "biases"),
    order=("library", "reference"),
    forward_mode_of="stacked_linear",
)
