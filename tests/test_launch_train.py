"""Training as a user runs it: exact resume after a kill, any ZeRO stage, any number of processes."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.backends.triton_launch import INTERPRETED
from launch.config import ConfigError, load
from launch.export import export
from launch.runtime import exit_status
from launch.training import checkpoint
from lightningdit.weights import read_weights
from tests import toy
from tests.children import Moment, free_port, launch
from tests.run_rows import rows
from vavae.model import Decoder, Encoder

MID_STEP = Moment("launch.training.engine:Engine", "step", 5)  # after the backward of step 5, before its update
MID_SAVE = Moment("launch.training.checkpoint", "write_tensors", 3)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return toy.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def run_file(tmp_path, data):
    def write(kind: str = "lightningdit", **sections) -> Path:
        content, folder = (toy.LIGHTNINGDIT, "latents") if kind == "lightningdit" else (toy.VAVAE, "images")
        sections["data"] = {"data_path": str(data / folder), **sections.get("data", {})}
        sections["train"] = {"output_dir": str(tmp_path), **sections.get("train", {})}
        return toy.write_run(tmp_path / f"{kind}.yaml", content, **sections)

    return write


def assert_same_run(a: Path, b: Path) -> None:
    """Rows and every tensor of the last checkpoint, bit for bit."""
    assert rows(a) == rows(b)
    first, second = (checkpoint.newest(d / "checkpoints") for d in (a, b))
    assert first.step == second.step
    files = [name for name in first.manifest.files if name.endswith(".safetensors")]
    assert files == [name for name in second.manifest.files if name.endswith(".safetensors")]
    for name in files:
        network, key, _ = name.split(".")
        x, y = first.tensors(network, key), second.tensors(network, key)
        assert x.keys() == y.keys()
        assert all(torch.equal(x[n], y[n]) for n in x), name


@pytest.mark.parametrize(("kind", "world_size"), [("lightningdit", 1), ("lightningdit", 2), ("vavae", 1)])
def test_killed_and_started_again_is_as_if_never_killed(tmp_path, run_file, kind, world_size):
    path = str(run_file(kind))
    command = ("train", kind, path, "train.exp_name=killed")
    assert launch("train", kind, path, "train.exp_name=whole", world_size=world_size) == [0] * world_size
    per_step = 1 if kind == "lightningdit" else 2  # engines; the GAN starts at the third iteration
    mid_step = Moment(MID_STEP.module, MID_STEP.name, 5 if per_step == 1 else 6)
    inline = "train.background_save=false"  # in the background it may not be written yet
    assert -signal.SIGKILL in launch(*command, inline, world_size=world_size, at=mid_step)
    before = checkpoint.newest(tmp_path / "killed/checkpoints").step
    assert before in (2, 3)
    assert -signal.SIGKILL in launch(*command, world_size=world_size, at=MID_SAVE)
    assert checkpoint.newest(tmp_path / "killed/checkpoints").step == before
    assert list((tmp_path / "killed/checkpoints").glob(".step_*.tmp"))
    assert launch(*command, world_size=world_size) == [0] * world_size
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert not list((tmp_path / "killed/checkpoints").glob(".*"))


def test_sigterm_ends_after_a_checkpoint(tmp_path, run_file):
    path = str(run_file())
    assert launch("train", "lightningdit", path, "train.exp_name=whole") == [0]
    moment = Moment("launch.training.engine:Engine", "step", 2, signal.SIGTERM)
    assert launch("train", "lightningdit", path, "train.exp_name=stopped", at=moment) == [exit_status.STOPPED]
    assert checkpoint.newest(tmp_path / "stopped/checkpoints").step == 2
    assert launch("train", "lightningdit", path, "train.exp_name=stopped") == [0]
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_the_number_of_processes_and_micro_batches_does_not_change_the_run(tmp_path, run_file):
    """Losses and the norm of the gradients, whether processes hold parts of them (ZeRO 1) or all (0)."""
    path = str(run_file())
    runs = {"one": (1, 8, 1), "two": (2, 4, 0), "cut": (2, 2, 1)}
    for name, (world_size, micro, stage) in runs.items():
        changes = (f"train.exp_name={name}", f"train.micro_batch_size={micro}", f"deepspeed.zero_stage={stage}")
        assert launch("train", "lightningdit", path, *changes, world_size=world_size) == [0] * world_size
    for name in ("two", "cut"):
        for one, other in zip(rows(tmp_path / "one"), rows(tmp_path / name), strict=True):
            assert other["loss"] == pytest.approx(one["loss"], abs=1e-4)
            assert other["mse"] == pytest.approx(one["mse"], abs=1e-4)
            assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


def test_micro_batches_of_one_size_make_one_run_with_a_gan(tmp_path, run_file):
    """BatchNorm and the adaptive weights are a micro-batch's: its size matters, who takes it does not."""
    path = str(run_file("vavae", train={"micro_batch_size": 2, "max_steps": 4, "ckpt_every": 4}))
    for name, world_size in (("one", 1), ("two", 2)):
        assert launch("train", "vavae", path, f"train.exp_name={name}", world_size=world_size) == [0] * world_size
    for one, other in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-5)
    assert "d_loss" in one


def test_the_optimizer_is_given_the_rate_that_the_log_says(run_file):
    """Told from the weights alone: without decay, w − lr · m̂ / (√v̂ + eps) is what they become. With warm-up."""
    optimizer = {"warmup_steps": 3, "final_lr_fraction": 0.1, "max_grad_norm": 0.0}
    directory = train_here(run_file(train={"ckpt_every": 1}, optimizer=optimizer))
    logged = {row["step"]: row["lr"] for row in rows(directory)}
    assert logged[1] == pytest.approx(0.01 / 3) and logged[6] == pytest.approx(0.001)
    found = {step: checkpoint.Checkpoint(directory / f"checkpoints/step_{step:07d}") for step in logged}
    for step in range(2, 7):
        before, after = found[step - 1].tensors("model"), found[step].tensors("model")
        means, squares = found[step].tensors("model", "exp_avg"), found[step].tensors("model", "exp_avg_sq")
        moves, updates = [], []
        for name, mean in means.items():
            updates.append((mean / (1 - 0.9**step) / ((squares[name] / (1 - 0.95**step)).sqrt() + 1e-8)).flatten())
            moves.append((before[name] - after[name]).flatten())
        move, update = torch.cat(moves).double(), torch.cat(updates).double()
        assert float(move @ update / update.square().sum()) == pytest.approx(logged[step], rel=1e-3)


@pytest.mark.parametrize(
    ("stage", "precision", "world_size"),
    [
        (0, "float32", 1),
        (2, "float32", 2),
        (3, "float32", 2),
        (0, "bfloat16", 1),
        (1, "bfloat16", 2),
        (3, "bfloat16", 1),
    ],
)
def test_every_stage_trains_resumes_and_agrees(tmp_path, run_file, stage, precision, world_size):
    """Against ZeRO 1 in float32 on one process; resumed under another stage, which a whole checkpoint allows."""
    path = str(run_file())
    command = ("train", "lightningdit", path, f"train.precision={precision}")
    assert launch("train", "lightningdit", path, "train.exp_name=base", "train.max_steps=4") == [0]
    own = (*command, "train.exp_name=own")
    assert launch(*own, "train.max_steps=2") == [0]
    rest = (*own, "train.max_steps=4", f"deepspeed.zero_stage={stage}")
    assert launch(*rest, world_size=world_size) == [0] * world_size
    tolerance = 1e-4 if precision == "float32" else 0.05
    for one, other in zip(rows(tmp_path / "base"), rows(tmp_path / "own"), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=tolerance)
    base, own = (checkpoint.newest(tmp_path / name / "checkpoints") for name in ("base", "own"))
    limit = 1e-4 if precision == "float32" else 0.05  # one step moves a weight by at most 0.01
    for key in ("model", "ema"):
        a, b = base.tensors("model", key), own.tensors("model", key)
        assert a.keys() == b.keys() and all(t.dtype == torch.float32 for t in b.values())
        assert max(float((a[n] - b[n]).abs().max()) for n in a) < limit
    safetensors, _, _ = export(own, tmp_path / "exported")
    exported = read_weights(safetensors)[0]
    assert all(torch.equal(exported[n], t) for n, t in own.tensors("model", "ema").items())


def test_the_average_follows_the_weights(tmp_path, run_file):
    """The EMA in the checkpoints is what the weights of every step give: e ← 0.9·e + 0.1·w."""
    assert launch("train", "lightningdit", str(run_file(train={"ckpt_every": 1}))) == [0]
    checkpoints = [checkpoint.Checkpoint(tmp_path / f"run/checkpoints/step_{s:07d}") for s in range(1, 7)]
    ema = checkpoints[0].tensors("model", "ema")
    for at in checkpoints[1:]:
        weights, saved = at.tensors("model"), at.tensors("model", "ema")
        for name in ema:
            ema[name] = 0.9 * ema[name] + 0.1 * weights[name]
            torch.testing.assert_close(saved[name], ema[name], rtol=0, atol=1e-6)
    assert checkpoints[-1].tensors("model").keys() - ema.keys() == {
        "pos_embed",
        "feat_rope.freqs_cos",
        "feat_rope.freqs_sin",
    }


def test_a_checkpoint_says_what_made_it(tmp_path, run_file):
    assert launch("train", "lightningdit", str(run_file())) == [0]
    state = checkpoint.newest(tmp_path / "run/checkpoints").state
    assert state["step"] == 6 and state["images"] == 48 and state["config"]["optimizer"]["lr"] == 0.01
    assert state["ops"]["swiglu"]["backend"] == "reference"
    assert len(state["task"]["latents"]["mean"]) == 4
    assert state["versions"]["torch"] == torch.__version__


def test_the_deepspeed_launcher_runs_it(tmp_path, run_file):
    """The command of the README, two processes on the CPU."""
    path = str(run_file(train={"max_steps": 2}))
    deepspeed = Path(sys.executable).parent / "deepspeed"
    options = ["--num_accelerators", "2", "--master_port", str(free_port()), "--module"]
    command = [sys.executable, deepspeed, *options, "launch", "train", "lightningdit", path]
    root = str(Path(__file__).parent.parent)
    env = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 × cpu, ZeRO 1" in done.stdout
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2]


def train_here(path, *overrides, kind="lightningdit"):
    from launch.config import load
    from launch.train import run_training

    return run_training(load(path, list(overrides), kind=kind)[0], kind)[0]


def test_a_checkpoint_of_another_run_is_refused(run_file):
    path = run_file(train={"max_steps": 2})
    train_here(path)
    with pytest.raises(ValueError, match=r"step_0000002/model does not fit: .* where the model has"):
        train_here(path, "model.hidden_size=32")
    with pytest.raises(checkpoint.CheckpointError, match="trained with global_batch_size 8, this run has 4"):
        train_here(path, "train.global_batch_size=4")
    with pytest.raises(checkpoint.CheckpointError, match="trained with seed 0, this run has 1"):
        train_here(path, "train.global_seed=1")
    with pytest.raises(ValueError, match=r"already holds step 2 and train\.resume is false"):
        train_here(path, "train.resume=false")
    with pytest.raises(ValueError, match="global_batch_size 8 is not a multiple of 1 processes × micro_batch_size 3"):
        train_here(path, "train.micro_batch_size=3")


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_resumed_from(run_file, tmp_path, caplog):
    """To the same bits; with `resume: strict` it ends the run."""
    path = run_file(train={"max_steps": 4, "ckpt_every": 2})
    whole = train_here(path, "train.exp_name=whole")
    directory = train_here(path)
    file = directory / "checkpoints/step_0000004/model.exp_avg.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 4
    file.write_bytes(content)
    with pytest.raises(checkpoint.CheckpointError, match=r"exp_avg\.safetensors .*damaged \(train\.resume is strict"):
        train_here(path, "train.resume=strict")
    caplog.clear()
    assert train_here(path) == directory
    said = [record.getMessage() for record in caplog.records if record.name == "launch.training.restore"]
    assert len(said) == 1 and re.search(
        r"step_0000004 is DAMAGED and set aside as step_0000004\.damaged: .*SHA", said[0]
    )
    names = sorted(path.name for path in (directory / "checkpoints").iterdir())
    assert names == ["step_0000002", "step_0000004", "step_0000004.damaged"]
    assert_same_run(whole, directory)


def test_validation_and_its_rows(run_file, data):
    directory = train_here(
        run_file(
            data={"valid_path": str(data / "latents")}, train={"max_steps": 4, "valid_every": 2, "valid_batches": 2}
        )
    )
    validated = [row for row in rows(directory) if "valid_ema/loss" in row]
    assert [row["step"] for row in validated] == [2, 4]


def test_a_run_begins_from_another_runs_checkpoint_once(run_file, tmp_path, capsys):
    """Started again, by the same command too, it goes on from its own newest."""
    path = run_file(train={"max_steps": 3, "ckpt_every": 2})
    train_here(path)
    source, own = (tmp_path / name / "checkpoints" for name in ("run", "further"))
    command = (path, f"train.ckpt={source}/step_0000002", "train.exp_name=further")
    for steps, start in ((4, source / "step_0000002"), (6, own / "step_0000004"), (7, own / "step_0000006")):
        capsys.readouterr()
        further = train_here(*command, f"train.max_steps={steps}")
        said = capsys.readouterr().out
        assert f"{start.name[-1]}  resumed  checkpoint {start}\n" in said
        assert ("was this run's start" in said) == (start.parent == own)
    assert [row["step"] for row in rows(further)] == [3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("kind", "preset", "taken"),
    [
        ("lightningdit", "default", "ema"),
        ("lightningdit", "paper", "model"),
        ("vavae", "default", "ema"),
    ],
)
def test_a_run_begins_from_the_weights_that_it_names(run_file, tmp_path, kind, preset, taken):
    """Told from a step whose rate is next to nothing: the weights after it are those of the file."""
    path = run_file(kind, train={"max_steps": 3})
    train_here(path, kind=kind)
    trained = checkpoint.newest(tmp_path / "run/checkpoints")
    *_, published = export(trained, tmp_path / "exported")
    begun = train_here(
        path,
        f"train.weight_init={published}",
        "train.exp_name=begun",
        "train.max_steps=1",
        "optimizer.lr=1e-12",
        f"preset={preset}",
        kind=kind,
    )
    network = {"lightningdit": "model", "vavae": "autoencoder"}[kind]
    want, other = (trained.weights(network, key) for key in (taken, {"ema": "model", "model": "ema"}[taken]))
    found = checkpoint.newest(begun / "checkpoints").weights(network, "model")
    apart = [float((found[name] - want[name]).abs().max()) for name in want]
    assert found.keys() == want.keys() and max(apart) < 1e-9
    if kind == "lightningdit":  # the tokenizer's average is that of no steps: its weights
        assert max(float((found[name] - other[name]).abs().max()) for name in want) > 1e-3


@pytest.mark.parametrize("mode", ["aot_eager", "regional"])
def test_compiled_training_is_eager_training(tmp_path, run_file, mode):
    """Graphs forward and backward: the same losses to rounding, and a checkpoint that goes on uncompiled."""
    command = ("train", "lightningdit", str(run_file()))
    assert launch(*command, "train.exp_name=eager") == [0]
    assert launch(*command, "train.exp_name=own", f"train.compile={mode}", "train.max_steps=4") == [0]
    assert launch(*command, "train.exp_name=own", "train.compile=none") == [0]
    for one, other in zip(rows(tmp_path / "eager"), rows(tmp_path / "own"), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)


def test_what_cannot_be_compiled_is_refused(run_file):
    path = str(run_file())
    with pytest.raises(ConfigError, match=r"compile is inductor, but deepspeed\.zero_stage 3"):
        load(path, ["train.compile=inductor", "deepspeed.zero_stage=3"], kind="lightningdit")
    assert load(path, ["deepspeed.zero_stage=3"], kind="lightningdit")[0].train.compile == "auto"
    with pytest.raises(ConfigError, match=r"compile is regional, but use_checkpoint pointwise looks into each block"):
        load(path, ["train.compile=regional", "train.use_checkpoint=pointwise"], kind="lightningdit")
    with pytest.raises(ConfigError, match=r"train\.compile"):
        load(str(run_file("vavae")), ["train.compile=regional"], kind="vavae")
    with pytest.raises(ConfigError, match=r"compile is inductor, but deepspeed\.zero_stage 3"):
        unbalanced = ["loss.disc_weight=0", "deepspeed.zero_stage=3"]
        load(str(run_file("vavae")), ["train.compile=inductor", *unbalanced], kind="vavae")


@pytest.mark.parametrize("override", ["train.compile=none", "train.compile=aot_eager", "train.precision=float32"])
def test_an_op_that_would_take_part_in_nothing_is_refused(run_file, override):
    asked = ["train.compile=inductor", "train.precision=bfloat16", "kernels={default: auto, linear_swiglu: triton}"]
    load(str(run_file()), asked, kind="lightningdit")
    with pytest.raises(ConfigError, match=r"kernels\.linear_swiglu is triton, but train\.compile is .*bfloat16"):
        load(str(run_file()), [*asked, override], kind="lightningdit")
    load(
        str(run_file()),
        [*asked[:2], "kernels={default: triton, linear_swiglu: reference}", override],
        kind="lightningdit",
    )


@pytest.mark.skipif(not INTERPRETED, reason="Triton is not interpreted here")
def test_a_checkpoint_continues_on_another_backend(tmp_path, run_file):
    """Reference, then Triton, then what "auto" means: the losses of a run on one backend, and each table recorded."""
    command = ("train", "lightningdit", str(run_file()), "train.ckpt_every=1")
    assert launch(*command, "train.max_steps=3", "train.exp_name=base") == [0]
    for backend, steps in (("reference", 1), ("triton", 2), ("auto", 3)):
        own = ("train.exp_name=own", f"kernels={backend}", f"train.max_steps={steps}")
        assert launch(*command, *own) == [0]
        table = checkpoint.newest(tmp_path / "own/checkpoints").state["ops"]
        for name in ("stacked_linear", "stacked_linear_jvp"):
            assert table.pop(name)["backend"] == ("reference" if backend == "reference" else "library")
        assert {row["backend"] for row in table.values()} == {"reference" if backend == "auto" else backend}
    for one, other in zip(rows(tmp_path / "base"), rows(tmp_path / "own"), strict=True):
        assert all(other[key] == pytest.approx(one[key], rel=1e-4) for key in ("loss", "mse", "cos_loss"))


@pytest.fixture
def channels_last(monkeypatch):
    """Tokenizers compute in channels last: the interpreter takes a thirtieth of the time for group norms."""
    for network in (Encoder, Decoder):

        def forward(self, x, whole=network.forward):
            return whole(self, x.contiguous(memory_format=torch.channels_last))

        monkeypatch.setattr(network, "forward", forward)


@pytest.mark.skipif(not INTERPRETED, reason="Triton is not interpreted here")
def test_a_tokenizer_continues_on_another_backend(tmp_path, run_file, channels_last):
    small = {"data": {"image_size": 8}, "model": {"resolution": 8}, "loss": {"disc_start": 9}}
    path = run_file("vavae", **small, train={"global_batch_size": 2, "ckpt_every": 1})
    train_here(path, "train.max_steps=2", "train.exp_name=base", kind="vavae")
    for backend, steps in (("reference", 1), ("triton", 2)):
        train_here(path, "train.exp_name=own", f"kernels={backend}", f"train.max_steps={steps}", kind="vavae")
    table = checkpoint.newest(tmp_path / "own/checkpoints").state["ops"]
    assert table["group_norm_silu"]["backend"] == "triton"
    for one, other in zip(rows(tmp_path / "base"), rows(tmp_path / "own"), strict=True):
        for key in ("loss", "rec", "kl", "autoencoder/grad_norm"):
            assert other[key] == pytest.approx(one[key], rel=1e-4), key
