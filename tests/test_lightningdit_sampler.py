"""Sampling against the recorded published samples; which evaluations are guided; noise of each sample its own."""

import math

import pytest
import torch

import kernels
from lightningdit import sampler
from lightningdit.config import ModelConfig, SampleConfig, paper_sample
from lightningdit.flow import Transport
from lightningdit.guidance import Denoiser, Guidance, apply_guidance
from lightningdit.model import LightningDiT
from lightningdit.sampler import BatchSampler, sample, sample_noise
from lightningdit.solvers import sample_ode, sample_sde, time_grid
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


def run_recorded(model, golden, tag, dtype=torch.float32, callback=None):
    """(samples, denoiser) of a recorded ODE setting, guided without ever holding the second half of the batch."""
    setting, z, y = RECORDED[tag], golden["in/z"].to(dtype), golden["in/y"]
    guidance = None
    if setting["cfg"]:
        cfg = setting["cfg"]
        start = cfg["cfg_interval_start"] if cfg["cfg_interval"] else 0.0
        guidance = Guidance(cfg["cfg_scale"], NULL, start, channels=3)
    predict = Denoiser(model, y, guidance)
    x = sample_ode(
        Transport(),
        predict,
        z,
        method=setting["method"],
        steps=setting["num_steps"],
        callback=callback,
        shift=setting["timestep_shift"],
        atol=setting["atol"],
        rtol=setting["rtol"],
    )
    return x, predict


@pytest.mark.parametrize("tag", ODE_TAGS)
def test_ode(tag, model, golden):
    states = {}
    x, predict = run_recorded(model, golden, tag, callback=states.__setitem__)
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
        Transport(sample_eps=0.0),
        predict,
        golden["in/z"],
        lambda k: golden["sde/noise"][k - 1],
        method=want["sampling_method"].lower(),
        steps=8,
        form=want["diffusion_form"],
        norm=want["diffusion_norm"],
        last_step=want["last_step"],
        last_step_size=want["last_step_size"],
        callback=states.__setitem__,
    )
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
    assert sum(not guidance.applies(t) for t in grid) == recorded[f"evals_below_{start}"]


def test_interval_start_itself_is_guided():
    assert Guidance(2.0, NULL, 0.11).applies(torch.tensor(0.11).item())
    assert not Guidance(2.0, NULL, 0.11).applies(math.nextafter(torch.tensor(0.11).item(), 0))
    assert not Guidance(1.0, NULL).applies(0.5)


def test_guided_channels():
    cond, uncond = torch.randn(2, 2, 5, 3, 3)
    got = apply_guidance(cond, uncond, 3.0, 2)
    assert torch.equal(got[:, 2:], cond[:, 2:])
    close("guided", got[:, :2], 3 * cond[:, :2] - 2 * uncond[:, :2], atol=1e-5)
    close("all", apply_guidance(cond, uncond, 3.0, None), 3 * cond - 2 * uncond, atol=1e-5)
    assert torch.equal(apply_guidance(cond, uncond, 3.0, 32), apply_guidance(cond, uncond, 3.0, None))
    assert paper_sample(SampleConfig()).cfg_channels == 3
    assert paper_sample(SampleConfig(cfg_channels=4)).cfg_channels == 4


def test_likelihood_of_a_network_is_of_the_sample_alone(model):
    """Each sample has signs of its own, so that its estimate does not depend on its neighbours."""
    config = SampleConfig(num_sampling_steps=3, cfg_scale=1.0, likelihood=True, seed=4)
    labels = torch.tensor([1, 5])

    def run(indices):
        made = sample(model, Transport(), config, labels[indices], indices, shape=(4, 4, 4), null_label=NULL)
        return made.log_likelihood

    close("alone", torch.cat([run([0]), run([1])]), run([0, 1]), rtol=2e-3)


def test_noise_depends_on_seed_index_and_draw_alone():
    rows = sample_noise(7, [3, 0, 12], (4, 2, 2))
    for row, index in zip(rows, (3, 0, 12), strict=True):
        assert torch.equal(row, sample_noise(7, [index], (4, 2, 2))[0])
    different = [rows[0], rows[1], sample_noise(8, [3], (4, 2, 2))[0], sample_noise(7, [3], (4, 2, 2), draw=1)[0]]
    assert len({tuple(z.flatten().tolist()) for z in different}) == 4
    many = sample_noise(0, range(2000), (8,))
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
    config = SampleConfig(
        mode="SDE",
        sampling_method=method,
        num_sampling_steps=6,
        cfg_scale=1.0,
        last_step=None,
        diffusion_form="constant",
        timestep_shift=0.0,
        seed=5,
    )
    transport, states = Transport(), {0: sample_noise(5, [0, 3], WIDE)}
    sample(nothing, transport, config, torch.zeros(2), [0, 3], shape=WIDE, null_label=None, callback=states.__setitem__)
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
    noise = sample_noise(6, [0, 7], WIDE)
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
    with pytest.raises(ValueError, match="needs labels"):
        Denoiser(model, None, Guidance(2.0, NULL))


class Averages:
    """Exact average velocities of a flow that scales: x at time s is x at t times (1 + 2·s) / (1 + 2·t)."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, *, y, r):
        self.calls.append((t.tolist(), r.tolist()))
        scale = ((1 + 2 * r) / (1 + 2 * t) - 1) / (r - t)
        return scale.view(-1, 1, 1, 1) * x


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("batches", [False, True])
def test_average_velocities_go_to_the_end_in_as_many_evaluations_as_steps(steps, batches):
    """To the same place, whatever their number, if the averages are exact (arXiv 2505.13447, eq. 12)."""
    network, config = Averages(), SampleConfig(mode="meanflow", mean_steps=steps, seed=3)
    y, options = torch.tensor([0, 1]), {"shape": (4, 2, 2), "null_label": 3}
    if batches:
        made = BatchSampler(network, Transport(), config, **options)(y, [5, 6])
    else:
        made = sample(network, Transport(), config, y, [5, 6], **options)
    torch.testing.assert_close(made.latents, 3 * sample_noise(3, [5, 6], (4, 2, 2)))
    assert (made.nfe, made.guided_nfe) == (steps, 0) and len(network.calls) == steps
    starts, ends = ([pairs[k][0] for pairs in network.calls] for k in (0, 1))
    assert starts == pytest.approx([i / steps for i in range(steps)]) and ends == pytest.approx([*starts[1:], 1.0])


def test_mode_meanflow_and_what_is_said_of_it():
    config = SampleConfig(mode="meanflow")
    assert (config.mean_steps, config.cfg_scale, config.solver()) == (1, 1.0, "meanflow, 1 step")
    assert SampleConfig(mode="meanflow", mean_steps=2).solver() == "meanflow, 2 steps"
    assert SampleConfig().solver() == "ODE euler, 250 points, shift 0.3"
    assert "mean_steps" not in SampleConfig().stated() and config.over({"mean_steps": 4}).mean_steps == 4
    with pytest.raises(
        ValueError, match="cfg_scale is 2, but mode meanflow has its guidance from training; allowed: 1"
    ):
        SampleConfig(mode="meanflow", cfg_scale=2)
    (note,) = SampleConfig(mean_steps=2).without_effect()
    assert note == "sample.mean_steps is 2, but sample.mode is ODE, not meanflow"
