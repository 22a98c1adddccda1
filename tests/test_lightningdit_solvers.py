"""Solvers of ODEs and SDEs against other solvers and closed forms: order, guidance that begins, likelihoods."""

import math

import pytest
import torch
import torchdiffeq

from lightningdit.config import DIFFUSION_FORMS, SampleConfig
from lightningdit.flow import Transport
from lightningdit.guidance import Denoiser, Guidance
from lightningdit.sampler import sample
from lightningdit.solvers import log_likelihood, sample_ode, sample_sde, time_grid
from tests.golden import close


def swirl(x, t):
    """A nonlinear field that depends on time."""
    return torch.stack([-x[:, 1] * (1 + t), x[:, 0] + math.sin(3 * t) * x[:, 1] ** 2], dim=1)


@pytest.mark.parametrize("ours", ["euler", "midpoint", "heun", "heun3", "rk4"])
def test_solvers_agree_with_torchdiffeq(ours):
    theirs = "heun2" if ours == "heun" else ours
    z = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    times = time_grid(0, 1, 9, 0.3).double()
    want = torchdiffeq.odeint(lambda t, x: swirl(x, float(t)), z, times, method=theirs)[-1]
    close(ours, sample_ode(Transport(), swirl, z, method=ours, steps=9, shift=0.3), want, atol=1e-12)


@pytest.mark.parametrize("method, order", [("euler", 1), ("midpoint", 2), ("heun", 2), ("heun3", 3), ("rk4", 4)])
def test_order_of_convergence(method, order):
    z = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # linspace in float32 limits what fine grids can show, so the steps stay large.
    exact = torchdiffeq.odeint(
        lambda t, x: swirl(x, float(t)), z, torch.tensor([0.0, 1.0]).double(), method="dopri8", rtol=1e-12, atol=1e-12
    )[-1]
    errors = [(sample_ode(Transport(), swirl, z, method=method, steps=n + 1) - exact).norm() for n in (16, 32)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.35)


RATES = torch.tensor([2.0, 1.0])  # of growth under each of two labels


def growing(x, t, y):
    """Linear, so solved exactly: x grows at the rate of its label."""
    return RATES.to(x)[y].view(-1, 1) * x


def grown(z, guidance, t):
    """The exact state at time t: each channel grows at its conditional rate, and at its guided one once guidance is on.

    Guidance of 2 and 1 by w: 1 + w."""
    channels = torch.arange(z.shape[1])
    guided = channels < (z.shape[1] if guidance.channels is None else guidance.channels)
    faster = torch.where(guided, 1 + guidance.scale, 2.0).to(z)
    before = min(t, guidance.interval_start) if guidance.scale != 1 else t
    return z * (2.0 * before + faster * (t - before)).exp()


JUMPS = [
    Guidance(scale, 1, start, channels)
    for scale, start, channels in [
        (10.0, 0.3, None),
        (4.0, 0.125, 2),
        (10.0, 0.11, 3),
        (4.0, 1e-7, None),
        (4.0, 3 / 7, None),
        (4.0, 0.999, 1),
        (6.0, 0.0, None),
        (6.0, 1.0, None),
        (1.0, 0.3, None),
    ]
]


def counted_growth(guidance):
    """(the guided field of two samples, the list of the rows of each call of its model)."""
    rows = []

    def model(x, t, y):
        rows.append(len(x))
        return growing(x, t, y)

    return Denoiser(model, torch.zeros(2, dtype=torch.long), guidance), rows


def jump_id(guidance):
    return f"{guidance.scale:g}-{guidance.interval_start:.3g}-{guidance.channels}"


@pytest.mark.parametrize("guidance", JUMPS, ids=jump_id)
def test_no_adaptive_step_crosses_the_start_of_guidance(guidance):
    """At every point of the grid the error stays that of the tolerance, for few calls."""
    z = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    states, (predict, rows) = {}, counted_growth(guidance)
    x = sample_ode(Transport(), predict, z, method="dopri5", steps=8, callback=states.__setitem__)
    assert list(states) == list(range(1, 8)) and torch.equal(states[7], x)
    for i, t in enumerate(time_grid(0, 1, 8).tolist()[1:], start=1):
        want = grown(z, guidance, t)
        assert (states[i] - want).abs().max() < 5e-3 * want.abs().max(), t
    assert rows == sorted(rows), "guided before the start of guidance, or unguided after it"
    assert (predict.nfe, predict.guided_nfe) == (len(rows), rows.count(4)) and predict.nfe <= 64


@pytest.mark.parametrize("guidance", JUMPS, ids=jump_id)
def test_likelihood_under_guidance(guidance):
    """From data to noise the solve meets the same jump; a linear field's likelihood is exact."""
    z = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    data = grown(z, guidance, 1.0)
    predict, rows = counted_growth(guidance)
    logp, noise = log_likelihood(Transport(), predict, data, torch.ones_like(z), atol=1e-9, rtol=1e-7)
    volume = grown(torch.ones_like(z), guidance, 1.0).log().sum(1)
    close("noise", noise, z, atol=1e-6)
    close("log density", logp, torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1) - volume, atol=1e-5)
    assert rows == sorted(rows, reverse=True)


def test_steps_of_a_grid_may_cross_it():
    """The published solvers of fixed steps look at the time of each call alone."""
    guidance, z = Guidance(4.0, 1, 0.3), torch.ones(1, 2, dtype=torch.float64)
    predict = Denoiser(growing, torch.zeros(1, dtype=torch.long), guidance)
    x = sample_ode(Transport(), predict, z, method="euler", steps=3)
    close("two steps", x, z * (1 + 0.5 * 2) * (1 + 0.5 * 5), atol=1e-12)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_dopri5_says_where_it_finds_no_step(broken):
    def field(x, t):
        return x * (broken if t > 0.25 else 1.0)

    with pytest.raises(ValueError, match=r"no step between t = 0 and 1: the network's output is not finite"):
        sample_ode(Transport(), field, torch.ones(2, 3), method="dopri5")
    with pytest.raises(ValueError, match=r"no step between t = 1 and 0"):
        log_likelihood(Transport(), field, torch.ones(2, 3), torch.ones(2, 3))


SPREAD = 0.5  # of Gaussian data in one dimension, whose velocity and score are known


def gaussian_velocity(x, t):
    return x * (t * SPREAD**2 - (1 - t)) / (t**2 * SPREAD**2 + (1 - t) ** 2)


def test_ode_transports_noise_to_data():
    z = torch.randn(1000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    close("scaled", sample_ode(Transport(), gaussian_velocity, z, method="rk4", steps=100), z * SPREAD, atol=1e-6)


@pytest.mark.parametrize("form", DIFFUSION_FORMS)
@pytest.mark.parametrize("method, last", [("euler", "Mean"), ("euler", "Tweedie"), ("heun", "Euler"), ("heun", None)])
def test_every_sde_ends_in_the_data(form, method, last):
    """Any diffusion keeps the marginals, so samples have the data's spread (5,000 samples: 1 % standard error)."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(5_000, 1, dtype=torch.float64, generator=g)
    # SBDM's diffusion is infinite at noise: a larger eps keeps its first steps stable.
    transport = Transport(sample_eps=0.01 if form == "SBDM" else None)
    x = sample_sde(
        transport,
        gaussian_velocity,
        z,
        lambda k: torch.randn(z.shape, dtype=z.dtype, generator=g),
        method=method,
        steps=150,
        form=form,
        norm=0.3,
        last_step=last,
        last_step_size=0.01,
    )
    assert float(x.std()) == pytest.approx(SPREAD, rel=0.05)
    assert abs(float(x.mean())) < 0.03


def test_tweedie_is_the_posterior_mean():
    """With all of time left to the last step, it returns E[x1 | x_t] of Gaussian data."""
    z = torch.tensor([[1.0], [-2.0]], dtype=torch.float64)
    x = sample_sde(
        Transport(sample_eps=0.0),
        gaussian_velocity,
        z,
        lambda k: torch.zeros_like(z),
        steps=2,
        form="sigma",
        norm=1e-12,
        last_step="Tweedie",
        last_step_size=0.5,
    )
    at = z * (1 + 0.5 * -1)  # one Euler step of size 0.5 from t = 0, where the velocity is -x
    want = at * 0.5 * SPREAD**2 / (0.25 * SPREAD**2 + 0.25)
    close("posterior mean", x, want, atol=1e-9)


def test_log_likelihood_of_gaussian_data():
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64) * SPREAD
    probe = torch.randint(0, 2, x.shape).double() * 2 - 1
    logp, noise = log_likelihood(Transport(), gaussian_velocity, x, probe, atol=1e-8, rtol=1e-8)
    want = torch.distributions.Normal(0.0, SPREAD).log_prob(x).flatten(1).sum(1)
    close("log density", logp, want, atol=1e-5)
    close("noise", noise, x / SPREAD, atol=1e-5)


def test_samples_come_with_their_likelihood():
    """Under the exact field of Gaussian data: its log-density at the samples, whatever else is in the batch."""
    config = SampleConfig(num_sampling_steps=40, cfg_scale=1.0, likelihood=True, atol=1e-7, rtol=1e-7, seed=4)

    def model(x, t, y):
        assert len(y) == len(x)
        return gaussian_velocity(x, t.view(-1, 1, 1, 1))

    def run(indices):
        return sample(model, Transport(), config, torch.zeros(len(indices)), indices, shape=(3, 2, 2), null_label=None)

    made = run([0, 1, 2])
    density = torch.distributions.Normal(0.0, SPREAD).log_prob(made.latents).flatten(1).sum(1)
    close("log density", made.log_likelihood, density, atol=1e-4)
    close("another batch", run([2]).log_likelihood, made.log_likelihood[2:], atol=1e-4)
    assert made.nfe == 39 and not made.log_likelihood.requires_grad
    unasked = config.model_copy(update={"likelihood": False})
    made = sample(model, Transport(), unasked, torch.zeros(1), [0], shape=(3, 2, 2), null_label=None)
    assert made.log_likelihood is None


def test_solvers_refuse_what_they_do_not_know():
    with pytest.raises(ValueError, match=r"'eular' \(did you mean 'euler'\?\); known: euler.*dopri5"):
        sample_ode(Transport(), swirl, torch.ones(1, 2), method="eular")
    with pytest.raises(ValueError, match="unknown SDE method 'rk4'"):
        sample_sde(Transport(), swirl, torch.ones(1, 2), None, method="rk4")
    with pytest.raises(ValueError, match=r"unknown last step 'mean'.*Mean"):
        sample_sde(Transport(), swirl, torch.ones(1, 2), None, last_step="mean")
    with pytest.raises(ValueError, match="at least 2"):
        time_grid(0, 1, 1)
