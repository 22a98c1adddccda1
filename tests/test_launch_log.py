"""Means, rows and the cutting of rows that a resumed run writes again."""

import json
import shutil
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.files import WriteError
from launch.training.log import CHECK_SECONDS, Meter, RunLog, describe
from launch.training.progress import Throughput
from launch.training.writers import truncate_rows


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def row(step, **values):
    return {
        "step": step,
        "last_step": 9,
        "epoch": step / 4,
        "images": step * 8,
        "global_batch_size": 8,
        "eta_seconds": 1.0,
        **values,
    }


def test_the_meter_gives_means_and_starts_anew():
    meter = Meter()
    for value in (1.0, 2.0, 6.0):
        meter.add({"loss": torch.tensor(value), "twice": torch.tensor(2 * value, dtype=torch.bfloat16)})
    meter.add({"norm": torch.tensor(5.0)})
    assert meter.read() == {"loss": 3.0, "twice": 6.0, "norm": 5.0}
    assert meter.read() == {}


def test_skipped_steps_do_not_spoil_a_mean():
    meter = Meter()
    for value in (1.0, float("nan"), 3.0, float("inf")):
        meter.add({"loss": torch.tensor(value), "bad": torch.tensor(float("nan"))})
    assert meter.read() == {"loss": 2.0, "bad": None}


def test_a_mean_over_samples_is_of_those_that_have_the_number():
    """Whatever micro-batches they come in; where none has it there is no mean."""
    meter, nan = Meter(), float("nan")
    for samples in ([1.0, 2.0, 6.0], [nan, 7.0, nan], [nan, nan, nan]):
        meter.add({"loss_t0.1": torch.tensor(samples), "none": torch.full((3,), nan)}, 0.5)
    assert meter.read() == {"loss_t0.1": 4.0, "none": None}


def test_integers_are_added_up():
    meter = Meter()
    for count in (1, 0, 3):
        meter.add({"unreadable": torch.tensor(count), "loss": torch.tensor(1.0)})
    got = meter.read()
    assert got == {"unreadable": 4, "loss": 1.0} and isinstance(got["unreadable"], int)
    meter.add({"unreadable": torch.tensor(0)})
    assert meter.read() == {"unreadable": 0}


def test_tensorboard_gets_the_numbers_of_every_row(tmp_path):
    """Read back by TensorBoard itself; a resumed run's scalars replace those after its checkpoint."""
    log = RunLog(tmp_path, 0, 9)
    for step in (2, 4, 6):
        log.write_row(row(step, loss=step / 8, unreadable=step, gone=None))
    log.close()
    log = RunLog(tmp_path, 4, 9)
    log.write_row(row(6, loss=10.0))
    log.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    numbers = {"loss", "unreadable", "last_step", "epoch", "images", "global_batch_size", "eta_seconds"}
    assert set(board.Tags()["scalars"]) == numbers
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [(2, 0.25), (4, 0.5), (6, 10.0)]
    assert [(e.step, e.value) for e in board.Scalars("unreadable")] == [(2, 2.0), (4, 4.0)]
    RunLog(tmp_path / "none", 0, 9, tensorboard=False).close()
    assert not (tmp_path / "none" / "tensorboard").exists()


def test_rows_after_the_checkpoint_are_cut(tmp_path):
    log = RunLog(tmp_path, 0, 9, tensorboard=False)
    for step in (2, 4, 6):
        log.write_row(row(step, loss=float(step)))
    log.close()
    with log.path.open("a") as f:
        f.write('{"step": 8, "lo')  # what a kill leaves
    log = RunLog(tmp_path, 4, 9, tensorboard=False)
    log.write_row(row(6, loss=60.0))
    log.close()
    assert [(r["step"], r["loss"]) for r in rows(log.path)] == [(2, 2.0), (4, 4.0), (6, 60.0)]


def test_cutting_nothing_leaves_the_file_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    before = path.stat().st_mtime_ns
    truncate_rows(path, 5)
    assert path.stat().st_mtime_ns == before


def test_a_run_directory_that_is_gone_is_found_between_rows(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with closing(RunLog(tmp_path / "run", 0, 10, tensorboard=False)) as run_log:
        (tmp_path / "run").rename(tmp_path / "moved")
        run_log.step()
        now[0] += CHECK_SECONDS
        with pytest.raises(WriteError, match="is gone"):
            run_log.step()


@pytest.mark.parametrize("tensorboard", [False, True])
@pytest.mark.parametrize("loss", ["removed", "replaced"])
def test_a_log_that_is_gone_is_found_at_the_next_row(tmp_path, loss, tensorboard):
    log = RunLog(tmp_path / "run", 0, 9, tensorboard=tensorboard)
    log.write_row(row(2, loss=1.0))
    shutil.rmtree(tmp_path / "run")
    if loss == "replaced":
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "metrics.jsonl").touch()
    with pytest.raises(WriteError, match=r"run/metrics\.jsonl is gone"):
        log.write_row(row(4, loss=1.0))
    log.close()


@pytest.mark.parametrize("name", ["metrics.jsonl", "tensorboard"])
def test_a_log_that_cannot_be_written_is_named(tmp_path, monkeypatch, name):
    log = RunLog(tmp_path, 0, 9)
    file = log._file if name == "metrics.jsonl" else log._writers[1]._records._writer
    file.close()
    file._file = Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115
    with pytest.raises(WriteError, match=rf"cannot write .*{name}.*: No space left on device"):
        log.write_row(row(2, loss=1.0))
    log.close()


@pytest.mark.parametrize("damage", [b'{"step": 3', b"[]\n", b"7\n", b'{"loss": 1}\n', b"\xff\xfe\n", b'{"step": 3}'])
def test_what_is_no_row_is_cut(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + damage)
    truncate_rows(path, 5)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_a_line_says_step_epoch_images_and_batch():
    text = describe(row(3, loss=0.12345, skipped=0))
    assert "step       3/9  epoch 0.75  images 24  (batch 8)" in text and "loss 0.1235" in text
    assert "skipped" not in text and "skipped 2" in describe(row(3, skipped=2))


def scripted(*times: float):
    """A clock that shows these seconds, one after the other."""
    return iter(times).__next__


def test_every_figure_of_the_throughput(tmp_path):
    throughput = Throughput(scripted(0.0, 100.0, 106.0, 108.0))
    throughput.start(10)  # at 100 s
    assert throughput.read(13, 43, 512) == {"seconds_per_step": 2.0, "images_per_second": 256.0, "eta_seconds": 60.0}
    assert throughput.read(17, 43, 512) == {"seconds_per_step": 0.5, "images_per_second": 1024.0, "eta_seconds": 13.0}


@pytest.mark.parametrize(("seconds", "said"), [(59.4, "0m59s"), (60, "1m00s"), (3599.4, "59m59s"), (7380, "2h03m")])
def test_the_time_left_is_said_in_hours_and_minutes(seconds, said):
    assert describe(row(3) | {"eta_seconds": seconds}).endswith(f"eta {said}")


def test_a_meter_goes_on_from_what_it_had(tmp_path):
    """Through JSON, and whoever goes on: a mean is of steps, whatever parts they came in."""
    parts = [Meter(), Meter()]
    for meter, value in zip(parts, (1.0, 3.0), strict=True):  # a step in two parts
        meter.add({"loss": torch.tensor(value), "unreadable": torch.tensor(1)}, 0.5)
    states = json.loads(json.dumps([meter.state_dict() for meter in parts]))
    for world_size in (1, 2, 3):
        found = [Meter() for _ in range(world_size)]
        for rank, meter in enumerate(found):
            meter.load_state_dicts(states, rank, world_size, torch.device("cpu"))
        sums = [meter.state_dict()["sums"] for meter in found]
        assert [sum(s["loss"][i] for s in sums) for i in (0, 1)] == [2.0, 1.0]
        assert sum(s["unreadable"][0] for s in sums) == 2
        assert world_size != 2 or [meter.state_dict() for meter in found] == states
    alone = Meter()
    alone.load_state_dicts(states, 0, 1, torch.device("cpu"))
    alone.add({"loss": torch.tensor(5.0), "unreadable": torch.tensor(0)}, 1.0)  # the next step, whole
    assert alone.read() == {"loss": 3.5, "unreadable": 2}
