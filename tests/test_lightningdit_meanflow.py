"""Objectives of average velocities: an exact one, formulas by hand, draws, guidance, one compiled graph."""

import math

import pytest
import torch
from scipy import stats
from torch.utils.flop_counter import FlopCounterMode

import kernels
from kernels.forward_mode import Dual
from lightningdit.config import TransportConfig
from lightningdit.cost import flops_per_image, training_flops_per_image
from lightningdit.duals import differentiated
from lightningdit.flow import unsqueeze_like
from lightningdit.meanflow import MeanFlow
from tests.dit_models import random_model
from tests.test_lightningdit_forward_mode import config_of

OBJECTIVES = ("meanflow", "improved_meanflow")
NULL = 3


def mean_flow(objective: str = "meanflow", **fields) -> MeanFlow:
    return MeanFlow(TransportConfig(objective=objective, **fields))


def batch(count: int = 6, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    x1, x0 = (torch.randn(count, 2, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    first, second = (torch.rand(count, generator=generator, dtype=torch.float64) for _ in range(2))
    t, r = torch.minimum(first, second), torch.maximum(first, second)
    return {"x1": x1, "x0": x0, "t": t, "r": r, "y": torch.arange(count) % 3}


class Gaussian:
    """The exact average velocity where data are normal with deviation S: x_t has deviation σ(t), and the flow scales.

    σ(t)² = (t·S)² + (1 - t)², so x_r = x_t·σ(r) / σ(t). On the path Linear.
    """

    S = 0.3

    def deviation(self, t: torch.Tensor) -> torch.Tensor:
        return ((t * self.S) ** 2 + (1 - t) ** 2).sqrt()

    def velocity(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        rate = (t * self.S**2 - (1 - t)) / self.deviation(t) ** 2
        return unsqueeze_like(rate, x) * x

    def __call__(self, x, t, *, y, r):
        return differentiated(lambda x, t: self._average(x, t, r), x, t)

    def _average(self, x: torch.Tensor, t: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        interval = torch.where(r == t, 1.0, r - t)
        average = unsqueeze_like((self.deviation(r) / self.deviation(t) - 1) / interval, x) * x
        return torch.where(unsqueeze_like(r == t, x), self.velocity(x, t), average)


def test_an_exact_average_velocity_leaves_what_flow_matching_leaves():
    """Of improved MeanFlow: V is the velocity of the flow at x_t, whatever r is (iMF eq. 8)."""
    given, exact = batch(), Gaussian()
    transport = mean_flow("improved_meanflow", adaptive_power=0.0)
    xt, conditional = transport.interpolate(given["x0"], given["x1"], given["t"])
    want = (exact.velocity(xt, given["t"]) - conditional).square().flatten(1)
    for paired in ([True] * 6, [False] * 6, [False, True, True, False, True, False]):
        found = transport.mean_losses(exact, **given, paired=paired)
        torch.testing.assert_close(found["mse"], want.mean(1), rtol=1e-11, atol=0)
        torch.testing.assert_close(found["loss"], want.sum(1), rtol=1e-11, atol=0)


def test_one_step_of_an_exact_average_velocity_is_the_flow():
    exact, x = Gaussian(), torch.randn(4, 2, 3, 3, dtype=torch.float64)
    t, r, y = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64), torch.zeros(4).long()
    torch.testing.assert_close(x + exact(x, t, y=y, r=r), x * exact.S)


class Network:
    """A smooth function of everything it is given, with a weight; it notes how it was called."""

    def __init__(self):
        self.weight = torch.tensor([0.7, -1.1], dtype=torch.float64, requires_grad=True)
        self.calls: list[tuple] = []

    def __call__(self, x, t, *, y, r):
        self.calls.append((isinstance(x, Dual), torch.is_grad_enabled(), y.tolist()))
        return differentiated(lambda x, t: self.value(x, t, y, r), x, t)

    def value(self, x, t, y, r):
        t, r, label = (unsqueeze_like(value.to(x.dtype), x) for value in (t, r, y))
        return (self.weight[0] * x * (1 + t) + r).sin() + self.weight[1] * (x.roll(1, -1) * (label + 1) * t).cos()


def by_hand(network: Network, section: TransportConfig, given: dict, paired, drop=None) -> tuple:
    """(mse, loss) of each sample by the formulas, one sample at a time, with derivatives by `torch.func.jvp`."""
    results = []
    for i in range(len(given["x1"])):
        x1, x0, t, r, y = (given[name][i : i + 1] for name in ("x1", "x0", "t", "r", "y"))
        null, dropped = torch.full_like(y, NULL), drop is not None and bool(drop[i])
        label = null if dropped else y
        time = unsqueeze_like(t, x1)
        xt, v = time * x1 + (1 - time) * x0, x1 - x0
        with torch.no_grad():
            of_label, of_null = (network.value(xt, t, k, t) for k in (y, null))
        guided, w = v, section.guidance_scale
        if w != 1 and section.guidance_start <= float(t) <= section.guidance_end and not dropped:
            if section.objective == "meanflow":
                kappa = section.guidance_mix
                guided = w * (1 - kappa) * v + kappa * of_label + (1 - w * (1 - kappa) - kappa) * of_null
            else:
                guided = v + (1 - 1 / w) * (of_label - of_null)
        tangent = guided if section.objective == "meanflow" else (of_null if dropped else of_label)
        if not paired[i]:
            r = t
        u, along = torch.func.jvp(
            lambda x, t, label=label, r=r: network.value(x, t, label, r), (xt, t), (tangent, torch.ones_like(t))
        )
        delta = u - (guided + unsqueeze_like(r - t, x1) * along).detach()
        total = delta.square().sum()
        weight = (total.detach() + section.adaptive_floor) ** -section.adaptive_power
        results.append((delta.square().mean(), weight * total))
    return tuple(map(torch.stack, zip(*results, strict=True)))


PAIRED = [True, False, False, True, True, False]
DROP = torch.tensor([False, True, False, False, True, False])
VARIANTS = [
    *((objective, fields) for objective in OBJECTIVES for fields in (
        {},
        {"adaptive_power": 0.5, "adaptive_floor": 0.1},
        {"guidance_scale": 2.5},
        {"guidance_scale": 2.5, "guidance_start": 0.2, "guidance_end": 0.5},
    )),
    ("meanflow", {"guidance_scale": 2.5, "guidance_mix": 0.6}),
]  # fmt: skip


@pytest.mark.parametrize(("objective", "fields"), VARIANTS)
@pytest.mark.parametrize("drop", [None, DROP], ids=["undropped", "dropped"])
def test_losses_and_gradients_are_those_of_the_formulas(objective, fields, drop):
    transport, given = mean_flow(objective, **fields), batch(seed=1)
    network = Network()
    found = transport.mean_losses(network, **given, paired=PAIRED, drop=drop, null_label=NULL)
    want = by_hand(network, transport.section, given, PAIRED, drop)
    for name, values in zip(("mse", "loss"), want, strict=True):
        torch.testing.assert_close(found[name], values, rtol=1e-11, atol=1e-12)
        got, wanted = (
            torch.autograd.grad(v.sum(), network.weight, retain_graph=True)[0] for v in (found[name], values)
        )
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    ("objective", "fields", "without_gradient"),
    [
        ("meanflow", {}, 0),
        ("meanflow", {"guidance_scale": 2.0}, 6),
        ("meanflow", {"guidance_scale": 2.0, "guidance_mix": 0.5}, 12),
        ("improved_meanflow", {}, 3),
        ("improved_meanflow", {"guidance_scale": 2.0}, 12),
    ],
)
def test_the_network_is_evaluated_no_more_than_is_needed(objective, fields, without_gradient):
    """Samples evaluated: each once with gradients, those of two times with tangents, few without gradients."""
    network = Network()
    mean_flow(objective, **fields).mean_losses(network, **batch(), paired=PAIRED, null_label=NULL)
    count = {key: sum(len(y) for dual, grad, y in network.calls if (dual, grad) == key) for key in
             ((True, True), (False, True), (False, False))}  # fmt: skip
    assert count == {(True, True): 3, (False, True): 3, (False, False): without_gradient}


def test_all_or_none_of_the_samples_may_have_two_times():
    for paired, kinds in (([True] * 6, [True]), ([False] * 6, [False])):
        network = Network()
        mean_flow().mean_losses(network, **batch(), paired=paired)
        assert [dual for dual, _, _ in network.calls] == kinds
    with pytest.raises(ValueError, match="paired has 5 values for 6 samples"):
        mean_flow().mean_losses(Network(), **batch(), paired=[True] * 5)


def test_guidance_needs_a_null_label():
    with pytest.raises(ValueError, match="guidance_scale 2 needs a null label"):
        mean_flow(guidance_scale=2.0).mean_losses(Network(), **batch(), paired=PAIRED)


def test_of_flow_there_is_no_average():
    with pytest.raises(ValueError, match="objective is flow; allowed here: meanflow, improved_meanflow"):
        MeanFlow(TransportConfig())


@pytest.mark.parametrize(
    ("share", "count", "pairs"),
    [
        (0.75, 128, 32),
        (0.75, 4, 1),
        (0.5, 6, 3),
        (0.8, 128, 26),
        (0.9, 8, 1),
        (0.99, 8, 1),
        (0.01, 8, 7),
        (0.0, 5, 5),
        (1.0, 5, 0),
        (0.75, 1, 1),
    ],
)
def test_samples_with_two_times_are_a_fixed_number_of_a_micro_batch_spread_evenly(share, count, pairs):
    paired = mean_flow(equal_times=share).paired(count)
    assert sum(paired) == pairs and len(paired) == count
    before = [sum(paired[:i]) for i in range(count + 1)]
    assert all(abs(before[i] - i * pairs / count) < 1 for i in range(count + 1))


SHIFTED = {"use_lognorm": True, "lognorm_mean": 0.4, "lognorm_std": 1.3}


@pytest.mark.parametrize("lognorm", [{"use_lognorm": False}, {"use_lognorm": True}, SHIFTED])
def test_times_have_their_distribution_and_quantiles(lognorm):
    transport = mean_flow(**lognorm)
    generator = torch.Generator().manual_seed(0)
    t, r = transport.sample_time_pairs(20_000, generator=generator, device="cpu")
    assert bool((t <= r).all())

    def normal(x):
        mean, std = lognorm.get("lognorm_mean", 0.0), lognorm.get("lognorm_std", 1.0)
        return stats.norm.cdf((torch.special.logit(torch.as_tensor(x)) - mean) / std) if lognorm["use_lognorm"] else x

    assert stats.kstest(t.numpy(), lambda x: 1 - (1 - normal(x)) ** 2).pvalue > 1e-3
    assert stats.kstest(r.numpy(), lambda x: normal(x) ** 2).pvalue > 1e-3
    shares = torch.rand(2, 20_000, generator=generator, dtype=torch.float64)
    at_t, at_r = transport.time_pairs_at(*shares)
    assert bool((at_t <= at_r).all())
    for drawn, made in ((t, at_t), (r, at_r), (r - t, at_r - at_t)):
        assert stats.ks_2samp(drawn.double().numpy(), made.numpy()).pvalue > 1e-3
    one, other = transport.time_pairs_at(torch.tensor([0.36]), torch.tensor([0.5]))
    assert normal(one)[0] == pytest.approx(0.2, abs=1e-5) and normal(other)[0] == pytest.approx(0.6, abs=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_the_loss_compiles_as_one_graph(objective, guidance_scale):
    """Of the network and everything around it; with the same values and gradients."""
    torch._dynamo.reset()
    config, given = config_of("a"), None
    generator = torch.Generator().manual_seed(0)
    shape = (4, config.in_channels, config.input_size, config.input_size)
    x1, x0 = (torch.randn(shape, generator=generator) for _ in range(2))
    t, r = torch.rand(2, 4, generator=generator).sort(dim=0).values
    given = {
        "x1": x1,
        "x0": x0,
        "t": t,
        "r": r,
        "y": torch.tensor([0, 1, 2, 0]),
        "drop": DROP[:4],
        "null_label": config.null_label,
    }
    found = []
    for compiled in (False, True):
        model, transport = (
            random_model(config, kernels.select("auto")).train(),
            mean_flow(objective, guidance_scale=guidance_scale),
        )

        def loss(model=model, transport=transport, **tensors):
            return transport.mean_losses(model, paired=[True, False, False, True], **tensors)["loss"].mean()

        function = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
        value = function(**given)
        value.backward()
        found.append([value.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    for a, b in zip(*found, strict=True):
        assert float((a - b).abs().max()) <= 2e-5 * float(a.abs().max())


@pytest.mark.parametrize(("objective", "fields"), [*VARIANTS, ("meanflow", {"equal_times": 0.0})])
def test_flops_of_a_step_are_those_torch_counts(objective, fields):
    """Of every evaluation with its tangents and gradients; and never more than 2.2 times those of flow matching."""
    fields = {"equal_times": 0.5} | fields | ({"guidance_start": 0.0} if "guidance_start" in fields else {})
    config = config_of("a").model_copy(update={"depth": 3})
    model, transport = random_model(config, kernels.select("reference")), mean_flow(objective, **fields)
    shape = (4, config.in_channels, config.input_size, config.input_size)
    given = {"x1": torch.randn(shape), "x0": torch.randn(shape), "t": torch.full((4,), 0.2), "r": torch.full((4,), 0.7)}
    model(given["x1"], given["t"], torch.arange(4) % 3)  # so that nothing is counted that is done once
    with FlopCounterMode(display=False) as counter:
        losses = transport.mean_losses(
            model, **given, y=torch.arange(4) % 3, paired=transport.paired(4), null_label=config.null_label
        )
        losses["loss"].mean().backward()
    got, want = counter.get_total_flops() / 4, training_flops_per_image(config, transport.section)
    # The gradient of the latents is asked of nobody; that of the label table is a product of its own.
    assert got == pytest.approx(want, rel=0.03)
    assert want <= 2.2 * flops_per_image(config)[1]


STEPS, LR = 1000, 1e-2


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_training_on_normal_data_finds_the_flow_in_one_step(objective):
    """A network that scales and shifts, by functions of both times, can be exact."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(a, b) for a, b in ((2, 64), (64, 64), (64, 2))]
    net = torch.nn.Sequential(layers[0], torch.nn.SiLU(), layers[1], torch.nn.SiLU(), layers[2])

    def model(x, t, *, y, r):
        def average(x, t):
            scale, shift = net(torch.stack([t, r - t], dim=1)).unbind(1)
            return unsqueeze_like(scale, x) * x + unsqueeze_like(shift, x)

        return differentiated(average, x, t)

    transport = mean_flow(objective, equal_times=0.5, adaptive_power=0.0)
    optimizer, generator = torch.optim.Adam(net.parameters(), lr=LR), torch.Generator().manual_seed(1)
    paired, y = transport.paired(256), torch.zeros(256, dtype=torch.long)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = LR * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        x1, x0 = (torch.randn(256, 4, generator=generator) for _ in range(2))
        t, r = transport.sample_time_pairs(256, generator=generator, device="cpu")
        losses = transport.mean_losses(model, 0.5 + Gaussian.S * x1, t=t, r=r, x0=x0, paired=paired, y=y)
        optimizer.zero_grad()
        losses["loss"].mean().backward()
        optimizer.step()
    noise, zeros, ones = torch.randn(4000, 4, generator=generator), torch.zeros(4000), torch.ones(4000)
    with torch.no_grad():
        made = noise + model(noise, zeros, y=None, r=ones)
    assert float(made.mean()) == pytest.approx(0.5, abs=0.04) and float(made.std()) == pytest.approx(0.3, abs=0.04)
