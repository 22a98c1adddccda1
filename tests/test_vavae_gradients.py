"""The gradients of a tokenizer's training step against the plain formulation, and how often each network is walked."""

import copy
from collections import Counter
from functools import partial
from itertools import product

import lpips
import pytest
import torch
from torch import nn

import kernels
from bench.workloads.plain_tokenizer import PlainAutoencoder
from bench.workloads.plain_tokenizer import discriminator_loss as plain_discriminator_loss
from kernels.compile.modes import compile_module
from tests.golden import J
from tests.live_memory import LiveMemory
from vavae.config import AutoencoderConfig, LossConfig
from vavae.discriminator import NLayerDiscriminator, frozen
from vavae.gradients import with_gradients
from vavae.loss import Perceptual, discriminator_loss, generator_loss, lpips_distance, lpips_network
from vavae.model import Posterior
from vavae.task import build_networks

OPS = kernels.select("reference")
TINY = AutoencoderConfig(**J("04_vae_tiny")["tiny_config"])
LOSS = {"disc_ndf": 8, "disc_n_layers": 1, "kl_weight": 1e-3}
#: Gradients of the plain formulation that are this much smaller than a network's largest are rounding errors (those of
#: biases before a norm over a single channel are zero but for them).
NOISE = 1e-3


@pytest.fixture(scope="module")
def perceptual() -> lpips.LPIPS:
    """LPIPS with random weights, float64, of a size that keeps activations' (arXiv 1502.01852)."""
    net, generator = lpips_network("cpu").requires_grad_(False).double(), torch.Generator().manual_seed(0)
    for p in net.parameters():
        p.copy_(torch.randn(p.shape, generator=generator) * ((2 / p[0].numel()) ** 0.5 if p.ndim > 1 else 0.01))
    for head in net.lins:
        head.model[-1].weight.abs_()
    return net


def inputs(dtype: torch.dtype, batch: int = 2, size: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, noise and features for `TINY`."""
    generator = torch.Generator().manual_seed(1)
    grid = size // TINY.downsample_ratio
    images = torch.rand(batch, 3, size, size, generator=generator, dtype=torch.float64) * 2 - 1
    noise, features = (
        torch.randn(batch, channels, grid, grid, generator=generator, dtype=torch.float64)
        for channels in (TINY.embed_dim, 24)
    )
    return images.to(dtype), noise.to(dtype), features.to(dtype)


def networks(loss: LossConfig, dtype: torch.dtype = torch.float32) -> dict[str, nn.Module]:
    return {name: network.to(dtype) for name, network in build_networks(TINY, loss, OPS, 0, 24).items()}


def step(loss: LossConfig, found: dict[str, nn.Module], data, gan: bool, vf: bool, distance) -> torch.Tensor:
    """A step of both networks; the autoencoder's loss."""
    images, noise, features = data
    discriminator = found["discriminator"]
    criterion = partial(generator_loss, loss, OPS, perceptual=distance, discriminator=discriminator if gan else None)
    with frozen(discriminator):
        total, reconstruction, _ = found["autoencoder"](images, noise, features if vf else None, criterion)
        total.backward()
    if gan:
        discriminator_loss(loss, discriminator(images), discriminator(reconstruction))[0].backward()
    return total.detach()


def plain_step(loss: LossConfig, found: dict[str, nn.Module], data, gan: bool, vf: bool, net) -> torch.Tensor:
    images, noise, features = data
    discriminator = found["discriminator"]
    plain = PlainAutoencoder(found["autoencoder"], loss, net, discriminator if gan else None)
    with frozen(discriminator):
        total, reconstruction, _ = plain(images, noise, features if vf else None)
        total.backward()
    if gan:
        plain_discriminator_loss(loss, discriminator, images, reconstruction).backward()
    return total.detach()


def gradients(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def assert_same_gradients(ours: nn.Module, theirs: nn.Module, tolerance: float) -> None:
    got, want = gradients(ours), gradients(theirs)
    assert got.keys() == want.keys()
    floor = NOISE * max((g.abs().max() for g in want.values()), default=0)
    for name, gradient in want.items():
        error = (got[name] - gradient).abs().max() / torch.maximum(gradient.abs().max(), floor)
        assert error <= tolerance, f"{name}: {error:.2g}"


@pytest.mark.parametrize("gan, with_lpips", product([False, True], repeat=2))
@pytest.mark.parametrize(
    "vf, margins",
    [(False, {}), (True, {}), (True, {"distmat_margin": 0.0, "cos_margin": 0.0})],
    ids=["no VF", "margins", "margins 0"],
)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 2e-4)], ids=["float64", "float32"])
def test_gradients_are_those_of_the_plain_formulation(dtype, tolerance, vf, gan, with_lpips, margins, perceptual):
    loss, data = LossConfig(**LOSS, **margins), inputs(dtype)
    net = copy.deepcopy(perceptual).to(dtype) if with_lpips else None
    ours = networks(loss, dtype)
    theirs = copy.deepcopy(ours)
    total = step(loss, ours, data, gan, vf, partial(lpips_distance, net) if net else None)
    expected = plain_step(loss, theirs, data, gan, vf, net)
    assert abs(total - expected) <= tolerance * expected.abs()
    for name in ours:
        assert_same_gradients(ours[name], theirs[name], tolerance)
    assert bool(gradients(ours["discriminator"])) == gan


VARIANTS = (
    {"disc_factor": 0.3, "logvar": 0.4},
    {"adaptive_vf": False, "vf_weight": 0.7},
    {"reverse_proj": False},
    {"proj_fix": True},
    {"distmat_weight": 0.3, "cos_weight": 2.0},
)


@pytest.mark.parametrize("gan", [False, True])
@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_every_setting_of_the_loss_is_that_of_the_plain_formulation(fields, gan):
    """Over two micro-batches, whose gradients add up."""
    loss, data = LossConfig(**LOSS | fields), inputs(torch.float64, batch=4)
    ours = networks(loss, torch.float64)
    theirs = copy.deepcopy(ours)
    for half in (slice(0, 2), slice(2, 4)):
        part = [tensor[half] for tensor in data]
        step(loss, ours, part, gan, True, None)
        plain_step(loss, theirs, part, gan, True, None)
    for name in ours:
        assert_same_gradients(ours[name], theirs[name], 1e-9)


class Walks:
    """How often parts are walked backwards, through what comes out of them, and run forward."""

    def __init__(self, **parts: nn.Module):
        self.backward, self.forward = Counter(), Counter()
        for name, part in parts.items():
            part.register_forward_hook(partial(self._watch, name))

    def _watch(self, name: str, module: nn.Module, args, output: torch.Tensor) -> None:
        self.forward[name] += 1
        if output.requires_grad:
            output.register_hook(lambda gradient: self.backward.update([name]))


#: (VF, GAN, balanced VF) → walks of encoder, decoder, LPIPS's VGG, discriminator: ours, and the plain formulation's.
WALKS = {
    (False, False, True): ((1, 1, 1, 0), (1, 1, 1, 0)),
    (True, False, True): ((1, 1, 1, 0), (1, 2, 2, 0)),
    (True, False, False): ((1, 1, 1, 0), None),
    (False, True, True): ((1, 1, 1, 3), (1, 1, 2, 4)),
    (True, True, True): ((1, 2, 1, 3), (1, 2, 3, 4)),
    (True, True, False): ((1, 1, 1, 3), None),
}
PARTS = ("encoder", "decoder", "vgg", "discriminator")


@pytest.mark.parametrize("terms", WALKS, ids=str)
def test_how_often_each_network_is_walked_backwards(terms, perceptual):
    """The discriminator once for the generator, and once for each of the images and reconstructions it learns from."""
    vf, gan, adaptive = terms
    loss, data = LossConfig(**LOSS, adaptive_vf=adaptive), inputs(torch.float32)
    for run, expected in zip((step, plain_step), WALKS[terms], strict=True):
        if expected is None:
            continue
        found, net = networks(loss), copy.deepcopy(perceptual).float()
        autoencoder = found["autoencoder"]
        walks = Walks(
            encoder=autoencoder.encoder.mid,
            decoder=autoencoder.decoder.mid,
            vgg=net.net.slice3,
            discriminator=found["discriminator"].main[2],
        )
        run(loss, found, data, gan, vf, partial(lpips_distance, net) if run is step else net)
        assert tuple(walks.backward[part] for part in PARTS) == expected
        assert tuple(walks.forward[part] for part in PARTS) == (1, 1, 2, 3 if gan else 0)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_a_kl_term_of_weight_zero_has_no_gradient(weight, monkeypatch):
    """`test_vavae_task.py` has the VF term of weight zero."""
    probe = torch.ones(2, requires_grad=True)
    monkeypatch.setattr(Posterior, "kl", lambda self: probe)
    loss, (images, noise, _) = LossConfig(**LOSS | {"kl_weight": weight}), inputs(torch.float32)
    criterion = partial(generator_loss, loss, OPS, perceptual=None, discriminator=None)
    total, _, logs = networks(loss)["autoencoder"](images, noise, None, criterion)
    total.backward()
    assert total == logs["nll"] + weight and logs["kl"] == 1
    assert probe.grad is None if weight == 0 else torch.equal(probe.grad, torch.full((2,), weight / 2))


def test_given_gradients_are_scaled_as_the_loss_is():
    x, weight = torch.randn(3, requires_grad=True), torch.randn(2, requires_grad=True)
    loss = with_gradients(torch.tensor(5.0), (x * 2, weight), (torch.tensor([1.0, 2.0, 3.0]), torch.ones(2)))
    ((loss + x.sum()) / 4).backward()
    assert loss == 5 and torch.equal(weight.grad, torch.full((2,), 0.25))
    assert torch.equal(x.grad, torch.tensor([0.75, 1.25, 1.75]))


@pytest.mark.parametrize("vf, gan", product([False, True], repeat=2))
def test_no_more_memory_than_the_plain_formulation(vf, gan, perceptual):
    loss, data, peaks = LossConfig(**LOSS), inputs(torch.float32, batch=4), {}
    net = copy.deepcopy(perceptual).float()
    for run, distance in ((step, partial(lpips_distance, net)), (plain_step, net)):
        found = networks(loss)
        with LiveMemory() as memory:
            run(loss, found, data, gan, vf, distance)
        peaks[run] = memory.peak
    assert peaks[step] <= peaks[plain_step], peaks


@pytest.mark.parametrize("kind, gan", [(True, False), (True, True), ("pointwise", False)])
def test_activation_checkpointing_keeps_gradients_and_saves_memory(kind, gan):
    loss, data = LossConfig(**LOSS), inputs(torch.float32, batch=4)
    found, peaks = [], []
    for use in (False, kind):
        both = build_networks(TINY, loss, OPS, 0, 24, use)
        with LiveMemory() as memory:
            step(loss, both, data, gan, True, None)
        found.append(both)
        peaks.append(memory.peak)
    for name in found[0]:
        assert_same_gradients(found[1][name], found[0][name], 1e-6)
    assert peaks[1] < 0.9 * peaks[0], peaks


def test_dropped_units_are_the_same_when_computed_again():
    loss, data = LossConfig(**LOSS), inputs(torch.float32)
    found = []
    for use in (False, True):
        torch.manual_seed(0)
        network = build_networks(TINY.model_copy(update={"dropout": 0.3}), loss, OPS, 0, 24, use)["autoencoder"]
        step(loss, {"autoencoder": network, "discriminator": NLayerDiscriminator(ndf=8)}, data, False, True, None)
        found.append(network)
    assert_same_gradients(found[1], found[0], 1e-6)


@pytest.mark.parametrize("gan", [False, True])
def test_compiled_networks_give_the_same_gradients(gan, perceptual):
    """As graphs without a break, of which the decoder's backward pass is walked twice where both terms are balanced."""
    loss, data = LossConfig(**LOSS), inputs(torch.float32)
    eager, graphs = networks(loss), networks(loss)
    distance = Perceptual(copy.deepcopy(perceptual).float())
    step(loss, eager, data, gan, True, distance)
    torch._dynamo.reset()
    for network in (*graphs.values(), distance):
        compile_module(network, "aot_eager")
    with torch._functorch.config.patch(donated_buffer=False):  # as `VavaeTask.compile` sets it
        step(loss, graphs, data, gan, True, distance)
    for name in eager:
        assert_same_gradients(graphs[name], eager[name], 2e-4)


def test_lpips_in_bfloat16_compares_in_float32(perceptual):
    """VGG alone is rounded: the distance is float32, and as far off as bfloat16's digits."""
    distance = Perceptual(copy.deepcopy(perceptual).float())
    x, y = inputs(torch.float32)[0], inputs(torch.float32)[0].flip(0)
    exact = distance(x, y)
    distance.cast(torch.bfloat16)
    got = distance(x, y)
    assert got.dtype == torch.float32 and {p.dtype for p in distance.net.net.parameters()} == {torch.bfloat16}
    assert distance.net.lin0.model[-1].weight.dtype == distance.net.scaling_layer.shift.dtype == torch.float32
    assert 0 < (got - exact).abs().max() < 0.02 * exact.abs().max()
