"""The `library` backend of `stacked_linear`: the layers' own numbers, and no weight copied for it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kernels.stacked_linear.library_impl import evenly_spaced, stacked_linear

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
