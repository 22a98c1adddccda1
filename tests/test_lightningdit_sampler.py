"""Solvers, guidance and noise against the recorded published samples, other solvers and closed forms."""

import math

import pytest
import torch
import torchdiffeq

import kernels
from lightningdit import sampler
from lightningdit.config import DIFFUSION_FORMS, ModelConfig, SampleConfig, paper_sample
from lightningdit.flow import Transport
from lightningdit.model import LightningDiT
from lightningdit.sampler import (
    Denoiser,
    Guidance,
    guide,
    initial_noise,
    log_likelihood,
    sample,
    sample_noise,
    sample_ode,
    sample_sde,
    time_grid,
)
from tests.golden import G, J, close

RECORDED = J("03_sampling")
ODE_TAGS = [tag for tag, value in RECORDED.items() if isinstance(value, dict) and "method" in value]
NULL = 10


@pytest.fixture(scope="module")
def golden():
    return G("03_sampling")


@pytest.fixture(scope="module")
def model():
    model = LightningDiT(ModelConfig(**J("01_dit")["variants"]["a"]), kernels.select("reference"))
    model.load_state_dict(G("01_dit_a").group("param/"))
    return model.eval().requires_grad_(False)


def run_recorded(model, golden, tag, dtype=torch.float32, observe=None):
    """(samples, denoiser) of a recorded ODE setting, guided without ever holding the second half of the batch."""
    setting, z, y = RECORDED[tag], golden["in/z"].to(dtype), golden["in/y"]
    guidance = None
    if setting["cfg"]:
        cfg = setting["cfg"]
        start = cfg["cfg_interval_start"] if cfg["cfg_interval"] else 0.0
        guidance = Guidance(cfg["cfg_scale"], NULL, start, channels=3)
    predict = Denoiser(model, y, guidance)
    x = sample_ode(Transport(), predict, z, method=setting["method"], steps=setting["num_steps"], observe=observe,
                   shift=setting["timestep_shift"], atol=setting["atol"], rtol=setting["rtol"])  # fmt: skip
    return x, predict


@pytest.mark.parametrize("tag", ODE_TAGS)
def test_ode(tag, model, golden):
    states = {}
    x, predict = run_recorded(model, golden, tag, observe=states.__setitem__)
    close(tag, x, golden[f"ode/{tag}/final"][:2], atol=2e-3 if "dopri5" in tag else 2e-5)
    assert predict.nfe == RECORDED[tag]["nfe"]
    assert torch.equal(states[RECORDED[tag]["n_grid"] - 1], x)
    if f"ode/{tag}/traj" in golden:
        for i, want in enumerate(golden[f"ode/{tag}/traj"][1:], start=1):
            close(f"point {i}", states[i], want[:2], atol=2e-5)


@pytest.mark.parametrize("tag", ODE_TAGS)
def test_ode_float64(tag, model, golden):
    x, _ = run_recorded(model.double(), golden, tag, torch.float64)
    model.float()
    close(tag, x, golden[f"ode/{tag}/final_f64"][:2], atol=2e-3 if "dopri5" in tag else 1e-6)


def test_double_batch_of_the_published_code(model, golden):
    """forward_with_cfg on the doubled state gives both halves as recorded."""
    for tag, interval in (("euler8_shift0.3_cfg4", None), ("euler8_shift0.3_cfg4_interval0.11", True)):
        z, y = golden["in/z"], golden["in/y"]
        labels = torch.cat([y, torch.full_like(y, NULL)])

        def predict(x, t, labels=labels, interval=interval):
            times = torch.full((len(x),), t)
            return model.forward_with_cfg(x, times, labels, 4.0, interval, 0.11, cfg_channels=3)

        x = sample_ode(Transport(), predict, torch.cat([z, z]), steps=8, shift=0.3)
        close(tag, x, golden[f"ode/{tag}/final"], atol=2e-5)


def test_time_grids(golden):
    for points, shift in ((250, 0.0), (250, 0.3), (50, 0.3)):
        close("grid", time_grid(0, 1, points, shift), golden[f"grid/{points}_shift{shift}"], atol=1e-7)
    for tag in ODE_TAGS:
        setting = RECORDED[tag]
        grid = time_grid(0, 1, setting["num_steps"], setting["timestep_shift"])
        assert torch.equal(grid, golden[f"ode/{tag}/t_grid"])
    for path, prediction in (("GVP", "noise"), ("GVP", "score"), ("GVP", "velocity")):
        transport = Transport(path, prediction, sample_eps=1e-3)
        grid = time_grid(*transport.interval(transport.sample_eps), 8)
        close(prediction, grid, golden[f"ode_other/{path}/{prediction}/t_grid"], atol=1e-7)
    for last_step, size in (("Mean0.04", 0.04), ("None", 0.0)):
        start, end = Transport(sample_eps=0.0).interval(0.0, sde=True, form="sigma", last_step_size=size)
        close(last_step, time_grid(start, end, 8), golden[f"sde/grid/sigma_{last_step}"], atol=1e-7)


@pytest.mark.parametrize("tag", [tag for tag in ODE_TAGS if "dopri5" not in tag])
def test_evaluation_times(tag, golden):
    times = []

    def predict(x, t):
        times.append(t)
        return x

    setting = RECORDED[tag]
    method, shift = setting["method"], setting["timestep_shift"]
    sample_ode(Transport(), predict, torch.ones(1, 1), method=method, steps=8, shift=shift)
    close("times", torch.tensor(times), golden[f"ode/{tag}/t_evals"], atol=1e-6)


@pytest.mark.parametrize("case", RECORDED["ode_other"])
def test_other_paths_and_predictions(case, model, golden):
    """Three have their tensors recorded, all have their statistics."""
    path, prediction = case.split("/")
    want, y = RECORDED["ode_other"][case], golden["in/y"]
    transport = Transport(path, prediction, train_eps=want["train_eps"], sample_eps=want["sample_eps"])
    assert transport.interval(transport.sample_eps) == pytest.approx((want["t0"], want["t1"]), abs=1e-7)
    x = sample_ode(transport, Denoiser(model, y), golden["in/z"], steps=8)
    if f"ode_other/{case}/final" in golden:
        close(case, x, golden[f"ode_other/{case}/final"], relmax=1e-4)
    for key, value in dict(mean=x.mean(), std=x.std(), norm=x.norm(), min=x.min(), max=x.max()).items():
        # Recorded spreads are of the population; n is 128.
        got = float(value) * (math.sqrt(127 / 128) if key == "std" else 1)
        reference = want["final"][key]
        assert got == pytest.approx(reference, rel=5e-3 if key == "std" else 2e-4, abs=1e-4 * want["final"]["std"]), key


@pytest.mark.parametrize("tag", RECORDED["sde"])
def test_sde(tag, model, golden):
    want, states = RECORDED["sde"][tag], {}
    predict = Denoiser(model, golden["in/y"])
    x = sample_sde(
        Transport(sample_eps=0.0), predict, golden["in/z"], lambda k: golden["sde/noise"][k - 1],
        method=want["sampling_method"].lower(), steps=8, form=want["diffusion_form"], norm=want["diffusion_norm"],
        last_step=want["last_step"], last_step_size=want["last_step_size"], observe=states.__setitem__,
    )  # fmt: skip
    close("before", states[7], golden[f"sde/{tag}/before_last_step"], atol=2e-5)
    close("final", x, golden[f"sde/{tag}/final"], atol=2e-5)


def test_unconditional_half_is_skipped_below_the_interval(model, golden):
    rows = []
    tag = "euler8_shift0.3_cfg4_interval0.11"

    def counting(x, t, y):
        rows.append(len(x))
        return model(x, t, y)

    _, predict = run_recorded(counting, golden, tag)
    below = int((golden[f"ode/{tag}/t_grid"][:-1] < 0.11).sum())
    assert rows == [2] * below + [4] * (7 - below) and below == 3
    assert (predict.nfe, predict.guided_nfe) == (7, 4)


@pytest.mark.parametrize("start", ["0.10", "0.11", "0.125"])
def test_evaluations_saved_by_the_published_settings(start):
    guidance, recorded = Guidance(10.0, NULL, float(start)), RECORDED["production_250_shift0.3"]
    grid = time_grid(0, 1, 250, 0.3).tolist()[:-1]
    assert len(grid) == recorded["n_model_evals"]
    assert sum(not guidance.on(t) for t in grid) == recorded[f"evals_below_{start}"]


def test_interval_start_itself_is_guided():
    assert Guidance(2.0, NULL, 0.11).on(torch.tensor(0.11).item())
    assert not Guidance(2.0, NULL, 0.11).on(math.nextafter(torch.tensor(0.11).item(), 0))
    assert not Guidance(1.0, NULL).on(0.5)


def test_guided_channels():
    cond, uncond = torch.randn(2, 2, 5, 3, 3)
    got = guide(cond, uncond, 3.0, 2)
    assert torch.equal(got[:, 2:], cond[:, 2:])
    close("guided", got[:, :2], 3 * cond[:, :2] - 2 * uncond[:, :2], atol=1e-5)
    close("all", guide(cond, uncond, 3.0, None), 3 * cond - 2 * uncond, atol=1e-5)
    assert torch.equal(guide(cond, uncond, 3.0, 32), guide(cond, uncond, 3.0, None))
    assert paper_sample(SampleConfig()).cfg_channels == 3
    assert paper_sample(SampleConfig(cfg_channels=4)).cfg_channels == 4


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
    exact = torchdiffeq.odeint(lambda t, x: swirl(x, float(t)), z, torch.tensor([0.0, 1.0]).double(), method="dopri8",
                               rtol=1e-12, atol=1e-12)[-1]  # fmt: skip
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


JUMPS = [Guidance(scale, 1, start, channels) for scale, start, channels in
         [(10.0, 0.3, None), (4.0, 0.125, 2), (10.0, 0.11, 3), (4.0, 1e-7, None), (4.0, 3 / 7, None), (4.0, 0.999, 1),
          (6.0, 0.0, None), (6.0, 1.0, None), (1.0, 0.3, None)]]  # fmt: skip


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
    x = sample_ode(Transport(), predict, z, method="dopri5", steps=8, observe=states.__setitem__)
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
    x = sample_sde(transport, gaussian_velocity, z, lambda k: torch.randn(z.shape, dtype=z.dtype, generator=g),
                   method=method, steps=150, form=form, norm=0.3, last_step=last, last_step_size=0.01)  # fmt: skip
    assert float(x.std()) == pytest.approx(SPREAD, rel=0.05)
    assert abs(float(x.mean())) < 0.03


def test_tweedie_is_the_posterior_mean():
    """With all of time left to the last step, it returns E[x1 | x_t] of Gaussian data."""
    z = torch.tensor([[1.0], [-2.0]], dtype=torch.float64)
    x = sample_sde(Transport(sample_eps=0.0), gaussian_velocity, z, lambda k: torch.zeros_like(z), steps=2,
                   form="sigma", norm=1e-12, last_step="Tweedie", last_step_size=0.5)  # fmt: skip
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
        return sample(model, Transport(), config, torch.zeros(len(indices)), indices, shape=(3, 2, 2), null_label=NULL)

    made = run([0, 1, 2])
    density = torch.distributions.Normal(0.0, SPREAD).log_prob(made.latents).flatten(1).sum(1)
    close("log density", made.log_likelihood, density, atol=1e-4)
    close("another batch", run([2]).log_likelihood, made.log_likelihood[2:], atol=1e-4)
    assert made.nfe == 39 and not made.log_likelihood.requires_grad
    unasked = config.model_copy(update={"likelihood": False})
    made = sample(model, Transport(), unasked, torch.zeros(1), [0], shape=(3, 2, 2), null_label=NULL)
    assert made.log_likelihood is None


def test_likelihood_of_a_network_is_of_the_sample_alone(model):
    """Each sample has signs of its own, so that its estimate does not depend on its neighbours."""
    config = SampleConfig(num_sampling_steps=3, cfg_scale=1.0, likelihood=True, seed=4)
    labels = torch.tensor([1, 5])

    def run(indices):
        made = sample(model, Transport(), config, labels[indices], indices, shape=(4, 4, 4), null_label=NULL)
        return made.log_likelihood

    close("alone", torch.cat([run([0]), run([1])]), run([0, 1]), rtol=2e-3)


def test_noise_depends_on_seed_index_and_draw_alone():
    rows = initial_noise(7, [3, 0, 12], (4, 2, 2))
    for row, index in zip(rows, (3, 0, 12), strict=True):
        assert torch.equal(row, initial_noise(7, [index], (4, 2, 2))[0])
    different = [rows[0], rows[1], initial_noise(8, [3], (4, 2, 2))[0], sample_noise(7, [3], (4, 2, 2), draw=1)[0]]
    assert len({tuple(z.flatten().tolist()) for z in different}) == 4
    many = initial_noise(0, range(2000), (8,))
    assert abs(float(many.mean())) < 0.03 and float(many.std()) == pytest.approx(1, abs=0.03)


WIDE = (4, 16, 16)  # 1,024 numbers: independent ones correlate by 0.03 at random


def nothing(x, t, y):
    return torch.zeros_like(x)


def require_independent(streams: dict[str, torch.Tensor]) -> None:
    """Each of unit spread, no two of them alike, nor alike but for signs."""
    rows = torch.stack([row.flatten().double() for row in streams.values()])
    assert ((rows.std(1) - 1).abs() < 0.12).all(), rows.std(1)
    for of in (rows, rows.sign(), rows.abs()):
        table = torch.corrcoef(of).nan_to_num(0.0)  # of a constant: the magnitude of signs
        alike = (table - torch.diag(table.diagonal())).abs() > 0.15
        names = list(streams)
        assert not alike.any(), [(names[i], names[j]) for i, j in alike.nonzero().tolist() if i < j]


def test_every_seed_index_and_draw_has_a_stream_of_its_own():
    places = [(seed, index, draw) for seed in (0, 1, 2) for index in (0, 1, 2, 1000) for draw in (0, 1, 2, 3)]
    require_independent({str(p): sample_noise(p[0], [p[1]], WIDE, draw=p[2])[0] for p in places})


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_every_step_of_the_sde_has_noise_of_its_own(method):
    """Recovered from the states: under a network of nothing the drift is known."""
    config = SampleConfig(mode="SDE", sampling_method=method, num_sampling_steps=6, cfg_scale=1.0, last_step=None,
                          diffusion_form="constant", timestep_shift=0.0, seed=5)  # fmt: skip
    transport, states = Transport(), {0: initial_noise(5, [0, 3], WIDE)}
    sample(nothing, transport, config, torch.zeros(2), [0, 3], shape=WIDE, null_label=None, observe=states.__setitem__)
    times = time_grid(*transport.interval(transport.sample_eps, sde=True, form="constant"), 6).tolist()

    def drift(x, t):  # dx = score · dt + sqrt(2) dw, where the score is -x / (1 - t) at no velocity
        return -x / (1 - t)

    streams = {f"start of {i}": states[0][i] for i in (0, 1)}
    for k in range(1, 6):
        t, after, x = times[k - 1], times[k], states[k - 1]
        dt = after - t
        if method == "euler":
            noise = states[k] - x - drift(x, t) * dt
        else:  # x' + dt / 2 · (f(x', t) + f(x' + dt f(x', t), t')) is linear in x', the state after the noise
            one = torch.ones(())
            factor = 1 + dt / 2 * (drift(one, t) + drift(one + dt * drift(one, t), after))
            noise = states[k] / factor - x
        streams |= {f"step {k} of {i}": noise[i] / (2 * dt) ** 0.5 for i in (0, 1)}
    require_independent(streams)


def test_probes_of_the_likelihood_are_signs_of_their_own(monkeypatch):
    """Independent of the noise that the sample starts from, and of other samples'; the same in any batch."""
    seen = []

    def probed(transport, predict, x, probe, **tolerances):
        seen.append(probe)
        return torch.zeros(len(x)), x

    monkeypatch.setattr(sampler, "log_likelihood", probed)
    config = SampleConfig(num_sampling_steps=2, cfg_scale=1.0, likelihood=True, seed=6)
    for indices in ([0, 7], [7]):
        sample(nothing, Transport(), config, torch.zeros(len(indices)), indices, shape=WIDE, null_label=None)
    whole, alone = seen
    assert (whole.abs() == 1).all() and torch.equal(whole[1], alone[0])
    noise = initial_noise(6, [0, 7], WIDE)
    require_independent({f"probe {i}": whole[i] for i in (0, 1)} | {f"start {i}": noise[i] for i in (0, 1)})


@pytest.mark.parametrize("mode", ["ODE", "SDE"])
def test_batching_does_not_change_samples(mode, model):
    config = SampleConfig(mode=mode, num_sampling_steps=5, seed=3, cfg_scale=2.0)
    labels = torch.tensor([1, 5, 9, 2])

    def run(indices):
        return sample(model, Transport(), config, labels[indices], indices, shape=(4, 4, 4), null_label=NULL)

    whole = run([0, 1, 2, 3])
    parts = torch.cat([run([0]).latents, run([3, 1]).latents.flip(0), run([2]).latents])[[0, 1, 3, 2]]
    close("batches", parts, whole.latents, atol=1e-5)
    assert whole.nfe >= 4 and 0 < whole.guided_nfe <= whole.nfe and not whole.latents.requires_grad


def test_sample_refuses_what_cannot_be(model):
    config = SampleConfig(num_sampling_steps=2)
    with pytest.raises(ValueError, match=r"cfg_scale 4.0 needs a null label"):
        sample(model, Transport(), config, torch.tensor([0]), [0], shape=(4, 4, 4), null_label=None)
    with pytest.raises(ValueError, match="2 indices for 1 labels"):
        sample(model, Transport(), config, torch.tensor([0]), [0, 1], shape=(4, 4, 4), null_label=NULL)
    with pytest.raises(ValueError, match=r"'eular' \(did you mean 'euler'\?\); known: euler.*dopri5"):
        sample_ode(Transport(), swirl, torch.ones(1, 2), method="eular")
    with pytest.raises(ValueError, match="unknown SDE method 'rk4'"):
        sample_sde(Transport(), swirl, torch.ones(1, 2), None, method="rk4")
    with pytest.raises(ValueError, match=r"unknown last step 'mean'.*Mean"):
        sample_sde(Transport(), swirl, torch.ones(1, 2), None, last_step="mean")
    with pytest.raises(ValueError, match="at least 2"):
        time_grid(0, 1, 1)
    with pytest.raises(ValueError, match="needs labels"):
        Denoiser(model, None, Guidance(2.0, NULL))
