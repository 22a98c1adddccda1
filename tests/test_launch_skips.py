"""Steps that are not finite: what they leave alone, how they are counted, when a run gives up, what it reports."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from launch.config import load
from launch.runtime import exit_status
from launch.runtime.processes import Processes
from launch.train import run_training
from launch.training import checkpoint
from launch.training.build import make_trainer
from launch.training.engine import start_processes
from launch.training.loader import SampleOrder
from launch.training.optimizer import NonFiniteError
from launch.training.skips import SkippedSteps
from lightningdit.task import LightningDiTTask
from tests import toy
from tests.children import launch
from tests.host_reads import HostReads
from tests.run_rows import rows
from vavae.task import VavaeTask

TASKS = {"lightningdit": LightningDiTTask, "vavae": VavaeTask}
#: What makes a loss, or its gradient alone, not finite.
FAULTS = {"loss": lambda loss: loss * torch.inf, "gradient": lambda loss: loss + (loss * 0).sqrt()}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return toy.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def run_file(tmp_path, data):
    def write(kind: str = "lightningdit", **train) -> Path:
        content, folder = (toy.LIGHTNINGDIT, "latents") if kind == "lightningdit" else (toy.VAVAE, "images")
        train = {"output_dir": str(tmp_path), "rollbacks": 0, **train}
        return toy.write_run(tmp_path / f"{kind}.yaml", content, data={"data_path": str(data / folder)}, train=train)

    return write


@pytest.fixture
def poison(monkeypatch):
    """Spoil steps from now on, in this process: a network's loss, or its gradient alone."""

    def poison(*steps: int, fault: str = "loss", network: str = "model", kind: str = "lightningdit") -> None:
        real = originals[kind]

        def train_step(self, networks, batch, draws, step, backward):
            def spoil(name, loss):
                backward(name, FAULTS[fault](loss) if step in steps and name == network else loss)

            return real(self, networks, batch, draws, step, spoil)

        monkeypatch.setattr(TASKS[kind], "train_step", train_step)

    originals = {kind: task.train_step for kind, task in TASKS.items()}
    return poison


def trainer(path: Path, *overrides: str, kind: str = "lightningdit"):
    return make_trainer(load(path, list(overrides), kind=kind)[0], kind, start_processes())


def train(path: Path, *overrides: str, kind: str = "lightningdit") -> Path:
    return run_training(load(path, list(overrides), kind=kind)[0], kind)[0]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "float32"), (0, "bfloat16"), (1, "float32"), (2, "bfloat16"), (3, "float32")]
)
def test_a_skipped_step_touches_nothing(run_file, poison, stage, precision, fault):
    """Weights, average and moments after a poisoned last step are those before it, bit for bit."""
    poison(3, fault=fault)
    path = run_file(ckpt_every=1, max_steps=3, precision=precision, micro_batch_size=4)
    directory = train(path, f"deepspeed.zero_stage={stage}")
    before, after = (checkpoint.Checkpoint(directory / f"checkpoints/step_000000{s}") for s in (2, 3))
    for key in checkpoint.KEYS:
        a, b = before.tensors("model", key), after.tensors("model", key)
        assert all(torch.equal(a[n], b[n]) for n in a), key
    assert [row["skipped"] for row in rows(directory)] == [0, 0, 1]
    assert after.state["counters"]["model"] == {
        "applied": 2.0,
        "skipped": 1.0,
        "skipped_in_a_row": 1.0,
        "most_skipped_in_a_row": 0.0,
    }


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("log_every", [1, 4, 6])
def test_too_many_skipped_steps_in_a_row_stop_the_run_wherever_the_rows_are(run_file, poison, fault, log_every):
    """Also where they lie between two rows, with a step in order after them; the report names all of them."""
    poison(2, 3, 4, fault=fault)
    noticed = {1: 4, 4: 4, 6: 6}[log_every]
    path = run_file(max_skipped_in_a_row=3, log_every=log_every, ckpt_every=10)
    with pytest.raises(NonFiniteError, match=rf"3 steps in a row up to step {noticed} .*run/dump_step_0000002;"):
        train(path)
    directory = path.parent / "run"
    report = json.loads((directory / "dump_step_0000002/dump.json").read_text())
    assert (report["step"], report["last_bad_step"], report["row"]["step"]) == (2, 4, noticed)
    order, ranks = SampleOrder(20, 8, 0), [0] if fault == "loss" else []
    why = {"network": "model", "not_finite": fault, "ranks": ranks}
    samples = {step: [values.tolist() for values in order.slice(step, 0, 8)] for step in (2, 3, 4)}
    assert report["skipped_steps"] == [
        {"step": step, **why, "epochs": [epochs], "samples": [indices]} for step, (epochs, indices) in samples.items()
    ]
    assert checkpoint.newest(directory / "checkpoints").step == noticed


def test_fewer_skipped_steps_in_a_row_than_that_do_not_stop_it(run_file, poison):
    poison(1, 2, 4, 5)
    directory = train(run_file(max_skipped_in_a_row=3, log_every=6))
    assert rows(directory)[-1]["skipped"] == 4 and checkpoint.newest(directory / "checkpoints").step == 6


def test_a_row_of_skipped_steps_goes_on_over_a_restart(run_file, poison):
    poison(2, 3)
    path = run_file(max_skipped_in_a_row=3, log_every=10)
    directory = train(path, "train.max_steps=3")
    poison(4)
    with pytest.raises(NonFiniteError, match="3 steps in a row up to step 4 "):
        train(path, "train.max_steps=4")
    poison()
    train(path)  # having given up, a run may be started again
    assert checkpoint.newest(directory / "checkpoints").step == 6


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", ["lightningdit", "vavae"])
def test_a_run_of_skipped_steps_alone_does_not_end_well(run_file, poison, kind, fault):
    """Nor does it when it is started again, and nothing is left to train; nor one network's among two."""
    network = {"lightningdit": "model", "vavae": "discriminator"}[kind]
    poison(*range(1, 6), fault=fault, network=network, kind=kind)
    path = run_file(kind, max_steps=5)
    with pytest.raises(NonFiniteError, match=r"all steps up to the last, 5, .*nothing was trained.*dump_step_000000"):
        train(path, kind=kind)
    with pytest.raises(NonFiniteError, match="all steps of this run up to the last, 5, were skipped"):
        train(path, kind=kind)


def test_a_start_of_skipped_steps_alone_does_not_end_well(run_file, poison):
    path = run_file(max_steps=2)
    train(path)
    poison(3, 4)
    with pytest.raises(NonFiniteError, match=r"all steps up to the last, 4, .*nothing was trained"):
        train(path, "train.max_steps=4")
    poison(6)
    train(path, "train.max_steps=6")


def test_counters_of_older_checkpoints_are_taken(run_file):
    optimizer = trainer(run_file()).engines["model"].optimizer
    older = {"applied": 5.0, "skipped": 2.0, "skipped_in_a_row": 1.0}
    optimizer.set_counters(older)
    assert optimizer.read_counters() == {**older, "most_skipped_in_a_row": 0.0}
    with pytest.raises(KeyError):
        optimizer.set_counters({"applied": 5.0})


@pytest.mark.parametrize(
    ("network", "fault"),
    [
        ("autoencoder", "loss"),
        ("autoencoder", "gradient"),
        ("discriminator", "loss"),
        ("discriminator", "gradient"),
        ("autoencoder", "image"),
    ],
)
def test_a_skipped_step_leaves_running_statistics_alone(run_file, poison, monkeypatch, network, fault):
    """Whichever network's and micro-batch's it is; the steps around it move them, and the host reads nothing for it."""
    built = trainer(run_file("vavae", micro_batch_size=2), kind="vavae")
    discriminator, seen, reads, stream = built.task.networks["discriminator"], [], HostReads(), built.stream()
    if fault == "image":
        unreadable = [
            batch | {"image": batch["image"] * torch.nan} if number == 6 else batch
            for number, batch in enumerate(stream)
        ]
        stream = iter(unreadable)
    else:
        poison(4, fault=fault, network=network, kind="vavae")
    for _ in range(5):
        with reads:
            built.train_step(stream)
        seen.append({name: value.clone() for name, value in discriminator.named_buffers()})
    moved = [not all(torch.equal(before[name], after[name]) for name in before) for before, after in pairwise(seen)]
    assert moved == [False, True, False, True]  # the GAN begins in step 3
    assert all(value.isfinite().all() for value in seen[-1].values()) and not reads.seen
    assert built.engines[network].optimizer.read_counters()["skipped"] == 1


def test_two_processes_skip_what_one_of_them_cannot_take(tmp_path, run_file):
    """A latent that is not finite reaches one of them; the report says which, and what it was given."""
    order = [indices.tolist() for _, indices in (SampleOrder(12, 8, 0).slice(1, *cut) for cut in ((0, 4), (4, 8)))]
    latents = toy.write_latents(tmp_path / "latents", count=12)
    (latents / "manifest.json").unlink()  # it would tell by the checksum
    (shard,) = latents.glob("*.safetensors")
    tensors = load_file(shard)
    tensors["latents"][order[1][2]] = tensors["latents_flip"][order[1][2]] = torch.inf
    save_file(tensors, shard)
    changes = (f"data.data_path={latents}", "train.max_skipped_in_a_row=1")
    assert launch("train", "lightningdit", str(run_file()), *changes, world_size=2) == [exit_status.NUMERICAL] * 2
    report = json.loads((tmp_path / "run/dump_step_0000001/dump.json").read_text())
    (found,) = report["skipped_steps"]
    assert found["not_finite"] == "loss" and found["ranks"] == [1] and found["samples"] == order


class Told(Processes):
    """Three processes of which this is the second; the others answer as they are told."""

    def all_gather(self, value):
        return [self.others[0], value, self.others[1]]


def test_the_ranks_of_a_loss_are_told_apart_from_gradients():
    processes = Told(1, 3, torch.device("cpu"))
    object.__setattr__(processes, "others", ([True, False, False], [True, False, False]))
    skips, flags = SkippedSteps(["a", "b"], 10, 4, processes.device), torch.tensor
    skips.record(11, {"a": flags([False, False]), "b": flags([True, False])})
    skips.record(12, {"a": flags([False, False])})
    skips.record(13, {"a": flags([True, True]), "b": flags([True, False])})
    assert skips.read(13, processes) == [
        {"step": 11, "network": "b", "not_finite": "loss", "ranks": [0, 2]},
        {"step": 13, "network": "a", "not_finite": "loss", "ranks": [1]},
        {"step": 13, "network": "b", "not_finite": "gradient", "ranks": []},
    ]
    assert skips.read(13, processes) == []
    for step in range(14, 20):  # more than are remembered
        skips.record(step, {"a": flags([True, False]), "b": flags([False, False])})
    processes.others[0][:] = processes.others[1][:] = [False] * 4
    assert [found["step"] for found in skips.read(19, processes)] == [16, 17, 18, 19]
