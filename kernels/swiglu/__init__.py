"""The activation of SwiGLU on a packed projection: `silu(gate) · up`, `gate` and `up` the halves of the last dimension.

    swiglu(gate_up, *, bias=None) → activated

Args:
    gate_up: `[…, 2H]`, any H, float64, float32, float16 or bfloat16; the gate comes first.
    bias: `[2H]`, any of these dtypes, added to `gate_up` first: that of the projection before, which then has none. Its
        gradient, the sum of that of `gate_up` over all rows, comes from the same pass and reads nothing again.

Returns:
    `[…, H]` in the dtype of `gate_up`. The arithmetic is float32 (float64 for float64 input), rounded once.

Raises:
    ValueError: another dtype, an empty tensor, a last dimension that is odd, or a bias of another shape or device.

The formula is that of arXiv 2002.05202 with `silu(x) = x · sigmoid(x)`.
"""

import torch

from kernels.arguments import check_device, check_dtype, check_shape, refuse
from kernels.registry import Op


def check(gate_up: torch.Tensor, *, bias: torch.Tensor | None = None) -> None:
    check_arguments(NAME, gate_up, bias)


def check_arguments(op: str, gate_up: torch.Tensor, bias: torch.Tensor | None) -> None:
    """`check`, for any op that takes these."""
    if gate_up.ndim == 0 or gate_up.numel() == 0 or gate_up.shape[-1] % 2:
        refuse(op, "shape of gate_up", tuple(gate_up.shape), "[..., 2H], no dimension 0")
    check_dtype(op, "gate_up", gate_up)
    if bias is not None:
        check_shape(op, "bias", bias, gate_up.shape[-1:], "2H")
        check_dtype(op, "bias", bias)
        check_device(op, gate_up, bias=bias)


NAME = "swiglu"
OP = Op(NAME, check, differentiable=("gate_up", "bias"))
