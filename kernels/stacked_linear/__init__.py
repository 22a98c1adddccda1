"""Equally wide linear layers of one input, by one product: `x · weightᵀ + bias` of each layer.

    stacked_linear(x, weights, biases) → y

One such product alone may be too small for a GPU (the modulation of one block of XL/1 with 128 images: 54 tiles of
128 × 128), those of all layers together are not (batched matrix products: arXiv 2301.03598 for the waves of tiles).

Args:
    x: `[B, D]`, float64, float32, float16 or bfloat16.
    weights: for each of L layers `[K, D]`.
    biases: for each layer `[K]`. All tensors have one dtype and are on one device.

Returns:
    `[L, B, K]` in that dtype. Sums are held and rounded as the library has it.

Raises:
    ValueError: no layer, not as many biases as weights, an empty tensor, another shape, dtype or device.
"""

import torch

from kernels.arguments import check_device, check_dtype, check_rank, check_shape, refuse
from kernels.registry import Op


def check(x: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor]) -> None:
    check_arguments(NAME, x, weights, biases)


def check_arguments(op: str, x: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor]) -> None:
    """`check`, for any op that takes these."""
    check_rank(op, "x", x, "B, D")
    check_dtype(op, "x", x)
    if not weights or len(weights) != len(biases):
        counts = f"{len(weights)} and {len(biases)} tensors"
        refuse(op, "weights and biases", counts, "as many of one as of the other, at least one")
    check_rank(op, "weights[0]", weights[0], "K, D")
    K = weights[0].shape[0]
    for argument, tensors, shape, names in (
        ("weights", weights, (K, x.shape[1]), "K, D"),
        ("biases", biases, (K,), "K"),
    ):
        for number, tensor in enumerate(tensors):
            name = f"{argument}[{number}]"
            check_shape(op, name, tensor, shape, names)
            check_dtype(op, name, tensor, {x.dtype})
            check_device(op, x, **{name: tensor})


NAME = "stacked_linear"
OP = Op(NAME, check, differentiable=("x", "weights", "biases"), order=("library", "reference"))
