"""Paths, conversions, timesteps and losses against the recorded published transport and against calculus."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.func import grad, vmap

from lightningdit.config import TransportConfig
from lightningdit.flow import PATHS, Transport, logit_normal, standard_normal_logp
from tests.golden import G, J, close

DTYPES = {"": (torch.float32, 5e-6), "_f64": (torch.float64, 1e-11)}
FORMS = ("constant", "SBDM", "sigma", "linear", "decreasing", "inccreasing-decreasing")


@pytest.fixture(scope="module")
def recorded():
    return G("02_transport")


def loss_cases():
    keys = [k.split("/") for k in G("02_transport").keys() if k.startswith("loss/") and k.endswith("/loss")]
    return [tuple(parts[1:4]) for parts in keys]


@pytest.mark.parametrize("suffix", DTYPES)
@pytest.mark.parametrize("path, prediction, weight", loss_cases())
def test_losses(path, prediction, weight, suffix, recorded):
    """The recorded total adds the cosine term for velocity models only."""
    dtype, relmax = DTYPES[suffix]
    x0, x1, t, output = (recorded[f"in/{k}"].to(dtype) for k in ("x0", "x1", "t", "model_out"))
    output = output.clone().requires_grad_()
    seen = {}

    def model(x, t, y):
        seen.update(x=x, t=t, y=y)
        return output

    weight = None if weight == "none" else weight
    transport = Transport(path, prediction, weight, use_cosine_loss=prediction == "velocity")
    losses = transport.training_losses(model, x1, t=t, x0=x0, y="label")
    key = f"loss/{path}/{prediction}/{weight or 'none'}"
    close("xt", seen["x"], recorded[f"{key}/xt{suffix}"], relmax=relmax)
    assert torch.equal(seen["t"], t) and seen["y"] == "label" and losses["pred"] is output
    close("loss", losses["loss"], recorded[f"{key}/loss{suffix}"], relmax=relmax)
    total = losses["loss"].mean()
    if prediction == "velocity":
        close("ut", transport.interpolate(x0, x1, t)[1], recorded[f"{key}/ut{suffix}"], relmax=relmax)
        close("cos", losses["cos_loss"], recorded[f"{key}/cos_loss{suffix}"], relmax=relmax)
        total = total + losses["cos_loss"].mean()
    assert ("cos_loss" in losses) == (prediction == "velocity")
    close("total", total, recorded[f"{key}/total{suffix}"], relmax=relmax)
    total.backward()
    close("gradient", output.grad, recorded[f"{key}/grad_model_out{suffix}"], relmax=relmax)


@pytest.mark.parametrize("suffix", DTYPES)
@pytest.mark.parametrize("name", PATHS)
def test_paths(name, suffix, recorded):
    dtype, relmax = DTYPES[suffix]
    path, t = PATHS[name](), recorded[f"path/t_grid{suffix}"].to(dtype)
    transport, ones = Transport(name), torch.ones(len(t), 1, dtype=dtype)
    (alpha, d_alpha), (sigma, d_sigma) = path.alpha(t), path.sigma(t)
    drift, diffusion = path.drift(ones, t)
    got = dict(
        alpha=alpha,
        d_alpha=d_alpha,
        sigma=sigma,
        d_sigma=d_sigma,
        d_alpha_alpha_ratio=path.log_alpha_rate(t),
        drift_of_ones=drift.flatten(),
        diffusion_var=diffusion.flatten(),
    )
    for form in FORMS:
        got[f"diffusion_norm1.5/{form}"] = transport.diffusion(ones, t, form, 1.5).flatten()
    for key, value in got.items():
        close(key, value, recorded[f"path/{name}/{key}{suffix}"], relmax=relmax)


@pytest.mark.parametrize("suffix", DTYPES)
@pytest.mark.parametrize("name", PATHS)
def test_conversions(name, suffix, recorded):
    dtype, relmax = DTYPES[suffix]
    x0, x1, t, output = (recorded[f"in/{k}"].to(dtype) for k in ("x0", "x1", "t", "model_out"))
    transport = Transport(name)
    xt = transport.interpolate(x0, x1, t)[0]
    got = {
        k: getattr(transport, k)(output, xt, t)
        for k in ("score_from_velocity", "noise_from_velocity", "velocity_from_score")
    }
    for prediction in ("velocity", "noise", "score"):
        reader = Transport(name, prediction)
        got[f"ode_drift/{prediction}"] = reader.velocity(output, xt, t)
        got[f"score/{prediction}"] = reader.score(output, xt, t)
    for key, value in got.items():
        close(key, value, recorded[f"path/{name}/{key}{suffix}"], relmax=relmax)


@pytest.mark.parametrize("name", PATHS)
def test_derivatives_are_derivatives(name):
    path, t = PATHS[name](), torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    for curve in (path.alpha, path.sigma):
        close("rate", curve(t)[1], vmap(grad(lambda u, curve=curve: curve(u)[0]))(t), rtol=1e-10)
    close("log rate", path.log_alpha_rate(t), path.alpha(t)[1] / path.alpha(t)[0], rtol=1e-10)


@pytest.mark.parametrize("name", PATHS)
def test_conversions_undo_each_other(name):
    """A perfect network for one data point: every prediction names the same velocity, score and noise."""
    torch.manual_seed(0)
    x0, x1 = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64)
    t = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    transport = Transport(name)
    xt, velocity = transport.interpolate(x0, x1, t)
    score = -x0 / transport.path.sigma(t)[0].view(-1, 1, 1, 1)
    close("noise", transport.noise_from_velocity(velocity, xt, t), x0, atol=1e-9)
    close("score", transport.score_from_velocity(velocity, xt, t), score, atol=1e-9)
    close("velocity of score", Transport(name, "score").velocity(score, xt, t), velocity, atol=1e-9)
    close("velocity of noise", Transport(name, "noise").velocity(x0, xt, t), velocity, atol=1e-9)


@pytest.mark.parametrize("case", J("02_transport")["create_transport_eps"])
def test_default_eps(case):
    """As recorded, but for sampling as for training where the published default is missing (null, and then an error).

    Its 0 for velocity models stands for an eps that no interval of theirs uses: `test_training_interval` holds that.
    """
    path, prediction = case.split("/")
    train, sampling = J("02_transport")["create_transport_eps"][case]
    transport = Transport(path, prediction)
    if train != 0:
        assert transport.train_eps == train and transport.sample_eps == (sampling or train)
    else:
        assert sampling == 0 and transport.interval(transport.train_eps) == (0, 1)


@pytest.mark.parametrize("case", J("02_transport")["check_interval_train"])
def test_training_interval(case):
    path, prediction = case.split("/")
    transport = Transport(path, prediction)
    want = J("02_transport")["check_interval_train"][case]
    assert transport.interval(transport.train_eps) == pytest.approx(want)
    if isinstance(want := J("02_transport")["check_interval_eval_ode"][case], list):
        assert transport.interval(transport.sample_eps) == pytest.approx(want)


def test_sampling_interval_has_a_default_where_the_published_one_fails():
    for path, prediction in (("Linear", "noise"), ("GVP", "score"), ("VP", "velocity")):
        start, end = Transport(path, prediction).interval(Transport(path, prediction).sample_eps)
        assert 0 <= start < 0.01 and 0.99 < end < 1


def test_given_eps_is_kept():
    transport = Transport(train_eps=0.01, sample_eps=0.02)
    assert transport.interval(transport.sample_eps, sde=True) == pytest.approx((0.02, 0.98))
    assert transport.interval(transport.sample_eps, sde=True, form="sigma", last_step_size=0.04) == (0, 0.96)
    assert Transport("VP", train_eps=0.01).interval(0.01) == pytest.approx((0, 0.99))


def test_timesteps_are_the_published_function_of_normal_draws():
    g = G("02_transport_sampling")
    for mu in (0.0, -0.5):
        np.random.seed(0)
        normal = torch.from_numpy(np.random.normal(mu, 1.0, size=64))
        close("t", logit_normal(normal).float(), g[f"logit_normal/np_seed0_mu{mu:g}_sigma1_first64"], atol=1e-6)
    np.random.seed(5)
    close("t", logit_normal(torch.from_numpy(np.random.normal(size=5))), g["sample/lognorm/t"], atol=1e-6)
    torch.manual_seed(5)
    assert torch.equal(torch.randn_like(g["sample/x1"]), g["sample/x0"])
    state = torch.get_rng_state()
    close("uniform", Transport().sample_timesteps(5), g["sample/uniform/t"], atol=1e-7)
    torch.set_rng_state(state)
    noise_model = Transport(prediction="noise")
    close("uniform, noise model", noise_model.sample_timesteps(5), g["sample/noise_uniform/t"], atol=1e-6)


def test_logit_normal_distribution():
    want = J("02_transport")["logit_normal_1M"]
    t = Transport(use_lognorm=True).sample_timesteps(1_000_000, generator=torch.Generator().manual_seed(0))
    assert t.mean().item() == pytest.approx(want["mean"], abs=1e-3)
    assert t.var().item() == pytest.approx(want["var"], abs=5e-4)
    for q, value in want["quantiles"].items():
        assert np.quantile(t.numpy(), float(q)) == pytest.approx(value, abs=5e-3)
        assert want["analytic_quantiles"][q] == pytest.approx(1 / (1 + math.exp(-stats.norm.ppf(float(q)))), abs=1e-9)
    bins = torch.histc(t, 20, 0, 1) / len(t)
    close("histogram", bins, torch.tensor(want["hist_20_bins"]), atol=1e-3)


def test_draws_come_from_the_generator_alone():
    x1 = torch.randn(4, 2, 3, 3)

    def losses(seed):
        generator = torch.Generator().manual_seed(seed)
        return Transport(use_lognorm=True).training_losses(lambda x, t: x, x1, generator=generator)["loss"]

    before = torch.get_rng_state()
    first, again, other = losses(1), losses(1), losses(2)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_uniform_after_lognormal():
    transport = Transport(use_lognorm=True)
    generator = torch.Generator().manual_seed(3)
    t = transport.sample_timesteps(10_000, generator=generator, lognorm=False)
    assert stats.kstest(t.numpy(), "uniform").pvalue > 0.01


def test_prior_density(recorded):
    z = recorded["prior/z"]
    close("log density", standard_normal_logp(z), recorded["prior/logp"], rtol=1e-6)
    want = torch.distributions.Normal(0, 1).log_prob(z).flatten(1).sum(1)
    close("torch", standard_normal_logp(z), want, rtol=1e-6)


@pytest.mark.parametrize(
    "arguments, names",
    [
        (dict(path="linear"), "path_type.*Linear"),
        (dict(prediction="x0"), "prediction.*velocity"),
        (dict(loss_weight="velocity"), "loss_weight"),
        (dict(prediction="noise", use_cosine_loss=True), "use_cosine_loss"),
        (dict(train_eps=-1.0), "train_eps"),
    ],
)
def test_impossible_transports_are_refused(arguments, names):
    with pytest.raises(ValueError, match=f"(?s){names}"):
        Transport(**arguments)


def test_unknown_form_and_wrong_model_output():
    with pytest.raises(ValueError, match=r"'sigm' \(did you mean 'sigma'\?\).*SBDM"):
        Transport().diffusion(torch.ones(2, 1), torch.ones(2), "sigm")
    with pytest.raises(ValueError, match=r"\(2, 1, 2, 2\).*\(2, 4, 2, 2\)"):
        Transport().training_losses(lambda x, t: x[:, :1], torch.ones(2, 4, 2, 2))


def test_from_config():
    config = TransportConfig(path_type="VP", prediction="noise", loss_weight="likelihood", train_eps=0.01)
    transport = Transport.from_config(config)
    assert (transport.path_name, transport.prediction, transport.loss_weight) == ("VP", "noise", "likelihood")
    assert transport.train_eps == 0.01 and transport.sample_eps == 1e-5
