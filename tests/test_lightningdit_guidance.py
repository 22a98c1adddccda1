"""Guidance: what it computes and what it leaves out, on an interval, by a schedule, by a weaker network; presets."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from lightningdit.config import SampleConfig, named_config
from lightningdit.cost import flops_per_image, sampling_flops_per_image
from lightningdit.flow import Transport
from lightningdit.guidance import Denoiser, Guidance
from lightningdit.sampler import sample, sample_noise
from lightningdit.solvers import sample_ode, time_grid
from tests.golden import close

NULL = 10
XL = named_config("LightningDiT-XL/1", input_size=16, in_channels=32, use_swiglu=True, use_rope=True, use_rmsnorm=True)


def nothing(x, t, y):
    return torch.zeros_like(x)


def cost_of(**settings):
    """(solver calls, guided ones) of settings under a network of nothing."""
    config = SampleConfig(**settings)
    made = sample(nothing, Transport(), config, torch.zeros(1, dtype=torch.long), [0], shape=(1, 1, 1), null_label=1)
    return made.nfe, made.guided_nfe


@pytest.mark.parametrize(
    "preset, scale, start, saved", [("paper-64ep", 10.0, 0.10, 13.7), ("paper-800ep", 6.7, 0.125, 16.3)]
)
def test_a_skipped_interval_changes_nothing_but_rounding(preset, scale, start, saved):
    """Beside a loop that always runs both halves, in float64, over all 250 points; and the FLOPs that it saves, of a
    count of the calls."""
    g = torch.Generator().manual_seed(0)
    z, mixing, bias = (torch.randn(*n, dtype=torch.float64, generator=g) for n in ((2, 4, 4, 4), (4, 4), (11, 4, 1, 1)))
    config, y = SampleConfig(preset=preset), torch.tensor([1, 5])

    def network(x, t, y):
        return torch.tanh(torch.einsum("cd,bdhw->bchw", mixing, x) + bias[y] + t.view(-1, 1, 1, 1))

    times = 0.3 * np.linspace(0, 1, 250) / (1 - 0.7 * np.linspace(0, 1, 250))
    labels, x = torch.cat([y, torch.full_like(y, NULL)]), z
    for t, after in pairwise(times.tolist()):
        both = network(torch.cat([x, x]), torch.full((4,), t, dtype=torch.float64), y=labels)
        cond, uncond = both.chunk(2)
        velocity = cond.clone()
        if t >= start:
            velocity[:, :3] = uncond[:, :3] + scale * (cond[:, :3] - uncond[:, :3])
        x = x + (after - t) * velocity
    guidance = Guidance(config.cfg_scale, NULL, config.cfg_interval_start, config.cfg_channels)
    predict = Denoiser(network, y, guidance)
    made = sample_ode(Transport(), predict, z, steps=config.num_sampling_steps, shift=config.timestep_shift)
    close("latents", made, x, atol=2e-5)  # times of ours are float32
    assert (predict.nfe, predict.guided_nfe) == (249, int((times[:-1] >= start).sum()))
    ours = sampling_flops_per_image(XL, predict.nfe, predict.guided_nfe)
    assert 100 * (1 - ours / sampling_flops_per_image(XL, 249, 249)) == pytest.approx(saved, abs=0.05)
    assert sampling_flops_per_image(XL, 249, 249) == 2 * 249 * flops_per_image(XL)[0]


@pytest.mark.parametrize("method, calls", [("euler", 1), ("heun", 2), ("rk4", 4)])
def test_both_ends_of_the_interval_are_guided_and_nothing_beyond(method, calls):
    """At every call, the stages of a step included."""
    grid = time_grid(0, 1, 11).tolist()
    low, high = grid[3], grid[7]
    times, rows = [], []

    def counting(x, t, y):
        times.append(float(t[0]))
        rows.append(len(x))
        return torch.zeros_like(x)

    config = SampleConfig(
        sampling_method=method,
        num_sampling_steps=11,
        timestep_shift=0.0,
        cfg_interval_start=low,
        cfg_interval_end=high,
    )
    made = sample(
        counting, Transport(), config, torch.zeros(3, dtype=torch.long), range(3), shape=(2, 2, 2), null_label=1
    )
    inside = [low <= np.float32(t) <= high for t in times]
    assert rows == [6 if held else 3 for held in inside] and (low in times) and (high in times)
    assert (made.nfe, made.guided_nfe) == (10 * calls, sum(inside))


def test_an_interval_up_to_one_has_no_end():
    assert cost_of(sampling_method="rk4", cfg_interval_start=0.0) == (4 * 249, 4 * 249)
    assert cost_of(cfg_interval_start=0.0, cfg_interval_end=0.0) == (249, 1)
    assert Guidance(2.0, NULL).applies(1.0 + 1e-6) and not Guidance(2.0, NULL, interval_end=0.5).applies(0.5 + 1e-6)
    assert Guidance(2.0, NULL, interval_end=0.9).applies(np.float32(0.9).item())


SHARES = {
    "constant": lambda t: np.ones_like(t),
    "linear": lambda t: t,
    "cosine": lambda t: np.sin(np.pi * t / 2) ** 2,  # (1 - cos πt) / 2
}


@pytest.mark.parametrize("schedule", SHARES)
@pytest.mark.parametrize("mode", ["ODE", "SDE"])
def test_schedules_bring_the_scale_from_one_to_its_value(mode, schedule):
    """Under a network that says 1 for the null label and 2 for others, the guided output is 1 + w(t)."""
    seen = []

    def network(x, t, y):
        return torch.where(y == 1, 1.0, 2.0).view(-1, 1, 1, 1).expand_as(x)

    guidance = Guidance(5.0, 1, schedule=schedule)
    predict = Denoiser(network, torch.zeros(1, dtype=torch.long), guidance)
    for t in time_grid(0, 1, 21, 0.3).tolist():
        seen.append((t, float(predict(torch.zeros(1, 1, 1, 1), t).mean()) - 1))
    times, scales = np.array(seen).T
    want = 1 + 4 * SHARES[schedule](times)
    np.testing.assert_allclose(scales, want, rtol=1e-6)
    # Where the scale is 1, at noise, the second half changes nothing and is not run.
    assert predict.guided_nfe == (21 if schedule == "constant" else 20)
    settings = dict(mode=mode, num_sampling_steps=21, cfg_interval_start=0.0, cfg_schedule=schedule)
    calls = 20 + (mode == "SDE")  # a step to the end
    assert cost_of(**settings) == (calls, calls - (schedule != "constant"))


def test_a_constant_schedule_is_the_scale_itself():
    config = SampleConfig(num_sampling_steps=4)
    assert config.cfg_schedule == "constant" and Guidance(10.1, NULL).scale_at(0.37) == 10.1


def test_a_weaker_network_guides_in_the_place_of_the_null_label():
    """With the same labels, no null label, and on its own rows; only where it has an effect."""
    calls = {"model": [], "guide": []}

    def network(name, value):
        def call(x, t, y):
            calls[name].append((round(float(t[0]), 4), len(x), y.tolist()))
            return torch.full_like(x, value)

        return call

    config = SampleConfig(
        num_sampling_steps=5,
        timestep_shift=0.0,
        cfg_scale=3.0,
        cfg_interval_start=0.25,
        cfg_interval_end=0.5,
        cfg_channels=1,
    )
    made = sample(
        network("model", 2.0),
        Transport(),
        config,
        torch.tensor([4, 7]),
        [0, 1],
        shape=(2, 1, 1),
        null_label=None,
        guide=network("guide", 1.5),
    )
    moved = (made.latents - sample_noise(0, [0, 1], (2, 1, 1))).flatten(1)
    # Two steps of 1/4 unguided at velocity 2, two guided: 1.5 + 3 · 0.5 on the first channel.
    close("guided channel", moved[:, 0], torch.full((2,), 0.5 * 2 + 0.5 * 3.0), atol=1e-6)
    close("other channel", moved[:, 1], torch.full((2,), 2.0), atol=1e-6)
    assert calls["guide"] == [(0.25, 2, [4, 7]), (0.5, 2, [4, 7])] == calls["model"][1:3] and len(calls["model"]) == 4
    assert (made.nfe, made.guided_nfe) == (4, 2)
    small = named_config("LightningDiT-B/1", input_size=16, in_channels=32, use_swiglu=True)
    cost = sampling_flops_per_image(XL, made.nfe, made.guided_nfe, guide=small)
    assert cost == 4 * flops_per_image(XL)[0] + 2 * flops_per_image(small)[0]


RATE = {"cond": 2.0, "other": 1.0}


@pytest.mark.parametrize("schedule", SHARES)
@pytest.mark.parametrize("guide", [True, False])
@pytest.mark.parametrize("low, high", [(0.3, 0.7), (0.0, 0.25), (0.6, 1.0), (0.5, 0.5), (0.1, 0.999)])
def test_no_adaptive_step_crosses_an_end_of_the_interval(low, high, guide, schedule):
    """Exact for a linear field: the state grows by the integral of its rate, which jumps at both ends."""
    z = torch.randn(2, 3, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def network(rate):
        return lambda x, t, y: torch.where(y == 1, RATE["other"], rate).to(x).view(-1, 1, 1, 1) * x

    weak = network(RATE["other"]) if guide else None
    guidance = Guidance(4.0, None if guide else 1, low, interval_end=high, schedule=schedule)
    predict = Denoiser(network(RATE["cond"]), torch.zeros(2, dtype=torch.long), guidance, weak)
    x = sample_ode(Transport(), predict, z, method="dopri5", steps=6)
    times = np.linspace(low, high, 10_001)
    added = np.trapezoid(3 * SHARES[schedule](times), times)  # other + w · (cond - other) is 2 + (w - 1)
    close("end", x, z * math.exp(2.0 + added), relmax=5e-3)
    assert predict.nfe <= 80 and predict.guided_nfe < predict.nfe


def test_guidance_needs_something_that_guides():
    named = dict(shape=(1, 1, 1), null_label=None)
    y = torch.zeros(1, dtype=torch.long)
    with pytest.raises(ValueError, match=r"cfg_scale 4.0 needs a null label or a network that guides"):
        sample(nothing, Transport(), SampleConfig(), y, [0], **named)
    with pytest.raises(ValueError, match=r"guide_step names a network that guides, but none is given"):
        sample(nothing, Transport(), SampleConfig(guide_step=5), y, [0], shape=(1, 1, 1), null_label=1)
    with pytest.raises(ValueError, match="needs a null label, or a network that guides"):
        Denoiser(nothing, y, Guidance(2.0, None))
    unguided = SampleConfig(cfg_scale=1.0, num_sampling_steps=3, guide_step=5)
    made = sample(nothing, Transport(), unguided, y, [0], **named)
    assert (made.nfe, made.guided_nfe) == (2, 0)
