"""Activation checkpointing: what a block keeps for its backward pass and what it computes again (arXiv 1604.06174)."""

import functools

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

# What takes long to compute and reads little: matrix products, and attention as one operator of any backend.
_PRODUCTS = frozenset({torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default})


def _policy(context, function, *args, **kwargs) -> CheckpointPolicy:
    keep = function in _PRODUCTS or "rope_attention" in function._schema.name
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def recomputed(block, kind: bool | str, *inputs):
    """`block(*inputs)`, keeping its inputs (`kind` True), or also its matrix products and attention ("pointwise")."""
    options = {}
    if kind == "pointwise":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False, **options)
