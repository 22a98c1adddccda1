"""Modulation of adaLN-zero: the vectors that shift, scale and gate the blocks, from the condition (arXiv 2212.09748).

Each block has a linear layer for them, and all layers are given the same condition, known before the first block runs.
One such product is too small for a GPU (XL/1 with 128 images: 54 tiles of 128 × 128), so the op `stacked_linear`
computes those of all blocks at once, forward and backward.

Shapes: B samples, D hidden_size.
"""

from collections.abc import Sequence
from typing import cast

import torch.nn.functional as F
from torch import nn

from kernels.forward_mode import Dual
from kernels.registry import Ops
from lightningdit.duals import Linear, Value, chunk, differentiated, linear_map

Vectors = tuple[Value, ...]


class Modulation(nn.Sequential):
    """The condition c [B, D] → `parts` vectors [B, D] in the weights' dtype."""

    def __init__(self, hidden_size: int, parts: int):
        super().__init__(nn.SiLU(), Linear(hidden_size, parts * hidden_size))
        self.parts = parts

    @property
    def linear(self) -> nn.Linear:
        return cast(nn.Linear, self[1])

    def forward(self, c: Value) -> Vectors:
        activated = linear_map(lambda x: x.to(self.linear.weight.dtype), differentiated(F.silu, c))  # [B, D]
        return chunk(self.linear(activated), self.parts, dim=1)  # [B, D] each


def modulations(layers: Sequence[Modulation], c: Value, ops: Ops) -> list[Vectors]:
    """The vectors of each of the layers, all of one shape, for c [B, D], by `ops.stacked_linear`."""
    linears = [layer.linear for layer in layers]
    activated = linear_map(lambda x: x.to(linears[0].weight.dtype), differentiated(F.silu, c))  # [B, D]
    # [layers, B, parts·D]
    stacked = ops.stacked_linear(activated, [linear.weight for linear in linears], [linear.bias for linear in linears])
    by_layer = map(Dual, *(t.unbind() for t in stacked)) if isinstance(stacked, Dual) else stacked.unbind()
    return [chunk(vectors, layer.parts, dim=1) for layer, vectors in zip(layers, by_layer, strict=True)]
