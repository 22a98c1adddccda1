"""The activation of SwiGLU on a packed projection: `silu(a) · b`, `a` and `b` the halves of the last dimension.

    swiglu(gate_up) → activated

Args:
    gate_up: `[…, 2H]`, any H, float64, float32, float16 or bfloat16; `a`, the gate, comes first.

Returns:
    `[…, H]` in the dtype of `gate_up`. The arithmetic is float32 (float64 for float64 input), rounded once.

Raises:
    ValueError: another dtype, an empty tensor, or a last dimension that is odd.

The formula is that of arXiv 2002.05202 with `silu(a) = a · sigmoid(a)`.
"""

import torch

from kernels.arguments import check_dtype, refuse
from kernels.registry import Op


def check(gate_up: torch.Tensor) -> None:
    if gate_up.ndim == 0 or gate_up.numel() == 0 or gate_up.shape[-1] % 2:
        refuse(NAME, "shape of gate_up", tuple(gate_up.shape), "[..., 2H], no dimension 0")
    check_dtype(NAME, "gate_up", gate_up)


NAME = "swiglu"
OP = Op(NAME, check, differentiable=("gate_up",))
