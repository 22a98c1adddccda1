"""Validation in the loop, against means made by hand; and what of a run's time counts as training."""

from functools import partial
from pathlib import Path

import pytest
import torch

from launch.config import load
from launch.training import checkpoint, progress, trainer
from launch.training.build import make_trainer
from launch.training.engine import start_processes
from launch.training.evaluations import Evaluations
from launch.training.progress import Throughput
from tests import toy
from tests.children import launch
from tests.run_rows import read_lines, rows

BATCHES, SIZE = 3, 8
KINDS = {"lightningdit": (toy.LIGHTNINGDIT, toy.write_latents), "vavae": (toy.VAVAE, toy.write_images)}


@pytest.fixture
def run_file(tmp_path):
    def write(kind: str = "lightningdit", **train) -> Path:
        content, make = KINDS[kind]
        paths = {"data_path": str(tmp_path / "data"), "valid_path": str(tmp_path / "valid")}
        for path, count in zip(paths.values(), (20, 26), strict=True):
            if not Path(path).exists():
                make(Path(path), count)
        size = {"micro_batch_size": SIZE} if kind == "lightningdit" else {}
        settings = {"output_dir": str(tmp_path), "valid_batches": BATCHES, "valid_every": 3, "max_steps": 3}
        return toy.write_run(tmp_path / f"{kind}.yaml", content, data=paths, train=settings | size | train)

    return write


def loop(path: Path, kind: str = "lightningdit") -> trainer.Trainer:
    return make_trainer(load(path, kind=kind)[0], kind, start_processes())


def validated(directory: Path) -> dict:
    (row,) = [row for row in rows(directory) if any(name.startswith("valid") for name in row)]
    return row


def test_the_mean_is_that_of_other_images_and_other_draws_in_every_batch(tmp_path, run_file):
    path = run_file(valid_weights="model")
    run = loop(path)
    run.run()
    task, data, losses = run.task, run._evaluations.validation.data, []
    model = task.networks["model"].eval()
    for number in range(BATCHES):
        indices = torch.arange(number * SIZE, (number + 1) * SIZE) % len(data)
        batch = data.batch(torch.zeros_like(indices), indices)
        draws = task.validation_draws(number, SIZE, torch.device("cpu"))
        with torch.no_grad():
            found = task.transport.training_losses(model, batch["x"], t=draws["t"], x0=draws["noise"], y=batch["y"])
        losses.append((found["loss"].mean() + found["cos_loss"].mean()).item())
    assert len({round(loss, 6) for loss in losses}) == BATCHES
    assert not any(name.startswith("valid_ema") for name in validated(tmp_path / "run"))
    assert validated(tmp_path / "run")["valid/loss"] == pytest.approx(sum(losses) / BATCHES, rel=1e-6)


@pytest.mark.parametrize("kind", ["lightningdit", "vavae"])
def test_networks_are_evaluated_in_evaluation_mode_and_trained_in_training_mode(tmp_path, run_file, kind, monkeypatch):
    run = loop(run_file(kind, max_steps=5, valid_weights="model"), kind)
    networks, seen = run.task.networks.values(), {"train_step": [], "validate": []}

    def buffers():
        return [buffer.clone() for network in networks for buffer in network.buffers()]

    def spy(name):
        real = getattr(run.task, name)

        def spied(*args):
            seen[name].append({module.training for network in networks for module in network.modules()})
            before = buffers()
            found = real(*args)
            assert name != "validate" or all(map(torch.equal, buffers(), before))  # running statistics, too
            return found

        monkeypatch.setattr(run.task, name, spied)

    spy("train_step")
    spy("validate")
    run.run()
    assert seen == {"train_step": [{True}] * 5, "validate": [{False}] * BATCHES}


def test_two_processes_validate_what_one_does(tmp_path, run_file):
    path = str(run_file(kind="lightningdit"))
    for name, world_size in (("one", 1), ("two", 2)):
        micro = f"train.micro_batch_size={SIZE // (2 * world_size)}"
        command = ("train", "lightningdit", path, f"train.exp_name={name}", micro)
        assert launch(*command, world_size=world_size) == [0] * world_size
    one, two = (validated(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys()
    losses = [key for key in one if key.startswith("valid")]
    assert {"valid_ema/loss", "valid/loss", "valid_ema/loss_t0.3", "valid/loss_t0.7"} <= set(losses)
    assert {key: two[key] for key in losses} == pytest.approx({key: one[key] for key in losses}, abs=1e-4)


def test_a_rate_is_that_of_training_alone(tmp_path, run_file, monkeypatch):
    """Two seconds a step; a checkpoint of 100 s and a validation of 50 s count in no row."""
    now = [0.0]

    def lasts(owner, name, seconds):
        real = getattr(owner, name)

        def slow(*args, **kwargs):
            now[0] += seconds
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, slow)

    monkeypatch.setattr(progress, "Throughput", partial(Throughput, lambda: now[0]))
    lasts(trainer.Trainer, "train_step", 2.0)
    lasts(Evaluations, "_validate", 50.0)
    lasts(checkpoint, "save", 100.0)
    # In the background its seconds would fall anywhere.
    loop(run_file(max_steps=6, ckpt_every=2, log_every=1, background_save=False)).run()
    timed = [row for row in read_lines(tmp_path / "run") if "seconds_per_step" in row]
    assert [row["seconds_per_step"] for row in timed] == [2.0] * 6
    assert [row["images_per_second"] for row in timed] == [4.0] * 6
    assert [row["eta_seconds"] for row in timed] == [10.0, 8.0, 6.0, 4.0, 2.0, 0.0]
