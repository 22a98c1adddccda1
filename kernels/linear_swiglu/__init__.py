"""A linear layer and the SwiGLU behind it: `gate_up = x · weightᵀ`, and its activation, in one pass.

    linear_swiglu(x, weight, *, bias=None) → (gate_up, activated)

The product leaves the registers once, activated, instead of being read again for it. Nothing asks for gradients here:
in the graph of a training step this takes the place of the layer and of `swiglu`, whose gradients are there already.

Args:
    x: `[…, D]`, float64, float32, float16 or bfloat16.
    weight: `[2H, D]` in the dtype of `x`; the rows of the gate come first.
    bias: `[2H]`, any of these dtypes, or None.

Returns:
    gate_up: `[…, 2H]` in the dtype of `x`: the product, without the bias.
    activated: `[…, H]` in the dtype of `x`, of the product as rounded, as `swiglu(gate_up, bias=bias)` has it.

Raises:
    ValueError: another dtype, an empty tensor, a weight or bias of another shape or device.

The formula is that of arXiv 2002.05202 with `silu(x) = x · sigmoid(x)`.
"""

import torch

from kernels.arguments import check_device, check_dtype, check_shape, refuse
from kernels.registry import Op


def check(x: torch.Tensor, weight: torch.Tensor, *, bias: torch.Tensor | None = None) -> None:
    if x.ndim < 2 or x.numel() == 0:
        refuse(NAME, "shape of x", tuple(x.shape), "[..., D], no dimension 0")
    check_dtype(NAME, "x", x)
    if weight.ndim != 2 or weight.numel() == 0 or weight.shape[0] % 2 or weight.shape[1] != x.shape[-1]:
        refuse(NAME, "shape of weight", tuple(weight.shape), f"(2H, {x.shape[-1]}) (2H, D), no dimension 0")
    check_dtype(NAME, "weight", weight, {x.dtype})
    if bias is not None:
        check_shape(NAME, "bias", bias, weight.shape[:1], "2H")
        check_dtype(NAME, "bias", bias)
    check_device(NAME, x, weight=weight, bias=bias)


NAME = "linear_swiglu"
# On an H200 the library's product and `swiglu` behind it take 0.84 of the time (rows of XL in bench/results).
OP = Op(NAME, check, order=("reference",), graph_pass=True)
