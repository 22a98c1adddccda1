"""RMS norm and adaptive modulation with its tangent, in one pass.

    adaln_rms_norm_jvp(x, x_tangent, weight, shift, shift_tangent, scale, scale_tangent, eps, *, out_dtype=None)
        → (y, y_tangent)

    r   = 1 / sqrt(mean(x², over D) + eps),  x̂ = x·r
    y   = x̂ · weight · (1 + scale) + shift
    y_t = r · (x_t − x̂ · mean(x̂ · x_t, over D)) · weight · (1 + scale) + x̂ · weight · scale_t + shift_t

Args:
    x, weight, shift, scale, eps, out_dtype: as `kernels.adaln_rms_norm` takes them. The weight has no tangent.
    x_tangent, shift_tangent, scale_tangent: each as its argument; `shift_tangent` is None where `shift` is.

Returns:
    `y` and `y_tangent`, `[B, N, D]` each, in `out_dtype`. The arithmetic is float32 (float64 for float64 `x`), each
    result rounded once.

Gradients flow to `x`, `weight`, `shift` and `scale` through `y` alone: the tangent is a constant to autograd.

Raises:
    ValueError: as `kernels.adaln_rms_norm`, and for a tangent that is not like its argument.

The tangent is the derivative of the formula (arXiv 1910.07467, arXiv 2212.09748) along that of its arguments.
"""

import torch

from kernels.adaln_rms_norm import check_arguments
from kernels.arguments import check_tangent
from kernels.registry import Op


def check(
    x: torch.Tensor,
    x_tangent: torch.Tensor,
    weight: torch.Tensor,
    shift: torch.Tensor | None,
    shift_tangent: torch.Tensor | None,
    scale: torch.Tensor,
    scale_tangent: torch.Tensor,
    eps: float,
    *,
    out_dtype: torch.dtype | None = None,
) -> None:
    check_arguments(NAME, x, weight, shift, scale, eps, out_dtype)
    check_tangent(NAME, "x", x, x_tangent)
    check_tangent(NAME, "shift", shift, shift_tangent)
    check_tangent(NAME, "scale", scale, scale_tangent)


NAME = "adaln_rms_norm_jvp"
OP = Op(NAME, check, differentiable=("x", "weight", "shift", "scale"), forward_mode_of="adaln_rms_norm")
