"""The bench of whole steps, on a CPU: that everybody trains the same network, and the arithmetic of its rows."""

import json
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from bench import step as bench_step
from bench.measure.breakdown import Interval, breakdown, kind_of, longest
from bench.measure.rows import Log, read
from bench.measure.timing import HostDevice
from bench.pages.comparison_tables import steps as table_of_steps
from bench.pages.measured import Measured
from bench.step import StepComparison, StepJob, jobs, wrong_losses
from bench.triage.records import compare_steps
from bench.triage.rehearsal import TINY
from bench.workloads import backends
from bench.workloads.plain import PlainLightningDiT
from bench.workloads.training import (
    BETAS,
    EMA_DECAY,
    EPS,
    LR,
    BareStep,
    Inputs,
    MeanInputs,
    PlainStep,
    flops_per_step,
    make_network,
    seeded,
)
from bench.workloads.variants import TRAINING, TrainingVariant
from kernels import OPS, select
from kernels.forward_mode import Dual
from lightningdit.cost import flops_per_image
from lightningdit.model import LightningDiT
from tests.golden import close, close_grads
from vavae.config import AutoencoderConfig
from vavae.model import AutoencoderKL

ROOT = Path(__file__).parents[1]
BARE = TrainingVariant("bare", "bare", kernels="reference", compile="none")
PLAIN = TrainingVariant("plain-eager", "plain", compile="none")
PAIRS = TINY.model_copy(update={"time_pairs": True})
MEANFLOW = replace(TRAINING["meanflow"], kernels="reference", compile="none")
PLAIN_MEANFLOW = TRAINING["plain-meanflow"]


def test_the_plain_peer_is_our_network():
    """In float32: outputs and the gradients of every weight."""
    ours = make_network(TINY, select("reference"), "cpu")
    plain = PlainLightningDiT(make_network(TINY, select("reference"), "cpu"), autocast=None)
    x1, _, t, y = Inputs(TINY, 3, "cpu").sets[0]
    got, want = plain(x1, t, y), ours(x1, t, y)
    close("output", got, want.detach(), atol=1e-5)
    for result in (got, want):
        result.square().mean().backward()
    theirs, mine = ({n: p.grad for n, p in net.named_parameters() if p.requires_grad} for net in (plain.network, ours))
    close_grads("plain", theirs, mine)


def test_the_plain_peer_refuses_what_it_is_not():
    config = TINY.model_copy(update={"use_qknorm": True})
    with pytest.raises(ValueError, match="no QK norm"):
        PlainLightningDiT(make_network(config, select("reference"), "cpu"))


def test_both_engines_take_the_steps_of_torch_adamw():
    """bfloat16 products, so the losses agree to its 8 bits; and they fall."""
    bare, plain = BareStep(BARE, TINY, 8, "cpu"), PlainStep(PLAIN, TINY, 8, "cpu")
    pairs = [(float(bare()), float(plain())) for _ in range(4)]
    assert all(a == pytest.approx(b, rel=0.02) for a, b in pairs)
    assert float(bare.optimizer.norm) == pytest.approx(float(plain.norm), rel=0.1)


def test_the_bare_engine_against_torch_adamw():
    """One step in float32 arithmetic of its own gradient: weights, average and the bfloat16 copy."""
    step = BareStep(BARE, TINY, 4, "cpu")
    flat = step.optimizer
    before, gradients, update = flat.master.clone(), [], flat.ops.adamw_ema_

    def recorded(param, grad, *states, **numbers):
        gradients.append(grad.float())
        update(param, grad, *states, **numbers)

    flat.ops = SimpleNamespace(adamw_ema_=recorded)
    step()
    weights = torch.nn.Parameter(before.clone())
    (weights.grad,) = gradients
    torch.optim.AdamW([weights], lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0).step()
    close("weights", flat.master, weights.detach(), atol=1e-6)
    close("average", flat.states[2], EMA_DECAY * before + (1 - EMA_DECAY) * weights.detach(), atol=1e-6)
    assert torch.equal(flat.copy, flat.master.bfloat16())
    assert flat.parameters[0].untyped_storage().data_ptr() == flat.copy.untyped_storage().data_ptr()


def test_networks_are_made_on_their_device(monkeypatch):
    """From the same seed, and nothing else is drawn from it: the device's generator goes on as it was."""
    told = []

    @contextmanager
    def forked(devices):
        told.append(devices)
        yield

    monkeypatch.setattr(torch.random, "fork_rng", forked)
    monkeypatch.setattr(torch, "manual_seed", told.append)
    with FakeTensorMode(), seeded("cuda"):
        assert torch.empty(1).device.type == "cuda"
    assert told == [[torch.device("cuda")], 0] and torch.empty(1).device.type == "cpu"
    monkeypatch.undo()
    before = torch.get_rng_state()
    first, second = (make_network(TINY, select("reference"), "cpu").state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(value.any() for name, value in first.items() if "pos_embed" not in name and "freqs" not in name)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LightningDiT(TINY, select("reference")),
        lambda: LightningDiT(TINY.model_copy(update={"use_rmsnorm": False, "use_swiglu": False}), select("reference")),
        lambda: AutoencoderKL(
            AutoencoderConfig(ch=32, ch_mult=(1, 1), attn_resolutions=(16,), resolution=16), select("reference")
        ),
    ],
)
def test_models_can_be_made_on_a_device(make):
    """On one that is only made up, whose tensors do not mix with a CPU's."""
    with FakeTensorMode(), torch.device("cuda"):
        model = make()
    assert {p.device.type for p in model.parameters() if p.requires_grad} == {"cuda"}, "tables may be moved there"


def bench(path=None, **settings) -> StepComparison:
    return StepComparison(HostDevice(), Log("cpu", path), None, seconds=0.01, rounds=2, **settings)


def test_rows_of_a_job(tmp_path, capsys):
    job = StepJob("tiny", TINY, 4, (BARE, PLAIN))
    rows = bench(tmp_path / "rows.jsonl").run(job)
    written = list(read(tmp_path / "rows.jsonl", "cpu"))
    assert [row["variant"] for row in written] == ["bare", "plain-eager"] and written[0]["device"] == "cpu"
    assert written == json.loads(json.dumps(rows))
    first = rows[0]
    assert first["images_per_second"] == pytest.approx(4 / (first["p50_ms"] / 1e3))
    hours = 64 * 1_281_167 / (8 * first["images_per_second"]) / 3600
    assert first["extrapolated"]["hours"] == pytest.approx(hours)
    assert first["times_faster_than"]["plain-eager"] == pytest.approx(rows[1]["p50_ms"] / first["p50_ms"])
    assert first["mfu"] is None and first["peak_gb"] is None, "a CPU's rows claim no part of a GPU"
    assert first["coverage"] == {"rounds": 2, "of": 2, "interleaved": False, "cut_off": None}
    assert first["loss"] == pytest.approx(rows[1]["loss"], rel=0.02)
    assert first["seconds_to_first_step"] > first["p20_ms"] / 1e3, "it has made the model too"
    assert "extrapolated" in bench().text(first) and "images/s" in capsys.readouterr().out


def test_what_cannot_run_is_recorded_and_the_rest_goes_on():
    def make(variant, *arguments):
        if variant.engine == "trainer":
            raise ModuleNotFoundError("No module named 'deepspeed'")
        if variant.name == "bare-eager":
            raise RuntimeError("out of memory")
        return PlainStep(PLAIN, *arguments)

    variants = (TRAINING["trainer"], TRAINING["bare-eager"], PLAIN)
    rows = {row["variant"]: row for row in bench(make=make).run(StepJob("tiny", TINY, 2, variants))}
    assert {name: row["status"] for name, row in rows.items()} == {
        "trainer": "unavailable",
        "bare-eager": "failed",
        "plain-eager": "ok",
    }
    assert "deepspeed" in rows["trainer"]["reason"]
    assert rows["bare-eager"]["reason"] == "OutOfMemoryError: out of memory"


def test_one_variant_is_held_at_a_time():
    """A step that has something to close is closed when it has been timed, and when it fails."""
    held, most = set(), []

    class Step:
        def __init__(self, variant, *arguments):
            self.name, self.fails = variant.name, variant.name == "bare-eager"
            held.add(self.name)
            most.append(len(held))

        def __call__(self):
            if self.fails:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return torch.ones(())

        def close(self):
            held.remove(self.name)

    variants = (TRAINING["trainer"], TRAINING["bare-eager"], PLAIN, TRAINING["bare"])
    rows = bench(make=Step).run(StepJob("tiny", TINY, 2, variants))
    assert [row["status"] for row in rows].count("ok") == 3 and most == [1] * 4 and not held


def test_another_loss_is_incorrect_and_not_timed():
    losses = {"plain-eager": 2.0, "bare": 2.03, "bare-eager": 2.05, "trainer": None}
    assert wrong_losses(losses).keys() == {"bare-eager"}
    assert wrong_losses({"plain-eager": 2.0, "bare": float("nan")}).keys() == {"bare"}
    assert wrong_losses({"bare": 7.0}) == {}, "nobody to compare with"

    def make(variant, *arguments):
        step = PlainStep(PLAIN, *arguments)
        return (lambda: step() * 1.1) if variant.name == "bare" else step

    rows = bench(make=make).run(StepJob("tiny", TINY, 2, (TRAINING["bare"], PLAIN)))
    assert {row["variant"]: row["status"] for row in rows} == {"bare": "incorrect", "plain-eager": "ok"}


def test_jobs_of_a_run():
    assert [job.batch for job in jobs(["LightningDiT-XL/1"], [], ["bare"])] == [128, 64]
    assert [str(job) for job in jobs(["LightningDiT-XL/1"], [32], ["bare"])] == ["LightningDiT-XL/1 batch 32"]


# MeanFlow


def duals(count: int = 3) -> tuple:
    """Latents and times with tangents, labels, and second times."""
    x1, x0, (t, r), y = MeanInputs(PAIRS, count, "cpu").sets[0]
    return Dual(x1, x0), Dual(t, torch.ones_like(t)), y, r


def test_the_plain_peer_has_the_tangents_of_our_network():
    """In float32: outputs, tangents, and the gradients of every weight, which go through outputs alone."""
    ours = make_network(PAIRS, select("reference"), "cpu")
    plain = PlainLightningDiT(make_network(PAIRS, select("reference"), "cpu"), autocast=None)
    x, t, y, r = duals()
    got, want = plain(x, t, y, r), ours(x, t, y, r)
    assert got.value.requires_grad and not got.tangent.requires_grad
    for name, found, wanted in zip(("output", "tangent"), got, want, strict=True):
        close(name, found, wanted.detach(), atol=1e-5)
    close("output without tangents", plain(x.value, t.value, y, r), want.value.detach(), atol=1e-5)
    for result in (got, want):
        result.value.square().mean().backward()
    theirs, mine = ({n: p.grad for n, p in net.named_parameters() if p.requires_grad} for net in (plain.network, ours))
    assert theirs["r_embedder.mlp.0.weight"].any()
    close_grads("plain", theirs, mine)


def test_only_attention_with_tangents_is_written_out():
    seen: set[str] = set()

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(func._schema.name)
            return func(*args, **kwargs or {})

    plain = PlainLightningDiT(make_network(PAIRS, select("reference"), "cpu"), autocast=None)
    x, t, y, r = duals()
    fused = []
    for given in ((x, t), (x.value, t.value)):
        seen.clear()
        with Names():
            plain(*given, y, r)
        fused.append(any("scaled_dot_product" in name for name in seen))
    assert fused == [False, True]


@pytest.mark.parametrize("compile", ["none", "aot_eager"])
def test_both_engines_take_the_steps_of_meanflow(compile):
    """bfloat16 products, so the numbers compared agree to its 8 bits; they are not those of the adaptive weight."""
    torch._dynamo.reset()
    bare, plain = (
        BareStep(replace(MEANFLOW, compile=compile), TINY, 8, "cpu"),
        PlainStep(PLAIN_MEANFLOW, TINY, 8, "cpu"),
    )
    assert isinstance(bare.inputs, MeanInputs) and sum(bare.inputs.paired) == 2
    pairs = [(float(bare()), float(plain())) for _ in range(4)]
    assert all(a == pytest.approx(b, rel=0.02) for a, b in pairs)
    assert max(a for a, _ in pairs) > 1.1 * min(a for a, _ in pairs)
    assert float(bare.optimizer.norm) == pytest.approx(float(plain.norm), rel=0.1)


def test_what_is_minimised_is_the_loss_of_meanflow():
    inputs, network = MeanInputs(PAIRS, 4, "cpu"), make_network(PAIRS, select("reference"), "cpu")
    x1, x0, (t, r), y = inputs.sets[0]
    want = inputs.transport.mean_losses(network, x1, t=t, r=r, x0=x0, paired=[True, False, False, False], y=y)
    loss, compared = inputs.losses(network)
    assert torch.equal(loss, want["loss"].mean()) and torch.equal(compared, want["mse"].mean())
    assert bool((t <= r).all()) and not torch.equal(inputs.sets[1][2], inputs.sets[0][2])


def test_rows_of_meanflow():
    """Their own group: compared with each other, with the FLOPs of their own steps."""
    rows = {row["variant"]: row for row in bench().run(StepJob("tiny", TINY, 4, (MEANFLOW, PLAIN_MEANFLOW)))}
    ours, plain = rows["meanflow"], rows["plain-meanflow"]
    assert ours["status"] == plain["status"] == "ok" and ours["features"]["objective"] == "meanflow"
    assert ours["loss"] == pytest.approx(plain["loss"], rel=0.02) and ours["loss"] > 1.5
    assert ours["times_faster_than"] == {"plain-meanflow": pytest.approx(plain["p50_ms"] / ours["p50_ms"])}
    assert ours["flops"] == plain["flops"] == flops_per_step(TINY, 4, "meanflow") and ours["mfu"] is None
    flow = bench().run(StepJob("tiny", TINY, 4, (PLAIN,)))[0]
    assert flow["flops"] == 4 * flops_per_image(TINY)[1] and flow["features"]["objective"] == "flow"


@pytest.mark.parametrize("batch", [4, 6])
def test_flops_of_meanflow_are_those_of_the_products(batch):
    """Counted by torch in a pass with tangents and one without; gradients are twice the pass without.

    Of our network: `torch.func.jvp` also multiplies by the tangents of weights, which are zeros.
    """
    network = make_network(PAIRS, select("reference"), "cpu")
    x, t, y, r = duals(1)
    counted = []
    for given in ((x, t), (x.value, t.value)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(*given, y, r)
        counted.append(counter.get_total_flops())
    with_tangents, without = counted
    pairs = sum(MeanInputs(PAIRS, batch, "cpu").paired)
    want = 3 * batch * without + pairs * (with_tangents - without)
    assert pairs == {4: 1, 6: 2}[batch] and flops_per_step(PAIRS, batch, "meanflow") == want
    assert flops_per_step(PAIRS, batch, "flow") < want < 2 * flops_per_step(PAIRS, batch, "flow")


def test_a_loss_of_meanflow_is_checked_beside_the_plain_models():
    def make(variant, *arguments):
        step = PlainStep(PLAIN_MEANFLOW, *arguments)
        return (lambda: step() * 1.1) if variant.name == "meanflow" else step

    rows = bench(make=make).run(StepJob("tiny", TINY, 4, (MEANFLOW, PLAIN_MEANFLOW)))
    assert {row["variant"]: row["status"] for row in rows} == {"meanflow": "incorrect", "plain-meanflow": "ok"}


def test_variants_of_another_objective_are_another_job():
    """Everybody takes part in one, the plain model's first."""
    flow, mean = jobs(["LightningDiT-XL/1"], [128], list(TRAINING))
    assert (str(flow), str(mean)) == ("LightningDiT-XL/1 batch 128", "LightningDiT-XL/1 batch 128 meanflow")
    assert mean.providers == ("meanflow", "plain-meanflow") and bench().order(mean) == ["plain-meanflow", "meanflow"]
    assert {*flow.providers, *mean.providers} == set(TRAINING) and len(flow.providers) == len(TRAINING) - 2
    assert not {"meanflow", "plain-meanflow"} & set(bench_step.QUICK)
    (asked,) = jobs(["LightningDiT-XL/1"], [128], ["meanflow"], ["swiglu=triton"])
    assert asked.providers == ("meanflow+swiglu=triton",) and asked.objective == "meanflow"


def planted(variant: str, objective: str, ms: float, **ratios: float) -> dict:
    return {
        "kind": "step",
        "model": "LightningDiT-XL/1",
        "batch": 128,
        "variant": variant,
        "gpu": "NVIDIA H200",
        "device": "cuda",
        "revision": "1",
        "status": "ok",
        "reason": "",
        "features": {"engine": "plain" if "plain" in variant else "bare", "objective": objective},
        "loss": 2.0 if objective == "flow" else 3.0,
        "p50_ms": ms,
        "spread": 0.01,
        "images_per_second": 128e3 / ms,
        "times_faster_than": {name.replace("_", "-"): ratio for name, ratio in ratios.items()},
    }


def test_pages_and_the_triage_keep_objectives_apart():
    """A ratio over the plain model is over the one that is trained alike, and MeanFlow is no headline."""
    rows = [
        planted("bare", "flow", 200.0, plain_eager=3.0),
        planted("plain-eager", "flow", 600.0),
        planted("meanflow", "meanflow", 250.0, plain_meanflow=4.0),
        planted("plain-meanflow", "meanflow", 1000.0),
    ]
    changed = {row["variant"]: row["times_faster_than"] for row in compare_steps(rows)}
    assert changed == {"plain-eager": {"bare": pytest.approx(1 / 3)}, "plain-meanflow": {"meanflow": 0.25}}
    measured = Measured("nvidia-h200", tuple(rows))
    assert [row["variant"] for row in measured.headline()] == ["bare", "plain-eager"]
    lines = [line for line in table_of_steps(measured).splitlines() if "| meanflow |" in line]
    assert len(lines) == 1 and "| 4.00 |" in lines[0]


CUDA = sorted(name for name, op in OPS.items() if "cuda" in op.backends)


@pytest.mark.parametrize(
    ("asked", "name", "kernels", "per_op", "ops"),
    [
        (["cuda"], "bare+cuda", "cuda", {}, dict.fromkeys(CUDA, "cuda")),
        (
            ["swiglu=triton", "cuda"],
            "bare+cuda+swiglu=triton",
            "cuda",
            {"swiglu": "triton"},
            dict.fromkeys(CUDA, "cuda") | {"swiglu": "triton"},
        ),
        (["swiglu=reference"], "bare+swiglu=reference", "auto", {"swiglu": "reference"}, {"swiglu": "reference"}),
        ([], "bare", "auto", {}, {}),
    ],
)
def test_a_variant_on_other_backends(asked, name, kernels, per_op, ops):
    """Its name says which, as a row is known by it; ops without a CUDA kernel and ops in graphs stay on "auto"."""
    (job,) = jobs(["LightningDiT-XL/1"], [128], ["bare", "plain-eager"], asked)
    assert job.providers == (name, "plain-eager"), "the plain model has no such ops"
    features = bench().named(job, name)["features"]
    assert (features["kernels"], features["per_op"]) == (kernels, per_op)
    table, auto = job.variants[0].ops().table(), select("auto").table()
    assert {op: row["backend"] for op, row in table.items()} == {op: ops.get(op, auto[op]["backend"]) for op in OPS}
    assert len(CUDA) >= 6 and "group_norm_silu" not in CUDA


def test_ops_in_graphs_are_asked_for_by_name_only():
    assert not any(OPS[name].graph_pass for name in backends.per_op("triton", {}))
    assert backends.per_op("triton", {"weight_gradients": "triton"})["weight_gradients"] == "triton"


def test_backends_of_a_variant_are_added_to_its_own():
    grouped = TRAINING["bare-grouped"].on(["cuda"])
    assert grouped.named == {"weight_gradients": "triton"} and grouped.kernels == "cuda"
    assert TRAINING["bare-reference"].on(["swiglu=cuda"]).features()["kernels"] == "reference"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["swigl=cuda"], "no op is called 'swigl' (did you mean 'swiglu'?)"),
        (["cudda"], "no backend is called 'cudda' (did you mean 'cuda'?)"),
        (["emulated"], "no backend is called 'emulated'"),
        (["swiglu="], "no backend is called ''"),
        (["group_norm_silu=cuda"], "group_norm_silu has no cuda backend, only auto, reference, triton"),
        (["cuda", "triton"], "both cuda and triton for all ops"),
        (["swiglu=cuda", "swiglu=triton"], "both cuda and triton for swiglu"),
    ],
)
def test_backends_that_are_not_there_are_refused(asked, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench_step.main([word for choice in asked for word in ("--kernels", choice)])
    assert stopped.value.code == 2 and f"--kernels: {message}" in capsys.readouterr().err


def test_the_one_that_others_are_checked_against_starts_first():
    """Else a run that is cut off has timed providers and nobody to check them against."""
    job = next(jobs(["LightningDiT-XL/1"], [128], list(bench_step.QUICK)))
    assert bench().order(job) == ["plain-eager", "trainer", "bare", "plain-compile"]
    job = next(jobs(["LightningDiT-XL/1"], [128], ["bare", "plain-compile"]))
    assert bench().order(job) == ["plain-compile", "bare"]


def test_without_a_gpu_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert bench_step.main(["--quick"]) == 2 and "needs a GPU" in capsys.readouterr().err


def test_breakdown_by_hand():
    intervals = [
        Interval("nvjet_tst_128x256_64x4", 0.000, 0.010),
        Interval("rope_attention_fwd_kernel", 0.012, 0.016),
        Interval("Memcpy DtoD", 0.013, 0.014),  # within it
        Interval("gated_residual_fwd_kernel", 0.015, 0.018),  # beside the first: no gap, and both count
        Interval("adamw_ema_kernel", 0.020, 0.024),
    ]
    found = breakdown(reversed(intervals), steps=2)
    want = {"gemm": 5.0, "attention": 2.0, "memory": 2.0, "optimizer": 2.0, "communication": 0.0, "idle": 2.0}
    assert found == pytest.approx(want)
    assert [row["kind"] for row in longest(intervals, 2, count=2)] == ["gemm", "attention"]
    assert breakdown([], 1)["idle"] == 0.0


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sm90_xmma_gemm_bf16bf16_bf16f32", "gemm"),
        ("void cutlass::Kernel2<cutlass_80_wmma", "gemm"),
        ("cublasLt::splitKreduce_kernel", "gemm"),
        ("triton_red_fused_sum_3", "memory"),
        ("Memcpy DtoD", "memory"),
        ("void at::native::multi_tensor_apply_kernel<...FusedAdam", "optimizer"),
        ("pytorch_flash::flash_fwd_kernel", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90", "attention"),
        ("ncclDevKernel_AllReduce", "communication"),
    ],
)
def test_kinds_of_kernels(name, kind):
    assert kind_of(name) == kind


TRAINER = """
from bench.workloads.training import TrainerStep
from bench.workloads.variants import TrainingVariant
from tests.test_bench_step import TINY
variant = TrainingVariant("trainer", "trainer", kernels="reference", compile="none", recompute="pointwise")
import gc, weakref
step = TrainerStep(variant, TINY, 8, "cpu", images=64, workers=0, steps=5)
for _ in range(3):
    assert step() is None
trainer = step._trainer
assert trainer.step == 3 and trainer.engines["model"].optimizer.read_counters()["applied"] == 3
network = trainer.task.networks["model"]
assert network.config.depth == TINY.depth and network.config.use_checkpoint == "pointwise"
memory = [weakref.ref(next(network.parameters())), weakref.ref(trainer.engines["model"].optimizer)]
step.close()
del step, trainer, network
gc.collect()
assert not [ref for ref in memory if ref() is not None], "weights or optimizer live on"

from bench.workloads.variants import TokenizerVariant
from bench.workloads.tokenizer_training import TrainerStep, TrainingSetup
from tests.test_bench_tokenizer import OVERRIDES
setup = TrainingSetup(4, "cpu", (*OVERRIDES, "loss.perceptual=none"), images=8)
step = TrainerStep(TokenizerVariant("trainer", "trainer", kernels="reference"), setup)
assert step() is None and step() is None
engines = step._trainer.engines
assert {name: e.optimizer.read_counters()["applied"] for name, e in engines.items()} == {
    "autoencoder": 2, "discriminator": 2}
assert {p.dtype for p in engines["autoencoder"].module.parameters()} == {__import__("torch").bfloat16}
step.close()
"""


def test_the_trainers_take_steps_of_their_run_files():
    """The transformer's and the tokenizer's, in one process: most of its time is imports."""
    done = subprocess.run([sys.executable, "-c", TRAINER], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
