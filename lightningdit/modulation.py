"""adaLN-zero's modulation: the vectors by which a condition scales, shifts and gates every block (arXiv 2212.09748).

Each block has a linear layer of its own for them, but all layers see the same condition, known before the first block
runs. One such product is too small for a GPU (XL/1 with 128 images: 54 tiles of 128 × 128), so `stacked_linear` makes
those of all blocks by one, and the same backward: a matrix product of a batch whose weights are a view. ZeRO 1 and 2
keep parameters in one flat buffer, where equal layers of equal blocks lie at equal distances; nothing is copied.

Shapes: B samples, D hidden_size, L layers, K outputs of a layer.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.backends.operators import is_fake_call, operator

Vectors = tuple[Tensor, ...]


class Modulation(nn.Sequential):
    """The condition c [B, D] → `parts` vectors [B, D] in the weights' dtype."""

    def __init__(self, hidden_size: int, parts: int):
        super().__init__(nn.SiLU(), nn.Linear(hidden_size, parts * hidden_size))
        self.parts = parts

    def forward(self, c: Tensor) -> Vectors:
        activation, linear = self
        return linear(activation(c).to(linear.weight.dtype)).chunk(self.parts, dim=1)


def modulations(layers: Sequence[Modulation], c: Tensor) -> list[Vectors]:
    """What each of the equally wide layers gives for c [B, D], by one product."""
    linears = [linear for _, linear in layers]
    activated = F.silu(c).to(linears[0].weight.dtype)
    stacked = stacked_linear(activated, [linear.weight for linear in linears], [linear.bias for linear in linears])
    return [vectors.chunk(layer.parts, dim=1) for layer, vectors in zip(layers, stacked.unbind(), strict=True)]


def stacked_linear(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    """`x @ weightᵀ + bias` of L layers: x [B, D], weights [K, D], biases [K], of one dtype → [L, B, K]."""
    return _stacked_linear_fwd(x, weights, biases)


@operator("stacked_linear_fwd")
def _stacked_linear_fwd(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    y = x.new_empty(len(weights), x.shape[0], weights[0].shape[0])
    if is_fake_call():
        return y
    weight, bias = evenly_spaced(weights), evenly_spaced(biases)
    if weight is None or bias is None:
        for layer in zip(y, weights, biases, strict=True):
            torch.addmm(layer[2], x, layer[1].t(), out=layer[0])
    else:
        torch.baddbmm(bias[:, None], x.expand(len(weights), -1, -1), weight.mT, out=y)
    return y


@operator("stacked_linear_bwd")
def _stacked_linear_bwd(dy: Tensor, x: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """dx [B, D], dweight [L, K, D], dbias [L, K]."""
    parts = x.new_empty(len(weights), *x.shape)  # of dx, by layer
    dweight, dbias = x.new_empty(len(weights), *weights[0].shape), x.new_empty(len(weights), weights[0].shape[0])
    if is_fake_call():
        return torch.empty_like(x), dweight, dbias
    weight = evenly_spaced(weights)
    if weight is None:
        for part, dy_of_layer, weight_of_layer in zip(parts, dy, weights, strict=True):
            torch.mm(dy_of_layer, weight_of_layer, out=part)
    else:
        torch.bmm(dy, weight, out=parts)
    torch.bmm(dy.mT, x.expand(len(weights), -1, -1), out=dweight)
    torch.sum(dy, 1, out=dbias)
    return parts.sum(0), dweight, dbias


def _save(ctx, inputs, output) -> None:
    x, weights, _ = inputs
    ctx.save_for_backward(x, *weights)


def _backward(ctx, dy: Tensor):
    x, *weights = ctx.saved_tensors
    dx, dweight, dbias = _stacked_linear_bwd(dy, x, weights)
    return dx, list(dweight.unbind()), list(dbias.unbind())


_stacked_linear_fwd.register_autograd(_backward, setup_context=_save)


def evenly_spaced(tensors: Sequence[Tensor]) -> Tensor | None:
    """A view [L, …] of L tensors of one shape that lie in one storage, each as far behind the last; None elsewhere."""
    first = tensors[0]
    distances = {b.storage_offset() - a.storage_offset() for a, b in pairwise(tensors)} or {first.numel()}
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    layouts = {(tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors}
    if len(distances) > 1 or len(storages) > 1 or len(layouts) > 1 or min(distances) <= 0:
        return None
    return first.as_strided((len(tensors), *first.shape), (*distances, *first.stride()))
