"""A gated residual and the modulated RMS norm after it: `x' = x + gate · branch`, `y = adaln_rms_norm(x', …)`.

    gated_residual_adaln_rms_norm(x, branch, gate, weight, shift, scale, eps, *, branch_bias=None) → (x', y)

Args:
    x: `[B, N, D]`, the residual stream: float32, or the dtype of `branch`.
    branch: `[B, N, D]`, what a sub-layer returned; float64, float32, float16 or bfloat16.
    gate: `[B, D]`, one factor for each channel of a sample. It and the next three may have any of these dtypes.
    weight: `[D]`, the gain of the norm.
    shift: `[B, D]`, or None for no shift.
    scale: `[B, D]`.
    eps: positive, inside the root.
    branch_bias: `[D]` in any of these dtypes, or None. `branch + branch_bias`, not rounded in between, then stands for
        `branch`: given the bias of the projection that made the branch, its gradient needs no pass of its own.

Returns:
    `x'` `[B, N, D]` in the dtype of `x`, and `y` `[B, N, D]` in the dtype of `branch`. The norm sees `x'` as
    returned: the op equals the gated sum, then `kernels.adaln_rms_norm`. The arithmetic is float32 (float64 for float64
    inputs), each result rounded once.

Gradients flow to all seven tensors, each in its own dtype.

Raises:
    ValueError: a shape, dtype or device that does not fit, an empty `x`, or `eps` ≤ 0.

The formulas are those of DiT's adaLN-zero block (arXiv 2212.09748) with RMSNorm (arXiv 1910.07467).
"""

import torch

from kernels.arguments import check_device, check_dtype, check_eps, check_rank, check_shape
from kernels.registry import Op


def check(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    shift: torch.Tensor | None,
    scale: torch.Tensor,
    eps: float,
    *,
    branch_bias: torch.Tensor | None = None,
) -> None:
    check_arguments(NAME, x, branch, gate, weight, shift, scale, eps, branch_bias)


def check_arguments(
    op: str,
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    shift: torch.Tensor | None,
    scale: torch.Tensor,
    eps: float,
    branch_bias: torch.Tensor | None,
) -> None:
    """`check`, for any op that takes these."""
    check_rank(op, "x", x, "B, N, D")
    samples, _, width = x.shape
    check_shape(op, "branch", branch, x.shape, "B, N, D")
    check_dtype(op, "branch", branch)
    check_dtype(op, "x", x, {torch.float32, branch.dtype})
    check_shape(op, "weight", weight, (width,), "D")
    check_dtype(op, "weight", weight)
    for argument, tensor in (("gate", gate), ("scale", scale), ("shift", shift)):
        if tensor is not None:
            check_shape(op, argument, tensor, (samples, width), "B, D")
            check_dtype(op, argument, tensor)
    if branch_bias is not None:
        check_shape(op, "branch_bias", branch_bias, (width,), "D")
        check_dtype(op, "branch_bias", branch_bias)
    tensors = {"branch": branch, "gate": gate, "weight": weight, "shift": shift, "scale": scale}
    check_device(op, x, **tensors, branch_bias=branch_bias)
    check_eps(op, eps)


NAME = "gated_residual_adaln_rms_norm"
OP = Op(NAME, check, differentiable=("x", "branch", "gate", "weight", "shift", "scale", "branch_bias"))
