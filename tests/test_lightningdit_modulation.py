"""The modulation of all blocks by one product."""

import pytest
import torch

import kernels
from lightningdit.config import ModelConfig
from lightningdit.model import LightningDiT


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("changes", [{}, {"wo_shift": True}], ids=["shift", "no shift"])
def test_a_network_that_reads_parameters_in_their_modules_alone_computes_the_same(changes, recompute):
    """Biases added by their layers and modulation block by block, as under ZeRO 3."""
    config = ModelConfig(
        input_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=16,
        num_heads=2,
        depth=3,
        num_classes=3,
        use_swiglu=True,
        use_rmsnorm=True,
        use_checkpoint=recompute,
        **changes,
    )
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
