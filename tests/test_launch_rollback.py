"""Where a rollback goes back to and what is set aside for it, by losses and checkpoints that are made up."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common.files import read_json
from launch.runtime.processes import Processes
from launch.training import checkpoint
from launch.training.config import TrainConfig
from launch.training.dump import RunParts
from launch.training.incidents import Incidents
from launch.training.loader import BatchSplit, SampleOrder
from launch.training.optimizer import NonFiniteError
from launch.training.restore import agree_on_start
from launch.training.rollback import Rollback
from tests import toy

CPU = Processes(0, 1, torch.device("cpu"))
NAN, INF = float("nan"), float("inf")


class Run:
    """A run of one network, of which there is nothing but its losses; steps whose loss is not finite are skipped."""

    def __init__(self, directory: Path, monkeypatch, **train):
        section = TrainConfig(**{"log_every": 200, "global_batch_size": 8, **train})
        optimizer = SimpleNamespace(reset_most_skipped=lambda: None)
        self.parts = RunParts(
            config=SimpleNamespace(directory=directory, train=section, last_step=10**6),
            task=object(),
            engines={"model": SimpleNamespace(optimizer=optimizer)},
            order=SampleOrder(20, 8, 0),
            split=BatchSplit(8, 1, 8),
            processes=CPU,
        )
        self.saved: list[int] = []
        self.step, self.counters = 0, {"applied": 0, "skipped": 0, "skipped_in_a_row": 0, "most_skipped_in_a_row": 0}
        self.incidents = Incidents(self.parts, 0, save=lambda: self.saved.append(self.step))
        monkeypatch.setattr("launch.training.incidents.write_dump", lambda *args, **facts: directory / "dump")

    def resume(self, step: int, state: dict) -> "Run":
        self.step, self.incidents = step, Incidents(self.parts, step, save=lambda: self.saved.append(self.step))
        self.incidents.load_state_dict(state)
        return self

    def train(self, losses: dict[range, float], until: int) -> None:
        """Train to a step and have its row checked; a step's loss is that of its range, else about 1."""
        for step in range(self.step + 1, until + 1):
            self.step = step
            loss = next((loss for steps, loss in losses.items() if step in steps), 1 + 0.01 * (step % 7))
            skipped = not torch.tensor(loss).isfinite()
            self.incidents.begin_step(step)
            self.incidents.add_loss(step, "model", torch.tensor(loss))
            self.incidents.end_step(step, {"model": torch.tensor([skipped, skipped])})
            self.counters["skipped" if skipped else "applied"] += 1
            self.counters["skipped_in_a_row"] = in_a_row = skipped * (self.counters["skipped_in_a_row"] + 1)
            self.counters["most_skipped_in_a_row"] = max(self.counters["most_skipped_in_a_row"], in_a_row)
        self.incidents.figures(until)
        self.incidents.check(until, {"step": until}, {}, {"model": self.counters})


def save(run: Path, *steps: int, losses: dict | None = None) -> None:
    """Checkpoints of one weight."""
    for step in steps:
        state = toy.checkpoint_state(step, "toy") | ({} if losses is None else {"losses": losses})
        tensors = {"model": {key: {"w": torch.ones(3)} for key in checkpoint.KEYS}}
        checkpoint.save(run / "checkpoints", state, tensors)


def names(run: Path) -> list[str]:
    return sorted(path.name.removeprefix("step_00000") for path in (run / "checkpoints").iterdir())


def damage(run: Path, step: int) -> None:
    path = run / f"checkpoints/step_{step:07d}/model.model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")


@pytest.mark.parametrize(
    ("losses", "step", "last"),
    [
        ({range(101, 151): 9.0, range(151, 171): NAN}, 75, 170),
        ({range(141, 181): 9.0, range(181, 201): INF}, 75, 200),
        ({range(101, 111): 9.0, range(111, 131): NAN, range(131, 181): 9.0}, 75, 180),
        ({range(149, 152): 9.0, range(152, 172): NAN, range(172, 201): 9.0}, 145, 171),
        ({range(120, 140): NAN, range(140, 191): 9.0}, 75, 190),
        ({range(141, 150): 9.0, range(151, 171): NAN}, 150, 170),
        ({range(151, 171): NAN, range(198, 201): 9.0}, 150, 170),
    ],
    ids=["lasting", "short", "on both sides", "few", "after it", "that ended before", "long after"],
)
def test_a_spike_that_ends_in_skipped_steps_is_gone_back_from_as_a_whole(tmp_path, monkeypatch, losses, step, last):
    """One that ended, or begins later, is nothing to do with them."""
    save(tmp_path, 75, 145, 150)
    run = Run(tmp_path, monkeypatch)
    with pytest.raises(Rollback) as caught:
        run.train(losses, 200)
    assert (caught.value.step, caught.value.redrawn) == (step, ((step + 1, last, 1),))


@pytest.mark.parametrize(("damaged", "step"), [((), 155), ((155,), 160)])
def test_the_first_checkpoint_among_skipped_steps_will_do_where_none_is_from_before(
    tmp_path, monkeypatch, damaged, step
):
    """Its weights are those of the later ones, and more of the steps are drawn anew."""
    save(tmp_path, 155, 160, 165)
    for each in damaged:
        damage(tmp_path, each)
    with pytest.raises(Rollback) as caught:
        Run(tmp_path, monkeypatch).train({range(151, 171): NAN}, 200)
    assert (caught.value.step, caught.value.redrawn) == (step, ((step + 1, 170, 1),))


def test_weights_of_a_spike_that_ends_in_skipped_steps_are_not_saved(tmp_path, monkeypatch):
    for start, saved in ((141, []), (181, [200])):
        run = Run(tmp_path, monkeypatch, rollbacks=0)
        with pytest.raises(NonFiniteError, match="20 steps in a row up to step 200 had"):
            run.train({range(181, 201): NAN, range(start, 181): 9.0}, 200)
        assert run.saved == saved


def test_a_spike_that_lasted_is_gone_back_from_after_a_restart_too(tmp_path, monkeypatch):
    """Which a save of the steps between it and the row knows of; a run that watches for none forgets it."""
    save(tmp_path, 75)
    stopped = Run(tmp_path, monkeypatch)
    with pytest.raises(Rollback) as undisturbed:
        stopped.train({range(101, 156): 9.0}, 200)
    stopped = Run(tmp_path, monkeypatch)
    monkeypatch.setattr(stopped.incidents, "check", lambda *row: None)
    stopped.train({range(101, 156): 9.0}, 170)
    save(tmp_path, 170, losses=stopped.incidents.state_dict()["losses"])
    state = checkpoint.newest(tmp_path / "checkpoints").state
    Run(tmp_path, monkeypatch, spike_steps=None).resume(170, state).train({}, 200)
    with pytest.raises(Rollback) as caught:
        Run(tmp_path, monkeypatch).resume(170, state).train({}, 200)
    assert caught.value.step == 75 and caught.value.redrawn == undisturbed.value.redrawn == ((76, 155, 1),)
    del state["losses"]["found"]  # as an earlier version wrote it
    Run(tmp_path, monkeypatch).resume(170, state).train({}, 200)


def test_checkpoints_are_set_aside_newest_first_once_a_whole_one_is_found(tmp_path, monkeypatch):
    save(tmp_path, 10, 15, 20, 25)
    damage(tmp_path, 15)
    order, set_aside = [], checkpoint.set_aside
    monkeypatch.setattr(checkpoint, "set_aside", lambda path, *how: (order.append(path.name), set_aside(path, *how))[1])
    run = Run(tmp_path, monkeypatch, log_every=40, max_skipped_in_a_row=5)
    with pytest.raises(Rollback) as caught:
        run.train({range(17, 23): NAN}, 40)
    assert (caught.value.step, caught.value.redrawn) == (10, ((11, 22, 1),)) and "step 10" in caught.value.line()
    assert names(tmp_path) == ["10", "15.damaged", "20.rolled_back", "25.rolled_back"]
    assert order == ["step_0000025", "step_0000020", "step_0000015"]
    assert agree_on_start(tmp_path / "checkpoints", TrainConfig(), CPU).step == 10


@pytest.mark.parametrize(
    ("damaged", "train", "said"),
    [((10, 15), {}, "no checkpoint in .* is whole"), ((15,), {"resume": "strict"}, "train.resume is strict")],
)
def test_where_none_is_whole_nothing_is_set_aside(tmp_path, monkeypatch, caplog, damaged, train, said):
    save(tmp_path, 10, 15, 20, 25)
    for step in damaged:
        damage(tmp_path, step)
    run = Run(tmp_path, monkeypatch, log_every=80, spike_window=32, spike_steps=5, **train)
    with pytest.raises(NonFiniteError, match=r"no whole checkpoint from before them is kept .*; see "):
        run.train({range(17, 23): 9.0}, 80)
    assert names(tmp_path) == ["10", "15", "20", "25"] and run.saved == []
    assert any(re.search(said, record.getMessage()) for record in caplog.records)


def test_a_run_that_goes_on_takes_its_own_checkpoint_whatever_its_start_was(tmp_path):
    """Also where `train.ckpt` names one that is set aside by then."""
    save(tmp_path, 10, 20)
    own = tmp_path / "checkpoints"
    sections = [TrainConfig(resume=False), TrainConfig(ckpt=str(own / "step_0000020")), TrainConfig(resume="strict")]
    checkpoint.set_aside(own / "step_0000020", "rolled_back")
    for train in sections:
        assert agree_on_start(own, train, CPU, going_on=True).step == 10
    assert read_json(own / "step_0000010/manifest.json")["step"] == 10
