"""Parameters, FLOPs and saved numbers of a tokenizer's training step, counted without memory."""

from pathlib import Path

import pytest
import torch

import kernels
from tests.golden import J
from vavae.config import AutoencoderConfig, FoundationConfig, LossConfig
from vavae.cost import training_cost
from vavae.task import build_networks

OPS = kernels.select("reference")
TINY = AutoencoderConfig(**J("04_vae_tiny")["tiny_config"])


def test_parameters_are_counted_without_memory():
    costs = training_cost(AutoencoderConfig(size="f16d32"), FoundationConfig(), LossConfig(perceptual="none"), 256)
    recorded = J("05_vae_losses")["patchgan_ndf64_n3"]["params"]
    assert costs["autoencoder"].parameters == 69_836_067 + 32 * 1024
    assert costs["discriminator"].parameters == costs["discriminator"].trainable == recorded
    assert costs["frozen"].parameters > 300e6 and costs["frozen"].trainable == 0


def test_flops_are_three_forwards_of_the_convolutions():
    """Counted by hand from the shapes each convolution really sees; attention adds its own products."""
    loss = LossConfig(use_vf=False, disc_weight=0.0, perceptual="none")
    cost = training_cost(TINY, None, loss, 16)["autoencoder"]
    net = build_networks(TINY, loss, OPS, 0, None)["autoencoder"].eval()
    products = []

    def count(module, inputs, output):
        if isinstance(module, torch.nn.Conv2d):
            products.append(output[0].numel() * module.weight[0].numel())

    for module in net.modules():
        module.register_forward_hook(count)
    net.decode(net.encode(torch.zeros(1, 3, 16, 16)).mean)
    # Five attentions over 64 positions of 64 channels: two products forward, four backward.
    want = 3 * 2 * sum(products) + 3 * 2 * 2 * 5 * 64 * 64 * 64
    first = 2 * 16 * 16 * 32 * 27  # the images need no gradient
    assert cost.flops == pytest.approx(want - first, rel=0.02)


def test_flops_of_a_step_are_those_of_the_documented_passes():
    """f16d32 at 256 pixels, without the foundation model; `vavae/README.md` has the numbers, in GFLOP."""
    text = (Path(__file__).parents[1] / "vavae/README.md").read_text()
    found = []
    for vf, gan in ((True, True), (True, False), (False, True)):
        loss = LossConfig(use_vf=vf, disc_weight=0.5 if gan else 0.0, perceptual="lpips", disc_start=0)
        costs = training_cost(AutoencoderConfig(size="f16d32"), FoundationConfig(), loss, 256)
        found.append(round(sum(cost.flops for name, cost in costs.items() if name != "frozen") / 1e9))
    (row,) = [line for line in text.splitlines() if line.startswith("| GFLOP an image")]
    assert [int(cell.replace(",", "")) for cell in row.split("|")[2:-1]][1::2] == found


def test_saved_elements_are_activations_not_weights():
    model = TINY.model_copy(update={"attn_resolutions": ()})
    loss = LossConfig(use_vf=False, disc_weight=0.0, perceptual="none")
    small, large = (training_cost(model, None, loss, size)["autoencoder"].saved_elements for size in (16, 32))
    assert small > 20 * 16 * 16 * 32  # each of some twenty layers at full size keeps at least its input
    assert 3.9 < large / small < 5  # they grow with the area (the attention in the middle faster), weights do not


def test_checkpointing_saves_what_is_computed_again():
    """Of f16d32 at 256 pixels: most for whole levels, of which the largest is there when it is computed again."""
    sizes = [
        training_cost(AutoencoderConfig(size="f16d32"), None, LossConfig(use_vf=False), 256, kind)["autoencoder"]
        for kind in (False, "pointwise", True)
    ]
    none, pointwise, whole = (cost.saved_elements for cost in sizes)
    assert 0.4 * none < whole < 0.6 * none and 1.3 * whole < pointwise < 0.9 * none
    assert len({cost.flops for cost in sizes}) == 1
