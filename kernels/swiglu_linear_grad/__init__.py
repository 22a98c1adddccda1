"""The gradient through a linear layer and the SwiGLU before it, with respect to the input of SwiGLU, in one pass.

    swiglu_linear_grad(d_output, weight, gate_up, *, bias=None) → (d_gate_up, d_bias)

Of `swiglu(gate_up, bias=bias) · weightᵀ` this is the gradient for `gate_up`: `d_output · weight`, which never leaves
the registers, times the derivative of SwiGLU. Nothing asks for gradients here: in a backward graph this takes
the place of that product and of the gradient of `swiglu`.

Args:
    d_output: `[…, D]`, the gradient of the layer's result; float64, float32, float16 or bfloat16.
    weight: `[D, H]`, in the dtype of `d_output`.
    gate_up: `[…, 2H]` in the same dtype, what SwiGLU was given; the gate comes first.
    bias: `[2H]`, any of these dtypes, that SwiGLU added to it; or None.

Returns:
    d_gate_up: `[…, 2H]` in the dtype of `gate_up`.
    d_bias: `[2H]` in the dtype of `bias`, the sum of the former over all rows, before it is rounded; None without one.

Raises:
    ValueError: another dtype, an empty tensor, shapes or devices that do not belong together.

The formula is the derivative of that of arXiv 2002.05202, `silu(a) · b` with `silu(a) = a · sigmoid(a)`.
"""

import torch

from kernels.arguments import check_device, check_dtype, check_shape, refuse
from kernels.registry import Op


def check(
    d_output: torch.Tensor, weight: torch.Tensor, gate_up: torch.Tensor, *, bias: torch.Tensor | None = None
) -> None:
    if d_output.ndim < 2 or d_output.numel() == 0:
        refuse(NAME, "shape of d_output", tuple(d_output.shape), "[..., D], no dimension 0")
    check_dtype(NAME, "d_output", d_output)
    width = d_output.shape[-1]
    if weight.ndim != 2 or weight.numel() == 0 or weight.shape[0] != width:
        refuse(NAME, "shape of weight", tuple(weight.shape), f"({width}, H) (D, H), no dimension 0")
    check_dtype(NAME, "weight", weight, {d_output.dtype})
    check_shape(NAME, "gate_up", gate_up, (*d_output.shape[:-1], 2 * weight.shape[1]), "..., 2H")
    check_dtype(NAME, "gate_up", gate_up, {d_output.dtype})
    if bias is not None:
        check_shape(NAME, "bias", bias, gate_up.shape[-1:], "2H")
        check_dtype(NAME, "bias", bias)
    check_device(NAME, d_output, weight=weight, gate_up=gate_up, bias=bias)


NAME = "swiglu_linear_grad"
# On an H200 the library's product and the gradient of `swiglu` take 0.63 of the time (rows of XL in bench/results).
OP = Op(NAME, check, order=("reference",), graph_pass=True)
