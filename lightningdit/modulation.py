"""Modulation of adaLN-zero: the vectors that shift, scale and gate the blocks, from the condition (arXiv 2212.09748).

Each block has a linear layer for them, and all layers are given the same condition, known before the first block runs.
One such product is too small for a GPU (XL/1 with 128 images: 54 tiles of 128 × 128), so the op `stacked_linear`
computes those of all blocks at once, forward and backward.

Shapes: B samples, D hidden_size.
"""

from collections.abc import Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from kernels.registry import Ops

Vectors = tuple[Tensor, ...]


class Modulation(nn.Sequential):
    """The condition c [B, D] → `parts` vectors [B, D] in the weights' dtype."""

    def __init__(self, hidden_size: int, parts: int):
        super().__init__(nn.SiLU(), nn.Linear(hidden_size, parts * hidden_size))
        self.parts = parts

    @property
    def linear(self) -> nn.Linear:
        return cast(nn.Linear, self[1])

    def forward(self, c: Tensor) -> Vectors:
        activation, linear = self
        y = linear(activation(c).to(self.linear.weight.dtype))  # [B, parts·D]
        return y.chunk(self.parts, dim=1)  # [B, D] each


def modulations(layers: Sequence[Modulation], c: Tensor, ops: Ops) -> list[Vectors]:
    """The vectors of each of the layers, all of one shape, for c [B, D], by `ops.stacked_linear`."""
    linears = [layer.linear for layer in layers]
    activated = F.silu(c).to(linears[0].weight.dtype)  # [B, D]
    # [layers, B, parts·D]
    stacked = ops.stacked_linear(activated, [linear.weight for linear in linears], [linear.bias for linear in linears])
    return [vectors.chunk(layer.parts, dim=1) for layer, vectors in zip(layers, stacked.unbind(), strict=True)]
