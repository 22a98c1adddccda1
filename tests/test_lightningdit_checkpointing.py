"""Activation checkpointing of the network: the same bits, and what is computed again."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from lightningdit.config import ModelConfig
from tests.dit_models import VARIANTS, inputs, random_model


@pytest.fixture(scope="module")
def ops():
    return kernels.select("reference")


@pytest.mark.parametrize("variant", ["a", "b", "c", "d", "e", "g"])
def test_activation_checkpointing_changes_nothing(variant, ops):
    config = ModelConfig(**VARIANTS[variant])
    results = []
    for use_checkpoint in (False, True, "pointwise", 2):
        model = random_model(config.model_copy(update={"use_checkpoint": use_checkpoint}), ops).train()
        out = model(*inputs(config))
        out.square().sum().backward()
        results.append([out, *(p.grad for p in model.parameters() if p.requires_grad)])
    plain, *others = results
    assert all(torch.equal(a, b) for other in others for a, b in zip(plain, other, strict=True))


@pytest.mark.parametrize(("kind", "blocks"), [(False, []), (2, [0, 2, 4]), (3, [0, 3]), (9, [0]), (True, [*range(5)])])
def test_every_kth_block_is_computed_again(kind, blocks, ops):
    """And no other: a block that is runs once more in the backward pass. Gradients are the same bits."""
    config = ModelConfig(**VARIANTS["a"] | {"depth": 5})
    runs, gradients = Counter(), []
    for use_checkpoint in (False, kind):
        runs.clear()
        model = random_model(config.model_copy(update={"use_checkpoint": use_checkpoint}), ops).train()
        for number, block in enumerate(model.blocks):
            block.register_forward_pre_hook(lambda *_, number=number: runs.update([number]))
        model(*inputs(config)).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert [number for number, count in sorted(runs.items()) if count == 2] == blocks and len(runs) == 5
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


class Products(TorchDispatchMode):
    """Counts matrix products, and softmaxes for work that is none."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        self.count["products" if name in ("mm", "addmm", "bmm") else name] += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("compiled", [False, True])
def test_what_the_backward_pass_computes_again(compiled, ops):
    """No product is made twice under "pointwise", though norms and activations are."""
    config = ModelConfig(**VARIANTS["a"])
    counts = {}
    for use_checkpoint in (False, "pointwise", True):
        model = random_model(config.model_copy(update={"use_checkpoint": use_checkpoint}), ops).train()
        call = torch.compile(model, fullgraph=True, backend="aot_eager_decomp_partition") if compiled else model
        call(*inputs(config)).square().sum().backward()
        with Products() as seen:
            call(*inputs(config)).square().sum().backward()
        counts[use_checkpoint] = seen.count
    assert counts["pointwise"]["products"] == counts[False]["products"] < counts[True]["products"]
    assert counts["pointwise"]["rsqrt"] > config.depth * 2 + 1 or compiled
