"""Activation checkpointing of a block, whole or selective (arXiv 1604.06174)."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

# Expensive to compute, relative to the memory of their results.
_PRODUCTS = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.convolution.default,
)


def recomputes(kind: bool | int | str, block: int) -> bool:
    """Whether the block of that number (from 0) is checkpointed: all of them, or with a number k every k-th.

    The first is one of those. The last is not, then, unless k divides the number of the others: the backward pass
    begins with what the last block has kept and need not hold a recomputed block beside all that is kept.
    """
    k = int(kind) if isinstance(kind, int) else 1
    return k > 0 and block % k == 0


def recomputed(
    block: nn.Module, saved: Sequence[torch._ops.OpOverload], kind: bool | int | str, *inputs: Any, random: bool = False
) -> Any:
    """`block(*inputs)`, saving its inputs alone (`kind` True or a number) or also the results of matrix products, of
    convolutions and of the operators `saved` ("pointwise"). `random`: the block draws random numbers, which are drawn
    again alike.
    """
    options: dict[str, Any] = {}
    if kind == "pointwise":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, [*_PRODUCTS, *saved])
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=random, **options)
