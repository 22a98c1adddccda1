"""adaLN-zero's modulation: the vectors by which a condition scales, shifts and gates every block (arXiv 2212.09748).

Each block has a linear layer of its own for them, but all layers see the same condition, known before the first block
runs. One such product is too small for a GPU (XL/1 with 128 images: 54 tiles of 128 × 128), so the op `stacked_linear`
makes those of all blocks by one, and the same backward.

Shapes: B samples, D hidden_size.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

Vectors = tuple[Tensor, ...]


class Modulation(nn.Sequential):
    """The condition c [B, D] → `parts` vectors [B, D] in the weights' dtype."""

    def __init__(self, hidden_size: int, parts: int):
        super().__init__(nn.SiLU(), nn.Linear(hidden_size, parts * hidden_size))
        self.parts = parts

    def forward(self, c: Tensor) -> Vectors:
        activation, linear = self
        return linear(activation(c).to(linear.weight.dtype)).chunk(self.parts, dim=1)


def modulations(layers: Sequence[Modulation], c: Tensor, ops) -> list[Vectors]:
    """The vectors of each of the equally wide layers for c [B, D], by `ops.stacked_linear`."""
    linears = [linear for _, linear in layers]
    activated = F.silu(c).to(linears[0].weight.dtype)
    stacked = ops.stacked_linear(activated, [linear.weight for linear in linears], [linear.bias for linear in linears])
    return [vectors.chunk(layer.parts, dim=1) for layer, vectors in zip(layers, stacked.unbind(), strict=True)]
