"""What a run leaves is read as it is: rows of any version cut off anywhere, checkpoints, the lock, whole trees."""

import fcntl
import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from common.files import FileError
from launch.run_directory.checkpoints import list_checkpoints, stored_state
from launch.run_directory.find import find_runs
from launch.run_directory.rows import read_rows
from launch.runtime import run_lock
from launch.runtime.run_lock import NAME, Owner, read_lock
from launch.training import checkpoint
from tests import toy
from tests.children import exit_code
from tests.test_launch_run_lock import Alone, hold

_fork = multiprocessing.get_context("fork")


def write(path: Path, *rows, end: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows) + end)
    return path


def row(step: int, **values) -> dict:
    return {"step": step, "loss": 1.0, "lr": 0.1, "seconds_per_step": 36.0, **values}


def save(folder: Path, step: int, **facts) -> Path:
    state = toy.checkpoint_state(step, "lightningdit", **facts)
    tensors = {key: {"w": torch.ones(3)} for key in checkpoint.KEYS}
    return checkpoint.save(folder, state, {"model": tensors})


def test_rows_are_told_apart(tmp_path):
    path = write(
        tmp_path / "metrics.jsonl",
        row(10),
        {"step": 10, "valid_ema/loss": 2.0, "valid/loss": 3.0, "eta_seconds": 0.0},
        {"step": 10, "event": "saved", "pause_seconds": 0.1},
        row(20, valid=1),
    )
    found = read_rows(path)
    assert [r["step"] for r in found.training] == [10, 20] and len(found.validation) == 1
    assert [e["event"] for e in found.events] == ["saved"] and found.unreadable == 0
    assert found.last["step"] == 20 and read_rows(tmp_path / "none").last is None


@pytest.mark.parametrize("cut", range(1, 20))
def test_a_last_line_that_was_cut_short_is_no_row_and_no_damage(tmp_path, cut):
    path = write(tmp_path / "metrics.jsonl", row(10), end=json.dumps(row(20))[:cut])
    found = read_rows(path)
    assert [r["step"] for r in found.training] == [10] and found.unreadable == 0


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[1]",
        "null",
        '{"step": "3"}',
        '{"step": true}',
        '{"step": -1}',
        '{"step": 1%s}' % ("0" * 20),
        "\0\0",
        "\udcff",
    ],
)
def test_other_lines_are_counted_and_left_out(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(f"{json.dumps(row(1))}\n{line}\n{json.dumps(row(2))}\n".encode(errors="surrogateescape"))
    found = read_rows(path)
    assert [r["step"] for r in found.training] == [1, 2] and found.unreadable == 1


def test_rows_that_were_made_again_count_once(tmp_path):
    """As a version that did not cut them left them: 30 and 40 belong to what the resumed run made anew."""
    path = write(tmp_path / "metrics.jsonl", row(10), row(20), row(30), row(40), row(20, loss=5.0), row(30, loss=6.0))
    assert [(r["step"], r["loss"]) for r in read_rows(path).training] == [(10, 1.0), (20, 5.0), (30, 6.0)]


def test_hours_are_counted_by_the_rows_or_by_the_seconds_of_their_steps(tmp_path):
    old = read_rows(write(tmp_path / "old.jsonl", row(100), row(150, seconds_per_step=72.0)))
    assert old.hours().tolist() == [1.0, 2.0]
    new = read_rows(write(tmp_path / "new.jsonl", row(100, hours=1.5), row(150, hours=2.25)))
    assert new.hours().tolist() == [1.5, 2.25]
    mixed = read_rows(write(tmp_path / "mixed.jsonl", row(100), row(200, hours=0.5), row(300, hours=1.75)))
    assert mixed.hours().tolist() == [1.0, 2.0, 3.25]  # the newer version began to count when it took over
    whole = read_rows(write(tmp_path / "whole.jsonl", row(100), row(200, hours=2.5), row(300, hours=3.0)))
    assert whole.hours().tolist() == [1.0, 2.5, 3.0]
    silent = read_rows(write(tmp_path / "silent.jsonl", {"step": 1, "lr": 1}, row(2)))
    assert np.isnan(silent.hours()).all()


def test_numbers_alone_make_a_series(tmp_path):
    path = write(tmp_path / "m.jsonl", row(1), row(2, loss=None), row(3, loss=True), row(4, loss="x"), row(5, loss=2))
    values = read_rows(path).series("loss")
    assert values[[0, 4]].tolist() == [1.0, 2.0] and np.isnan(values[1:4]).all()


def test_a_log_that_is_no_file_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(FileError, match=r"metrics\.jsonl is a directory"):
        read_rows(tmp_path / "metrics.jsonl")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileError, match="named pipe"):  # and nothing waits for who writes into it
        read_rows(tmp_path / "pipe")


def test_checkpoints_are_whole_damaged_or_set_aside(tmp_path):
    for step in (8, 16, 24, 32):
        save(tmp_path, step)
    (tmp_path / "step_0000016" / "model.ema.safetensors").write_bytes(b"short")
    (tmp_path / "step_0000024" / "manifest.json").unlink()
    (tmp_path / "step_0000032").rename(tmp_path / "step_0000032.damaged")
    (tmp_path / ".step_0000040.tmp").mkdir()
    (tmp_path / "notes").mkdir()
    found = list_checkpoints(tmp_path)
    assert [c.step for c in found.whole] == [8] and found.newest.step == 8
    assert dict(found.damaged)["step_0000016"].startswith("model.ema.safetensors has 5 bytes of ")
    assert "no manifest.json" in dict(found.damaged)["step_0000024"]
    assert dict(found.damaged)["step_0000032.damaged"] == "set aside" and found.temporary == (".step_0000040.tmp",)
    assert stored_state(found)["step"] == 8 and list_checkpoints(tmp_path / "none").newest is None


def test_a_flipped_bit_is_found_where_checksums_are_compared(tmp_path):
    path = save(tmp_path, 8) / "model.ema.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert list_checkpoints(tmp_path).newest.step == 8
    found = list_checkpoints(tmp_path, verify=True)
    assert found.newest is None and "another SHA-256" in dict(found.damaged)["step_0000008"]


def test_a_damaged_state_leaves_the_one_before_to_tell(tmp_path):
    save(tmp_path, 8)
    path = save(tmp_path, 16) / "state.json"
    path.write_bytes(path.read_bytes().replace(b"lightningdit", b"lightningdot"))  # as long as before
    found = list_checkpoints(tmp_path)
    assert [c.step for c in found.whole] == [8, 16] and stored_state(found)["step"] == 8


def test_a_lock_is_read_and_stays_held(tmp_path):
    ready, released = _fork.Event(), _fork.Event()
    process = _fork.Process(target=hold, args=(tmp_path, ready, released))
    process.start()
    try:
        assert ready.wait(60)
        before = (tmp_path / NAME).stat()
        for _ in range(2):
            found = read_lock(tmp_path)
            assert found.held is True and found.owner.pid == process.pid
        assert (tmp_path / NAME).stat().st_mtime_ns == before.st_mtime_ns
        process.kill()
        process.join()
        found = read_lock(tmp_path)
        assert found.held is False and found.owner.pid == process.pid and (tmp_path / NAME).exists()
    finally:
        process.kill()
        process.join()


def _cannot_take(directory: Path) -> None:
    run_lock._held.clear()  # what the parent holds: only the system is to refuse it
    with pytest.raises(run_lock.DirectoryInUseError), run_lock.lock_directory(directory, Alone()):
        pass


def test_its_own_process_does_not_lose_a_lock_by_reading_it(tmp_path):
    """Of a lock of `lockf`, closing any handle of the file would free it."""
    with run_lock.lock_directory(tmp_path, Alone()):
        assert read_lock(tmp_path).held is True and read_lock(tmp_path).owner.pid == os.getpid()
        process = _fork.Process(target=_cannot_take, args=(tmp_path,))
        assert exit_code(process, 60) == 0
    assert read_lock(tmp_path) is None


@pytest.mark.parametrize(
    ("change", "held"), [({}, True), ({"pid": 1 << 30}, False), ({"host": "another"}, None), (None, None)]
)
def test_without_locks_host_and_process_decide(tmp_path, monkeypatch, change, held):
    def refuse(*args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "fcntl", refuse)
    owner = Owner.this_process().model_copy(update=change or {})
    (tmp_path / NAME).write_text("{" if change is None else owner.model_dump_json())
    assert read_lock(tmp_path).held is held


def test_a_lock_that_is_no_file_is_none(tmp_path):
    assert read_lock(tmp_path) is None
    os.mkfifo(tmp_path / NAME)
    assert read_lock(tmp_path) is None
    (tmp_path / NAME).unlink()
    (tmp_path / NAME).symlink_to("/etc/passwd")
    assert read_lock(tmp_path) is None
    assert fcntl.F_GETLK >= 0  # what the answer is asked by


def test_runs_are_found_at_any_depth_each_once_and_circles_end(tmp_path):
    for name in ("a", "b/c/d", "b/c"):
        write(tmp_path / name / "metrics.jsonl", row(1))
    save(tmp_path / "saved" / "checkpoints", 8)
    write(tmp_path / "failed" / "last_exit.json", {"status": 2})
    write(tmp_path / "begins" / NAME, "{}")
    write(tmp_path / "latents" / NAME, "{}")
    write(tmp_path / "latents" / "shard.safetensors", "x")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    (tmp_path / "b" / "circle").symlink_to(tmp_path)
    (tmp_path / "again").symlink_to(tmp_path / "a")
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent")
    write(tmp_path / "a" / "tensorboard" / "metrics.jsonl", row(1))
    found = [str(path.relative_to(tmp_path)) for path in find_runs(tmp_path)]
    assert found == ["a", "b/c", "b/c/d", "begins", "failed", "saved"]
    assert list(find_runs(tmp_path / "a")) == [tmp_path / "a"] and list(find_runs(tmp_path / "empty")) == []
