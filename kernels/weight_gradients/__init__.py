"""The weight gradients of several linear layers at once: each layer's `d_outputᵀ · input`, summed over all tokens.

    weight_gradients(d_outputs, inputs) → (d_weight, …)

A layer's product alone has few tiles for many multiprocessors and leaves some of them idle in its last wave (arXiv
2301.03598); those of a transformer block, taken together, keep them busy.

Args:
    d_outputs: for each layer the gradient of its result, `[…, O]`; float64, float32, float16 or bfloat16.
    inputs: for each layer what it was given, `[…, I]`. All tensors have one dtype, are on one device and hold the same
        number of tokens (the product of all dimensions but the last); O and I differ from layer to layer.

Returns:
    A tuple with `[O, I]` for each layer, laid out as `torch.nn.Linear` has its weight, in the dtype of the inputs. Sums
    are held in float32 (float64 for float64) and rounded once, or as the library has it for the reference.

Raises:
    ValueError: no layer, not as many inputs as gradients, an empty tensor, another dtype, another number of tokens.
"""

import torch

from kernels.arguments import check_device, check_dtype, refuse
from kernels.registry import Op


def check(d_outputs: list[torch.Tensor], inputs: list[torch.Tensor]) -> None:
    if not d_outputs or len(d_outputs) != len(inputs):
        counts = f"{len(d_outputs)} and {len(inputs)} tensors"
        refuse(NAME, "d_outputs and inputs", counts, "as many of one as of the other, at least one")
    first = d_outputs[0]
    check_dtype(NAME, "d_outputs[0]", first)
    for argument, tensors in (("d_outputs", d_outputs), ("inputs", inputs)):
        for number, tensor in enumerate(tensors):
            name = f"{argument}[{number}]"
            if tensor.ndim < 2 or tensor.numel() == 0:
                refuse(NAME, f"shape of {name}", tuple(tensor.shape), "[..., width], no dimension 0")
            check_dtype(NAME, name, tensor, {first.dtype})
            check_device(NAME, first, **{name: tensor})
            if tokens(tensor) != tokens(first):
                refuse(NAME, f"shape of {name}", tuple(tensor.shape), f"{tokens(first)} tokens, as d_outputs[0] has")


def tokens(tensor: torch.Tensor) -> int:
    """How many vectors `[…, width]` holds."""
    return tensor.numel() // tensor.shape[-1]


NAME = "weight_gradients"
# The library's own products until a whole step shows that one launch is faster: alone it is, 1.04 × on an H200.
OP = Op(NAME, check, order=("reference",), graph_pass=True)
