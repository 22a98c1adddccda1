"""Activation checkpointing: what a block keeps for its backward pass and what it computes again (arXiv 1604.06174)."""

import functools
from collections.abc import Sequence

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

# They take long to compute for what their results need in memory.
_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)


def recomputed(block, saved: Sequence[torch._ops.OpOverload], kind: bool | str, *inputs):
    """`block(*inputs)`, keeping its inputs (`kind` True), or also the results of its products and of `saved` operators
    ("pointwise")."""
    options = {}
    if kind == "pointwise":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, [*_PRODUCTS, *saved])
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False, **options)
