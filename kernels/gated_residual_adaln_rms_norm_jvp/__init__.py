"""A gated residual and the modulated RMS norm after it with their tangents, in one pass.

    gated_residual_adaln_rms_norm_jvp(
        x, x_tangent, branch, branch_tangent, gate, gate_tangent, weight,
        shift, shift_tangent, scale, scale_tangent, eps, *, branch_bias=None
    ) → (x', x'_tangent, y, y_tangent)

    x'   = x + gate · branch                          y   = adaln_rms_norm(x', …)
    x'_t = x_t + gate_t · branch + gate · branch_t    y_t = its tangent, as in kernels.adaln_rms_norm_jvp

Args:
    x, branch, gate, weight, shift, scale, eps, branch_bias: as `kernels.gated_residual_adaln_rms_norm` takes them.
        Weight and bias have no tangents; where there is a bias, `branch + branch_bias` stands for `branch`.
    x_tangent, branch_tangent, gate_tangent, shift_tangent, scale_tangent: each as its argument; `shift_tangent` is
        None where `shift` is.

Returns:
    `x'` and its tangent `[B, N, D]` in the dtype of `x`, `y` and its tangent `[B, N, D]` in the dtype of `branch`. The
    norm sees `x'` and its tangent as returned. The arithmetic is float32 (float64 for float64 inputs), each result
    rounded once.

Gradients flow to the seven tensors without tangents through `x'` and `y` alone: tangents are constants to autograd.

Raises:
    ValueError: as `kernels.gated_residual_adaln_rms_norm`, and for a tangent that is not like its argument.
"""

import torch

from kernels.arguments import check_tangent
from kernels.gated_residual_adaln_rms_norm import check_arguments
from kernels.registry import Op


def check(
    x: torch.Tensor,
    x_tangent: torch.Tensor,
    branch: torch.Tensor,
    branch_tangent: torch.Tensor,
    gate: torch.Tensor,
    gate_tangent: torch.Tensor,
    weight: torch.Tensor,
    shift: torch.Tensor | None,
    shift_tangent: torch.Tensor | None,
    scale: torch.Tensor,
    scale_tangent: torch.Tensor,
    eps: float,
    *,
    branch_bias: torch.Tensor | None = None,
) -> None:
    check_arguments(NAME, x, branch, gate, weight, shift, scale, eps, branch_bias)
    check_tangent(NAME, "x", x, x_tangent)
    check_tangent(NAME, "branch", branch, branch_tangent)
    check_tangent(NAME, "gate", gate, gate_tangent)
    check_tangent(NAME, "shift", shift, shift_tangent)
    check_tangent(NAME, "scale", scale, scale_tangent)


NAME = "gated_residual_adaln_rms_norm_jvp"
OP = Op(
    NAME,
    check,
    differentiable=("x", "branch", "gate", "weight", "shift", "scale", "branch_bias"),
    forward_mode_of="gated_residual_adaln_rms_norm",
)
