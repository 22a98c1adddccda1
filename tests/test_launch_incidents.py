"""Rollbacks past bad steps, the stop after them with its dump, and the replay of that."""

import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

import kernels
from common.files import read_json
from common.tensors import read_tensors, write_tensors
from launch import replay
from launch.config import ConfigError, load
from launch.train import run_training
from launch.training import checkpoint
from launch.training.build import make_task
from launch.training.engine import Engine
from launch.training.loader import SampleOrder
from launch.training.optimizer import NonFiniteError
from launch.training.trainer import Trainer
from lightningdit.task import LightningDiTTask
from tests import toy
from tests.children import call
from tests.run_rows import events, rows


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return toy.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def run_file(tmp_path, data):
    def write(name: str = "run", **train) -> Path:
        train = {"output_dir": str(tmp_path), "exp_name": name, "max_skipped_in_a_row": 3, **train}
        data_section = {"data_path": str(data / "latents")}
        return toy.write_run(tmp_path / f"{name}.yaml", toy.LIGHTNINGDIT, data=data_section, train=train)

    return write


def train(path: Path, *overrides: str) -> Path:
    return run_training(load(path, list(overrides), kind="lightningdit")[0], "lightningdit")[0]


def spoil(change, monkeypatch) -> None:
    """Have `change(loss, draws, step)` in the place of the loss of each micro-batch."""
    whole = LightningDiTTask.train_step

    def train_step(self, networks, batch, draws, step, backward):
        return whole(
            self, networks, batch, draws, step, lambda name, loss: backward(name, change(self, loss, draws, step))
        )

    monkeypatch.setattr(LightningDiTTask, "train_step", train_step)


def as_drawn(task, draws, step: int, seed: int = 0) -> bool:
    """Whether the step's times are those of a seed."""
    return torch.equal(draws["t"], task.draw(step, 8, "cpu", seed=seed)["t"])


def bad_as_drawn_first(steps: range):
    """Losses that are not finite in some steps, by what these steps were given: drawn anew they are fine."""

    def change(task, loss, draws, step):
        return loss * torch.inf if step in steps and as_drawn(task, draws, step) else loss

    return change


def equal(a: Path, b: Path, step: int) -> bool:
    """Whether two runs' checkpoints of a step have the same tensors, to the last bit."""
    first, second = (checkpoint.Checkpoint(run / f"checkpoints/step_{step:07d}") for run in (a, b))
    pairs = [(first.tensors("model", key), second.tensors("model", key)) for key in checkpoint.KEYS]
    return all(torch.equal(x[name], y[name]) for x, y in pairs for name in x)


def redrawn_from_the_start(run_file, monkeypatch, step: int, redrawn: list[list[int]], **train_section) -> Path:
    """A run that is undisturbed and draws these ranges anew: to `step` as it is, then by what its checkpoint says."""
    path = run_file("undisturbed", **train_section)
    with monkeypatch.context() as undisturbed:
        undisturbed.undo()
        directory = train(path, f"train.max_steps={step}")
        saved = directory / f"checkpoints/step_{step:07d}"
        toy.rewrite_state(saved, checkpoint.Checkpoint(saved).state | {"redrawn": redrawn})
        return train(path)


def test_ten_bad_steps_in_a_row_are_left_behind_by_one_rollback(run_file, monkeypatch, caplog):
    """To the last checkpoint before them; afterwards the run is that which never had them, bit for bit.

    Its hours have the steps that were thrown away, and it is no resumed one: `train.resume` may be false.
    """
    section = {"max_steps": 18, "max_skipped_in_a_row": 10, "log_every": 4, "ckpt_every": 4}
    alone = redrawn_from_the_start(run_file, monkeypatch, 4, [[5, 15, 1]], **section)
    freed, close = [], Trainer.close
    monkeypatch.setattr(Trainer, "close", lambda self: (freed.append(weakref.ref(self)), close(self)))
    spoil(bad_as_drawn_first(range(6, 16)), monkeypatch)
    directory = train(run_file(resume=False, **section))
    (event,) = events(directory, "rollback")
    assert not events(directory, "resumed")
    assert event["step"] == 4 and event["event"] == "rollback" and "10 steps in a row up to step" in event["reason"]
    assert event["redrawn"] == {"first": 5, "last": 15, "seed": 1}
    told = [record.getMessage() for record in caplog.records if record.name == "launch.training.log"]
    assert any("rolled back to step 4; steps 5 to 15 are drawn anew from seed 1" in text for text in told)
    assert [row["step"] for row in rows(directory)] == [4, 8, 12, 16, 18]
    assert equal(directory, alone, 18)
    kept = {path.name for path in (directory / "checkpoints").iterdir()}
    assert {"step_0000008.rolled_back", "step_0000012.rolled_back", "step_0000016", "step_0000018"} <= kept
    thrown_away = read_json(directory / "checkpoints/step_0000012.rolled_back/state.json")
    kept_on = checkpoint.Checkpoint(directory / "checkpoints/step_0000004").state
    assert kept_on["hours"] > thrown_away["hours"] > 0 and kept_on["started"] == thrown_away["started"]
    for step in (4, 16, 18):
        assert checkpoint.Checkpoint(directory / f"checkpoints/step_{step:07d}").state["redrawn"] == [[5, 15, 1]]
    assert len(freed) == 1 and freed[0]() is None


def test_a_run_goes_on_over_a_restart_after_a_rollback(run_file, monkeypatch):
    """In the midst of the steps that are drawn anew, also where it is stopped before its next checkpoint."""
    section = {"max_steps": 9, "ckpt_every": 3}
    spoil(bad_as_drawn_first(range(4, 7)), monkeypatch)
    directory = train(run_file(**section))
    cut, save = run_file("cut", **section), Trainer.save

    def stop_at(step):
        def stopping(self, **options):
            save(self, **options)
            if self.step == step and self.order.redrawn:
                raise KeyboardInterrupt

        return stopping

    for step in (3, 6):
        with monkeypatch.context() as stopped, pytest.raises(KeyboardInterrupt):
            stopped.setattr(Trainer, "save", stop_at(step))
            train(cut)
    assert equal(directory, train(cut), 9)


def test_without_a_checkpoint_the_run_begins_anew(run_file, monkeypatch):
    """But for its times."""
    times, close = [], Trainer.close
    monkeypatch.setattr(Trainer, "close", lambda self: (times.append(self._progress.time.state_dict()), close(self)))
    spoil(bad_as_drawn_first(range(2, 5)), monkeypatch)
    directory = train(run_file(max_steps=6, ckpt_every=6))
    (event,) = events(directory, "rollback")
    assert event["step"] == 0 and event["redrawn"] == {"first": 1, "last": 4, "seed": 1}
    assert rows(directory)[-1]["skipped"] == 0
    (before,), after = times, checkpoint.newest(directory / "checkpoints").state
    assert after["started"] == before["started"] and after["gpu_hours"] > before["gpu_hours"] > 0


def test_where_only_later_checkpoints_are_kept_skipped_steps_are_left_behind_from_there(run_file, monkeypatch):
    """They left no trace in the weights; earlier ones were removed by `keep_checkpoints`."""
    spoil(bad_as_drawn_first(range(2, 5)), monkeypatch)
    directory = train(run_file(max_steps=6, ckpt_every=3, keep_checkpoints=1))
    (event,) = events(directory, "rollback")
    assert event["step"] == 3 and event["redrawn"] == {"first": 4, "last": 4, "seed": 1}


def test_bad_steps_that_come_again_stop_the_run_with_a_dump(run_file, monkeypatch):
    spoil(lambda task, loss, draws, step: loss * torch.inf if step >= 4 else loss, monkeypatch)
    path = run_file(max_steps=9, micro_batch_size=4)
    gathered, read = set(), Engine._read
    monkeypatch.setattr(Engine, "_read", lambda self, name, key: (gathered.add(key), read(self, name, key))[1])
    with pytest.raises(NonFiniteError, match=r"again after the rollback to step 3; see .*python -m launch replay .*"):
        train(path)
    assert gathered == {"model"}  # of a dump, which writes no more
    dump = replay.read_dump(path.parent / "run/dump_step_0000004")
    assert (dump["step"], dump["last_bad_step"], dump["redrawn"]) == (4, 6, [[4, 6, 1]])
    epochs, samples = SampleOrder(20, 8, 0, [(4, 6, 1)]).slice(4, 0, 8)
    assert dump["samples"] == {"epochs": [epochs.tolist()], "samples": [samples.tolist()]}
    assert dump["random_numbers"]["seed"] == 1 and [m["losses"] for m in dump["ranks"][0]] == [{"model": "inf"}] * 2
    for micro in dump["ranks"][0]:
        assert set(micro["grad_norms"]["model"]) >= {"blocks.0", "blocks.1", "final_layer.linear"}
        assert set(micro["figures"]) == {
            f"{f}_max/blocks.{i}" for f in ("activation_norm", "attention_logit") for i in (0, 1)
        }
        assert len(micro["t"]) == 4
    assert [step for step, _ in dump["losses"]] == [4, 5, 6] and {loss for _, loss in dump["losses"]} == {"inf"}


def stop_on_bad_latents(folder: str) -> None:
    """Two processes, of which one is given a latent that is not finite, again after the rollback."""
    path = Path(folder) / "run.yaml"
    with pytest.raises(NonFiniteError, match="again after the rollback to step 0"):
        run_training(load(path, [], kind="lightningdit")[0], "lightningdit")


def test_the_replay_of_a_dump_shows_the_same_nan(tmp_path, capsys):
    """By another process on plain modules; the reference in float32 too, as the latents are what is wrong."""
    latents = toy.write_latents(tmp_path / "latents", count=8)
    toy.spoil_latent(latents, 5)
    train_section = {"output_dir": str(tmp_path), "max_skipped_in_a_row": 1, "precision": "bfloat16"}
    train_section["micro_batch_size"] = 2
    path = toy.write_run(tmp_path / "run.yaml", toy.LIGHTNINGDIT, data={"data_path": str(latents)}, train=train_section)
    assert call(stop_on_bad_latents, str(tmp_path), world_size=2) == [0, 0]
    assert [event["step"] for event in events(tmp_path / "run", "saved")] == [0, 1]  # of the rollback, and of the stop
    run = load(path, [], kind="lightningdit")[0]
    dump = tmp_path / "run/dump_step_0000001"
    ((where, bad),) = [
        (rank, samples.index(5) // 2)
        for rank, samples in enumerate(replay.read_dump(dump)["samples"]["samples"])
        if 5 in samples
    ]
    capsys.readouterr()
    drawn = make_task(run, kernels.select("reference"), torch.device("cpu")).draw(1, 8, "cpu", seed=1)
    files = [read_tensors(dump / f"rank000{rank}_micro000{micro}.safetensors") for micro in (0, 1) for rank in (0, 1)]
    assert all(torch.equal(torch.cat([file[f"draws.{name}"] for file in files]), drawn[name]) for name in drawn)
    for overrides in ([], ["train.precision=float32", "kernels=reference"]):
        assert replay.main([str(dump), *overrides]) == 0
        said = capsys.readouterr().out
        assert f"rank {where}, micro-batch {bad}" in said and f"rank {1 - where}," not in said
        assert "loss of model: nan (when dumped: nan)" in said and "not finite in the micro-batch: batch.x, 64 " in said
        assert "losses in the run, by step: 1: nan\n" in said and "weights after step 1 (those that step 1 met " in said
        assert "first module whose output is not finite: model.x_embedder.proj\n" in said
    assert replay.main([str(dump), "--rank", str(1 - where), "--device", "cpu"]) == 0
    _, *fine = capsys.readouterr().out.split("micro-batch ")
    for said, recorded in zip(fine, replay.read_dump(dump)["ranks"][1 - where], strict=True):
        assert "not finite: none" in said and f"loss of model: {recorded['losses']['model']:.6g} (when dumped: " in said
        for block, norm in recorded["grad_norms"]["model"].items():
            (line,) = [line.split() for line in said.splitlines() if line.split()[:1] == [f"model.{block}"]]
            assert float(line[2]) == pytest.approx(norm, rel=1e-2, abs=1e-6) and line[3] == f"{norm:.4g}"
    weights = read_tensors(dump / "model.safetensors")
    weights["final_layer.linear.bias"] += 1
    write_tensors(dump / "model.safetensors", weights)
    assert replay.main([str(dump), "--rank", str(1 - where)]) == 0
    said = capsys.readouterr().out
    for recorded in replay.read_dump(dump)["ranks"][1 - where]:
        loss = f"{recorded['losses']['model']:.6g}"
        assert f"(when dumped: {float(loss):.4g})" in said and f"loss of model: {loss} (" not in said
    script = (dump.rename(tmp_path / "moved dump") / "replay.sh").resolve()
    shown = subprocess.run(
        ["sh", script, "kernels=reference"], env=os.environ | {"PYTHON": "echo"}, capture_output=True, text=True
    )
    assert shown.stdout == f"-m launch replay {script.parent} kernels=reference\n"
    assert f"PYTHON={sys.executable}\n" in script.read_text("utf-8")


def test_what_is_no_dump_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"has no dump\.json: it is no dump"):
        replay.main([str(tmp_path)])
    for device in ("gpu", "cuda:99", "mps"):
        with pytest.raises(ValueError, match=rf"--device '{device}' is not there: this machine has cpu"):
            replay.main([str(tmp_path), "--device", device])


@pytest.mark.parametrize("rollbacks", [1, 0])
def test_a_spike_that_lasts_is_left_behind_once(run_file, monkeypatch, rollbacks):
    """Its steps are drawn anew; without rollbacks left the run stops with a dump and saves nothing of it."""
    section = {"max_steps": 30, "ckpt_every": 5, "spike_window": 12, "spike_steps": 3, "log_every": 3}

    losses = {}

    def change(task, loss, draws, step):
        loss = loss * 100 if 17 <= step < 24 and as_drawn(task, draws, step) else loss
        losses.setdefault(step, loss.item())
        return loss

    spoil(change, monkeypatch)
    path = run_file(rollbacks=rollbacks, **section)
    if not rollbacks:
        with pytest.raises(
            NonFiniteError, match=r"a spike from step 17 to step 21, .*spike_steps: 3.*dump_step_0000017"
        ):
            train(path)
        assert checkpoint.newest(path.parent / "run/checkpoints").step == 20
        dump = replay.read_dump(path.parent / "run/dump_step_0000017")  # by later weights, but for the run's losses
        assert dict(dump["losses"]) == {step: pytest.approx(losses[step]) for step in range(10, 22)}
        assert dump["weights_of_step"] == 21 and dump["ranks"][0][0]["losses"]["model"] != dict(dump["losses"])[17]
        return
    directory = train(path)
    (event,) = events(directory, "rollback")
    assert event["step"] == 15 and event["redrawn"] == {"first": 16, "last": 21, "seed": 1}
    assert "spike from step 17 to step 21" in event["reason"]
    spikes = {row["step"]: row["loss_spikes"] for row in rows(directory)}
    assert spikes[24] == 2 and sum(spikes.values()) == 2  # steps 22 and 23 are as they were
