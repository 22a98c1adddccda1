"""The program `status`: states of runs, what happened to them, tables that fit, and whatever else lies around."""

import json
import os
from pathlib import Path

import pytest

from launch.__main__ import main
from launch.run_directory.summary import summarize
from launch.runtime.run_lock import NAME, Owner, lock_directory
from launch.status import as_text, remarks
from launch.text_tables import width
from tests.test_launch_run_directory import row, save, write
from tests.test_launch_run_lock import Alone


def a_run(path: Path, step: int = 20, **values) -> Path:
    values = {"mse": 0.5, "images_per_second": 100.0, "eta_seconds": 3600.0, "epoch": 1.5, "skipped": 0} | values
    write(path / "metrics.jsonl", row(step, last_step=40, **values))
    return path


def exited(path: Path, **content) -> Path:
    write(path / "last_exit.json", json.dumps(content))
    return path


def left_lock(path: Path) -> Path:
    write(path / NAME, Owner.this_process().model_copy(update={"pid": 1 << 30}).model_dump_json())
    return path


@pytest.mark.parametrize(
    ("make", "state"),
    [
        (lambda p: a_run(p), "stopped"),
        (lambda p: a_run(p, 40), "finished"),
        (lambda p: left_lock(a_run(p)), "killed"),
        (lambda p: left_lock(exited(a_run(p), status=75)), "killed"),  # of an earlier start
        (lambda p: left_lock(a_run(p, 40)), "finished"),
        (lambda p: exited(a_run(p), status=75, reason="SIGTERM", time=1e9), "stopped"),
        (lambda p: exited(a_run(p), status=130), "stopped"),
        (lambda p: exited(a_run(p), status=2, reason="disk full"), "failed"),
        (lambda p: exited(a_run(p), status=65), "failed"),
        (lambda p: exited(a_run(p), status=0), "stopped"),
        (lambda p: exited(a_run(p, 40), status=0), "finished"),
        (lambda p: exited(a_run(p, 40), status=2, reason="no space for the checkpoint"), "failed"),
        (lambda p: exited(p, status=2, reason="no such data"), "failed"),
    ],
)
def test_states(tmp_path, make, state):
    found = summarize(make(tmp_path / "run"))
    assert found.state == state and found.eta_seconds is None
    assert (found.reason is None) == (
        not (tmp_path / "run" / "last_exit.json").exists() or "reason" not in exit_of(tmp_path)
    )


def exit_of(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "run" / "last_exit.json").read_text())


def test_a_running_one_has_its_process_and_the_time_left(tmp_path):
    exited(a_run(tmp_path), status=2, reason="an earlier start")
    with lock_directory(tmp_path, Alone()):
        written = (tmp_path / "metrics.jsonl").stat().st_mtime
        found = summarize(tmp_path, now=written + 600)
    assert found.state == "running" and f"process {os.getpid()} on " in found.process
    assert found.eta_seconds == pytest.approx(3000) and found.ended is None
    assert found.reason is None and found.exit_status is None
    assert "0h50m left" in as_text([found], tmp_path, 120)[1]


def test_an_exit_before_the_last_rows_is_of_an_earlier_start(tmp_path):
    exited(a_run(tmp_path), status=2, reason="an earlier start")
    os.utime(tmp_path / "last_exit.json", (1e9, 1e9))
    assert summarize(tmp_path).state == "stopped" and summarize(tmp_path).reason is None


@pytest.mark.parametrize(
    ("said", "ended"), [(1.5e9, 1.5e9), ("2020-01-01T00:00:00+00:00", 1577836800.0), ("soon", None), (None, None)]
)
def test_when_it_ended_is_what_it_says_or_the_files_time(tmp_path, said, ended):
    exited(a_run(tmp_path), status=2, time=said)
    assert summarize(tmp_path).ended == (ended or (tmp_path / "last_exit.json").stat().st_mtime)


def test_what_happened_to_a_run_is_told(tmp_path):
    a_run(tmp_path, skipped=3)
    with open(tmp_path / "metrics.jsonl", "a") as f:
        events = [
            {"step": 8, "event": "resumed", "checkpoint": "step_0000008"},
            {"step": 12, "event": "rollback"},
            {"step": 16, "event": "resumed"},
        ]
        f.write("".join(json.dumps(event) + "\n" for event in [*events, {"step": 20, "valid_ema/mse": 0.4}]))
    save(tmp_path / "checkpoints", 16, redrawn=[[9, 12, 1]])
    (save(tmp_path / "checkpoints", 24) / "state.json").unlink()
    (tmp_path / "checkpoints" / ".step_0000032.tmp").mkdir()
    found = summarize(tmp_path)
    assert found.kind == "lightningdit" and found.checkpoint == 16 and found.skipped == 3
    assert found.losses["mse"] == 0.5 and found.losses["valid_ema/mse"] == 0.4
    assert remarks(found) == [
        "resumed 2 times, last at step 16",
        "3 steps skipped",
        "rolled back at step 12",
        "steps drawn anew, [first, last, seed]: [[9, 12, 1]]",
        "checkpoint step_0000024: state.json is missing",
        "left half-written: .step_0000032.tmp",
    ]


def test_the_start_that_a_run_was_given_is_told(tmp_path):
    a_run(tmp_path)
    config = {section: {} for section in ("data", "model", "optimizer")} | {"train": {"ckpt": "old/step_0000005"}}
    save(tmp_path / "checkpoints", 16, config=config)
    assert remarks(summarize(tmp_path)) == [
        "resumed started from old/step_0000005 (train.ckpt)".removeprefix("resumed ")
    ]


def test_a_checkpoint_alone_tells_where_a_run_is(tmp_path):
    save(tmp_path / "checkpoints", 16, last_step=40)
    found = summarize(tmp_path)
    assert (found.kind, found.step, found.last_step, found.state) == ("lightningdit", 16, 40, "stopped")


@pytest.mark.parametrize("limit", [60, 80, 100, 140])
def test_the_table_fits_a_terminal(tmp_path, limit):
    runs = [summarize(a_run(tmp_path / ("a" * 60) / name)) for name in ("x", "日本語" * 9, "y\x1b[31m")]
    lines = [line for line in as_text(runs, tmp_path, limit) if not line.startswith(" ")]
    assert max(map(width, lines)) <= limit and len(lines) == 4
    assert all("20/40" in line and "mse 0.5" in line and "\x1b" not in line for line in lines[1:])
    assert ("kind" in lines[0]) == (limit >= 100)


def test_the_program_lists_all_and_ends_with_0(tmp_path, capsys):
    a_run(tmp_path / "one")
    exited(a_run(tmp_path / "two" / "deep", 40), status=2, reason="a\nreason")
    assert main(["status", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == "run" and lines[1].startswith("one ") and lines[2].startswith("two/deep ")
    assert lines[3] == "    exit status 2: a\\nreason"
    assert main(["status", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [run["state"] for run in found] == ["stopped", "failed"] and found[1]["exit_status"] == 2
    assert main(["status", str(tmp_path / "one")]) == 0 and capsys.readouterr().out.splitlines()[1].startswith("one ")
    assert main(["status", str(tmp_path / "none")]) == 2 and "none does not exist" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["status", str(tmp_path / "empty")]) == 0
    assert capsys.readouterr().out == f"no runs at or below {tmp_path / 'empty'}\n"


def test_verify_compares_checksums(tmp_path, capsys):
    path = save(tmp_path / "checkpoints", 8) / "model.exp_avg.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert main(["status", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["checkpoint"] == 8
    assert main(["status", str(tmp_path), "--verify", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["checkpoint"] is None and "SHA-256" in found["damaged"]["step_0000008"]


GARBAGE = ["", "{", "[]", "null", '"text"', "\0" * 100, '{"step": 1e400}', "[" * 100_000, '{"status": [], "time": {}}']


@pytest.mark.parametrize("content", GARBAGE)
@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "last_exit.json", NAME, "checkpoints/step_0000008/manifest.json", "checkpoints"]
)
def test_whatever_lies_there_is_survived_and_left_as_it_is(tmp_path, name, content):
    a_run(tmp_path / "run")
    save(tmp_path / "run" / "checkpoints", 8)
    path = tmp_path / "run" / name
    if path.is_dir():
        path.rename(tmp_path / "moved")
    path.write_text(content)
    before = {str(p): p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    found = summarize(tmp_path / "run")
    assert "\n".join(as_text([found], tmp_path, 120)) and json.dumps(found.to_json(), allow_nan=False)
    assert {str(p): p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("name", ["metrics.jsonl", "last_exit.json", NAME, "checkpoints"])
def test_pipes_folders_and_dead_links_are_survived(tmp_path, name):
    for make in (os.mkfifo, os.mkdir, lambda path: os.symlink("absent", path), lambda path: os.symlink(path, path)):
        run = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        a_run(run)
        (run / name).unlink(missing_ok=True)
        make(run / name)
        assert summarize(run).state in ("stopped", "unknown")
