"""The modulation of all blocks by one product: the layers' own numbers, and no weight copied for it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kernels
from lightningdit.config import ModelConfig
from lightningdit.model import LightningDiT
from lightningdit.modulation import evenly_spaced, stacked_linear

B, D, K = 3, 8, 12
APART = 5  # numbers between one layer's bias and the next layer's weight


def layers(count: int, flat: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Weights and biases, as equal blocks of one buffer or each in memory of its own."""
    buffer = torch.randn(count, K * D + K + APART, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = [row[: K * D].view(K, D) for row in buffer]
    biases = [row[K * D : K * D + K] for row in buffer]
    keep = (lambda t: t) if flat else torch.clone
    return [nn.Parameter(keep(w)) for w in weights], [nn.Parameter(keep(b)) for b in biases]


@pytest.mark.parametrize("compiler", [None, "aot_eager"])
@pytest.mark.parametrize("flat", [True, False], ids=["one buffer", "apart"])
@pytest.mark.parametrize("count", [1, 3])
def test_results_and_gradients_are_those_of_the_layers(count, flat, compiler):
    weights, biases = layers(count, flat)
    assert (evenly_spaced(weights) is not None) == (flat or count == 1)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(B, D, generator=generator, dtype=torch.float64).requires_grad_()
    dy = torch.randn(count, B, K, generator=generator, dtype=torch.float64)
    torch._dynamo.reset()
    function = torch.compile(stacked_linear, fullgraph=True, backend=compiler) if compiler else stacked_linear
    y, want = function(x, weights, biases), torch.stack(list(map(F.linear, [x] * count, weights, biases)))
    torch.testing.assert_close(y, want)
    inputs = [x, *weights, *biases]
    for got, wanted in zip(*(torch.autograd.grad(result, inputs, dy) for result in (y, want)), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("flat", [True, False], ids=["one buffer", "apart"])
def test_opcheck(flat):
    x = torch.randn(B, D, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(torch.ops.ldit.stacked_linear_fwd.default, (x, *layers(3, flat)))


def test_evenly_spaced_is_a_view_or_nothing():
    weights, _ = layers(4, flat=True)
    stack = evenly_spaced(weights)
    assert stack.data_ptr() == weights[0].data_ptr() and torch.equal(stack, torch.stack(weights))
    assert evenly_spaced([w.detach()[:, 2:5] for w in weights]).shape == (4, K, 3)  # in whatever layout they share
    elsewhere, _ = layers(4, flat=True)
    others = [weights[0], weights[1], weights[3]], weights[::-1], [weights[0]] * 2, [weights[0], elsewhere[1]]
    assert [evenly_spaced(tensors) for tensors in others] == [None] * 4
    assert evenly_spaced([weights[0], weights[1], weights[2].detach()[:6]]) is None
    assert evenly_spaced([weights[0].detach()[:8].t(), weights[1].detach()[:8]]) is None


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("changes", [{}, {"wo_shift": True}], ids=["shift", "no shift"])
def test_a_network_that_reads_parameters_in_their_modules_alone_computes_the_same(changes, recompute):
    """Biases added by their layers and modulation block by block, as under ZeRO 3."""
    config = ModelConfig(input_size=4, patch_size=2, in_channels=4, hidden_size=16, num_heads=2, depth=3, num_classes=3,
                         use_swiglu=True, use_rmsnorm=True, use_checkpoint=recompute, **changes)  # fmt: skip
    ops, generator = kernels.select("reference"), torch.Generator().manual_seed(2)
    gathered, alone = LightningDiT(config, ops).double(), LightningDiT(config, ops, params_gathered=False).double()
    with torch.no_grad():
        for parameter in gathered.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    alone.load_state_dict(gathered.state_dict())
    x, t = torch.randn(2, 4, 4, 4, generator=generator), torch.rand(2, generator=generator)
    outputs = [network(x.double(), t, torch.tensor([0, 2])) for network in (gathered, alone)]
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    expected = dict(alone.named_parameters())
    for name, parameter in gathered.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name].grad, msg=lambda m, name=name: f"{name}: {m}")
