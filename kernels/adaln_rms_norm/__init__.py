"""RMS norm and adaptive modulation: `y = x / sqrt(mean(x², over D) + eps) · weight · (1 + scale) + shift`.

    adaln_rms_norm(x, weight, shift, scale, eps, *, out_dtype=None) → y

Args:
    x: `[B, N, D]`, float64, float32, float16 or bfloat16.
    weight: `[D]`, the gain of the norm. It, `shift` and `scale` may have any of these dtypes.
    shift: `[B, D]`, added to every token of its sample; or None for no shift.
    scale: `[B, D]`.
    eps: positive, inside the root.
    out_dtype: dtype of the result; None for that of `x`.

Returns:
    `[B, N, D]`. The arithmetic is float32 (float64 for float64 `x`), rounded once, at the end.

Gradients flow to `x`, `weight`, `shift` and `scale`, each in its own dtype.

Raises:
    ValueError: a shape, dtype or device that does not fit, an empty `x`, or `eps` ≤ 0.

RMSNorm is arXiv 1910.07467; the modulation is that of DiT (arXiv 2212.09748).
"""

import torch

from kernels.arguments import check_device, check_dtype, check_eps, check_rank, check_shape, dtype_names, refuse
from kernels.registry import FLOATS, Op


def check(
    x: torch.Tensor,
    weight: torch.Tensor,
    shift: torch.Tensor | None,
    scale: torch.Tensor,
    eps: float,
    *,
    out_dtype: torch.dtype | None = None,
) -> None:
    check_arguments(NAME, x, weight, shift, scale, eps, out_dtype)


def check_arguments(
    op: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    shift: torch.Tensor | None,
    scale: torch.Tensor,
    eps: float,
    out_dtype: torch.dtype | None,
) -> None:
    """`check`, for any op that takes these."""
    check_rank(op, "x", x, "B, N, D")
    samples, _, width = x.shape
    check_shape(op, "weight", weight, (width,), "D")
    check_shape(op, "scale", scale, (samples, width), "B, D")
    if shift is not None:
        check_shape(op, "shift", shift, (samples, width), "B, D")
        check_dtype(op, "shift", shift)
    check_dtype(op, "x", x)
    check_dtype(op, "weight", weight)
    check_dtype(op, "scale", scale)
    if out_dtype is not None and out_dtype not in FLOATS:
        refuse(op, "out_dtype", out_dtype, dtype_names(FLOATS))
    check_device(op, x, weight=weight, shift=shift, scale=scale)
    check_eps(op, eps)


NAME = "adaln_rms_norm"
OP = Op(NAME, check, differentiable=("x", "weight", "shift", "scale"))
