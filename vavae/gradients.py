"""Gradients that are known before the backward pass, and the weights of loss terms that are balanced by them."""

from collections.abc import Sequence

import torch
from torch.autograd.function import once_differentiable


class _WithGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, gradients, *tensors):
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, factor):
        # In place and let go of, so that a parameter takes its gradient over without a copy of it.
        gradients, ctx.gradients = ctx.gradients, ()
        return None, None, *(gradient.mul_(factor) for gradient in gradients)


def with_gradients(
    value: torch.Tensor, tensors: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]
) -> torch.Tensor:
    """The scalar `value`, of which one backward pass takes `gradients` for those with respect to `tensors`.

    Args:
        value: its own graph, if it has one, is not walked.
        tensors: of any shapes.
        gradients: of the same shapes and dtypes; they are overwritten in the backward pass.
    """
    return _WithGradients.apply(value.detach(), list(gradients), *tensors)


def adaptive_weight(reference: torch.Tensor, term: torch.Tensor, limit: float) -> torch.Tensor:
    """`‖reference‖ / (‖term‖ + 1e-4)`, at most `limit`, of the gradients of two losses at one layer.

    A scalar, float32 or wider, without a graph (VQGAN, arXiv 2012.09841, equation 7).
    """
    return (upcast(reference).norm() / (upcast(term).norm() + 1e-4)).clamp(max=limit).detach()


def upcast(x: torch.Tensor) -> torch.Tensor:
    """x in float32, or in its own dtype where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
