"""Steps on static tensors: the loop's bits, one capture for each kind, no number of the host in what is captured."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from lightningdit import sampler
from lightningdit.config import ModelConfig, SampleConfig
from lightningdit.flow import Transport
from lightningdit.guidance import Guidance
from lightningdit.model import LightningDiT
from lightningdit.sampler import BatchSampler, sample, sample_noise
from lightningdit.solvers import OdeSteps, SdeSteps
from lightningdit.step_graphs import StepRunner
from tests.captured import Recording
from tests.golden import G, J, close
from tests.operator_costs import READS

NULL, SHAPE = 10, (4, 4, 4)
Y = torch.tensor([1, 5, 9])
#: An interval with both ends in it, so that steps of several kinds follow each other.
GUIDED = dict(num_sampling_steps=7, cfg_scale=3.0, cfg_interval_start=0.15, cfg_interval_end=0.6, seed=3)
SETTINGS = {
    "euler": {},
    "euler-linear": {"cfg_schedule": "linear"},
    "euler-first-channels": {"cfg_channels": 3, "cfg_schedule": "cosine"},
    "heun": {"sampling_method": "heun"},
    "heun3": {"sampling_method": "heun3"},
    "rk4": {"sampling_method": "rk4"},
    "sde": {"mode": "SDE"},
    "sde-heun": {"mode": "SDE", "sampling_method": "heun", "last_step": "Tweedie"},
    "sde-euler-last": {"mode": "SDE", "last_step": "Euler", "diffusion_form": "linear"},
    "sde-no-last": {"mode": "SDE", "last_step": None, "diffusion_form": "constant"},
    "unguided": {"cfg_scale": 1.0},
}


def golden_model(variant):
    model = LightningDiT(ModelConfig(**J("01_dit")["variants"][variant]), kernels.select("reference"))
    model.load_state_dict(G(f"01_dit_{variant}").group("param/"))
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model():
    return golden_model("a")


def weaker(x, t, y):
    return torch.tanh(x + t.view(-1, 1, 1, 1) - y.view(-1, 1, 1, 1) / 10)


def swaying(x, t, y):
    return torch.sin(3 * x + t.view(-1, 1, 1, 1)) * (1 + y.view(-1, 1, 1, 1)) + x.mean(1, keepdim=True)


def batch_sampler(model, config, guide=None, **options) -> BatchSampler:
    return BatchSampler(model, Transport(), config, shape=SHAPE, null_label=NULL, guide=guide, **options)


def captured(model, config, monkeypatch, guide=None) -> tuple[BatchSampler, Recording]:
    """A sampler in the mode that CUDA devices have, with a recording in the place of graphs, and nothing compiled."""
    recording = Recording()
    monkeypatch.setattr(sampler, "cuda_graphs", lambda: recording)
    monkeypatch.setattr(sampler, "compiled", lambda network, mode: network)
    monkeypatch.setattr(BatchSampler, "mode", lambda self, device: "cudagraphs")
    return batch_sampler(model, config, guide, compile="cudagraphs"), recording


@pytest.mark.parametrize(
    "name, guide", [*((name, None) for name in SETTINGS), *((name, weaker) for name in ("euler-linear", "heun", "sde"))]
)
def test_the_loops_bits(name, guide, model, monkeypatch):
    """Called, and replayed of a recording, for two batches; the second is smaller."""
    model = model if name in ("euler-linear", "sde-heun") else swaying
    config = SampleConfig(**GUIDED | SETTINGS[name])
    want = sample(model, Transport(), config, Y, [0, 1, 2], shape=SHAPE, null_label=NULL, guide=guide)
    called = batch_sampler(model, config, guide)(Y, [0, 1, 2])
    replayed, recording = captured(model, config, monkeypatch, guide)
    for made in (called, replayed(Y, [0, 1, 2])):
        assert torch.equal(made.latents, want.latents) and made.latents.dtype == torch.float32
        assert (made.nfe, made.guided_nfe) == (want.nfe, want.guided_nfe) != (0, 0)
    second = replayed(Y[[2, 0]], [2, 0])
    close("the second batch", second.latents, want.latents[[2, 0]], atol=2e-5)  # products round by a row's place
    steps = 6 + (config.mode == "SDE" and config.last_step is not None)
    assert sum(recording.replays) == 2 * steps and recording.captures == len(set(replayed._runner.kinds)) < steps


def test_kinds_of_steps(model):
    """Guided or not at each of their stages, and no other differences."""

    def kinds(solver, **settings):
        guidance = Guidance(3.0, NULL, **settings)
        return [(kind.guided, kind.last) for kind in StepRunner(solver, model, guidance).kinds]

    euler = kinds(OdeSteps(Transport(), "euler", 5), interval_start=0.25, interval_end=0.5)  # 0, .25, .5, .75
    assert euler == [((guided,), False) for guided in (False, True, True, False)]
    heun = kinds(OdeSteps(Transport(), "heun", 5), interval_start=0.25, interval_end=0.5)
    assert [guided for guided, _ in heun] == [(False, True), (True, True), (True, False), (False, False)]
    sde = kinds(SdeSteps(Transport(), "euler", 3))
    assert sde == [((True,), False), ((True,), False), ((True,), True)]


def test_a_larger_batch_is_captured_anew_and_a_smaller_one_is_not(model, monkeypatch):
    config = SampleConfig(**GUIDED)
    made, recording = captured(model, config, monkeypatch)
    rows = []
    for count in (2, 1, 3, 2):
        indices = list(range(count))
        got = made(Y[:count], indices)
        want = sample(model, Transport(), config, Y[:count], indices, shape=SHAPE, null_label=NULL)
        close("latents", got.latents, want.latents, atol=1e-5)
        rows.append((len(got.latents), recording.captures))
    assert rows == [(2, 2), (1, 2), (3, 4), (2, 4)]


def test_results_of_a_batch_outlive_the_next(model, monkeypatch):
    made, _ = captured(model, SampleConfig(**GUIDED), monkeypatch)
    first = made(Y, [0, 1, 2]).latents
    kept = first.clone()
    made(Y, [3, 4, 5])
    assert torch.equal(first, kept)


class Reads(TorchDispatchMode):
    """Operators that hand the host a value of a tensor."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in READS:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", [{}, {"sampling_method": "rk4"}, {"mode": "SDE"}])
def test_no_step_reads_a_value_of_the_device(settings, model, monkeypatch):
    made, _ = captured(model, SampleConfig(**GUIDED | settings), monkeypatch)
    with Reads() as reads:
        made(Y, [0, 1, 2])
    assert reads.found == []
    with Reads() as reads:
        Y.sum().item()
    assert reads.found, "a read is seen"


def test_the_state_is_float32_whatever_the_network_computes_in():
    """A thousand steps of a thousandth each: a state in bfloat16 would lose them in rounding."""
    seen = set()

    def network(x, t, y):
        seen.add(x.dtype)
        return torch.ones_like(x, dtype=torch.bfloat16)

    config = SampleConfig(num_sampling_steps=1001, timestep_shift=0.0, cfg_scale=1.0, precision="bfloat16")
    made = batch_sampler(network, config)(Y, [0, 1, 2])
    close("moved by one", made.latents - sample_noise(0, [0, 1, 2], SHAPE), torch.ones(3, *SHAPE), atol=1e-3)
    assert seen == {torch.float32} and made.latents.dtype == torch.float32


@pytest.mark.parametrize("settings", [{"sampling_method": "dopri5"}, {"likelihood": True, "cfg_scale": 1.0}])
def test_other_solves_are_the_samplers(settings, model):
    config = SampleConfig(**{**GUIDED, "num_sampling_steps": 3, **settings})
    want = sample(model, Transport(), config, Y, [0, 1, 2], shape=SHAPE, null_label=NULL)
    made = batch_sampler(model, config)(Y, [0, 1, 2])
    assert torch.equal(made.latents, want.latents) and (made.nfe, made.guided_nfe) == (want.nfe, want.guided_nfe)
    assert (
        made.log_likelihood is None
        if want.log_likelihood is None
        else torch.equal(made.log_likelihood, want.log_likelihood)
    )


def test_what_compile_comes_to(model):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    fixed, adaptive = SampleConfig(), SampleConfig(sampling_method="dopri5")
    found = [batch_sampler(model, c, compile="auto").mode(at) for c in (fixed, adaptive) for at in (cpu, cuda)]
    assert found == ["none", "cudagraphs", "none", "inductor"]
    assert batch_sampler(model, fixed, compile="inductor").mode(cpu) == "inductor"
    with pytest.raises(ValueError, match="the networks are on cpu; a CUDA device is needed"):
        batch_sampler(model, fixed, compile="cudagraphs")(Y, [0, 1, 2])
    with pytest.raises(ValueError, match="dopri5 chooses its steps as it goes"):
        batch_sampler(model, adaptive, compile="cudagraphs").mode(cuda)
    with pytest.raises(ValueError, match="2 indices for 3 labels"):
        batch_sampler(model, fixed)(Y, [0, 1])
