"""Stacked linear layers by the library's batched matrix product, as one operator on any device.

The product's weights are a view: ZeRO 1 and 2 keep parameters in one flat buffer, where equal layers of equal blocks
lie at equal distances, and nothing is copied. Elsewhere each layer is a product of its own.

Shapes: B samples, D inputs, L layers, K outputs of a layer.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from kernels.backends.operators import is_fake_call, operator
from kernels.registry import Backend


@operator("stacked_linear_fwd")
def stacked_linear_fwd(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    """y [L, B, K]."""
    y = x.new_empty(len(weights), x.shape[0], weights[0].shape[0])
    if is_fake_call():
        return y
    weight, bias = evenly_spaced(weights), evenly_spaced(biases)  # [L, K, D], [L, K]
    if weight is None or bias is None:
        for layer in zip(y, weights, biases, strict=True):
            torch.addmm(layer[2], x, layer[1].t(), out=layer[0])
    else:
        torch.baddbmm(bias[:, None], x.expand(len(weights), -1, -1), weight.mT, out=y)
    return y


@operator("stacked_linear_bwd")
def stacked_linear_bwd(dy: Tensor, x: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
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


def setup_context(ctx, inputs, output) -> None:
    x, weights, _ = inputs
    ctx.save_for_backward(x, *weights)


def gradients(ctx, dy: Tensor):
    x, *weights = ctx.saved_tensors
    dx, dweight, dbias = stacked_linear_bwd(dy, x, weights)
    return dx, list(dweight.unbind()), list(dbias.unbind())


stacked_linear_fwd.register_autograd(gradients, setup_context=setup_context)


def evenly_spaced(tensors: Sequence[Tensor]) -> Tensor | None:
    """A view [L, …] of L tensors of one shape that lie in one storage, each as far behind the last; None elsewhere."""
    first = tensors[0]
    distances = {b.storage_offset() - a.storage_offset() for a, b in pairwise(tensors)} or {first.numel()}
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    layouts = {(tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors}
    if len(distances) > 1 or len(storages) > 1 or len(layouts) > 1 or min(distances) <= 0:
        return None
    return first.as_strided((len(tensors), *first.shape), (*distances, *first.stride()))


def stacked_linear(x, weights, biases):
    return stacked_linear_fwd(x, weights, biases)


BACKEND = Backend("library", stacked_linear, torch_ops=("ldit::stacked_linear_fwd", "ldit::stacked_linear_bwd"))
