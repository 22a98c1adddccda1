"""Signals to a run, and errors in one of its processes: all leave, with the documented status and one message."""

import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest

import launch.__main__ as program
from launch.runtime import exit_status, heartbeat, processes
from launch.runtime.launcher import LaunchEnvironment
from launch.runtime.run_lock import DirectoryInUseError
from launch.training import checkpoint
from tests import toy
from tests.children import Moment, _strike, call, exit_code, free_port, launch, print_to
from tests.run_rows import rows

_fork = multiprocessing.get_context("fork")
STEP = "launch.training.engine:Engine"


@pytest.fixture
def run_file(tmp_path) -> str:
    data = {"data_path": str(toy.write_latents(tmp_path / "latents"))}
    train = {"output_dir": str(tmp_path), "log_every": 4, "ckpt_every": 100}
    return str(toy.write_run(tmp_path / "run.yaml", toy.LIGHTNINGDIT, data=data, train=train))


def last_exit(directory: Path) -> dict:
    return json.loads((directory / "last_exit.json").read_text())


def errors(log: Path) -> list[str]:
    """The lines of error of two processes."""
    said = "".join(Path(f"{log}.{rank}").read_text() for rank in (0, 1))
    assert "Traceback" not in said
    return [line for line in said.splitlines() if line.startswith("error:")]


# --- a signal


def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path, run_file):
    """Between two rows: the rows are then those of a run that was never stopped."""
    number = signal.SIGUSR1
    command = ("train", "lightningdit", run_file)
    assert launch(*command, "train.exp_name=whole", world_size=2) == [0, 0]
    assert last_exit(tmp_path / "whole") == {"status": 0, "reason": "done", "rank": 0, "step": 6}
    moment, log = Moment(STEP, "step", 2, number, rank=1), tmp_path / "log"
    statuses = launch(*command, "train.exp_name=stopped", world_size=2, at=moment, log=log)
    assert statuses == [exit_status.STOPPED] * 2
    assert checkpoint.newest(tmp_path / "stopped/checkpoints").step == 2
    assert not rows(tmp_path / "stopped")  # none is due before step 4
    assert last_exit(tmp_path / "stopped") == {"status": 75, "reason": "stopped by SIGUSR1", "rank": 0, "step": 2}
    said = [(tmp_path / f"log.{rank}").read_text() for rank in (0, 1)]
    assert f"stopped by {number.name} after step 2" in said[0] and "stopped by" not in said[1]
    assert launch(*command, "train.exp_name=stopped", world_size=2) == [0, 0]
    assert rows(tmp_path / "stopped") == rows(tmp_path / "whole")
    assert [row["step"] for row in rows(tmp_path / "whole")] == [4, 6]


def test_a_row_that_was_not_due_goes_on_on_another_number_of_processes(tmp_path, run_file):
    command = ("train", "lightningdit", run_file)
    assert launch(*command, "train.exp_name=whole") == [0]
    moment = Moment(STEP, "step", 3, signal.SIGTERM, rank=0)
    assert launch(*command, "train.exp_name=stopped", world_size=2, at=moment) == [exit_status.STOPPED] * 2
    assert launch(*command, "train.exp_name=stopped") == [0]
    for one, other in zip(rows(tmp_path / "stopped"), rows(tmp_path / "whole"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)


@pytest.mark.parametrize(
    ("moment", "status", "reason"),
    [
        (Moment(STEP, "step", 2, signal.SIGINT), exit_status.INTERRUPTED, "stopped by SIGINT"),
        (Moment("launch.train", "make_trainer", 1, signal.SIGUSR1), exit_status.STOPPED, "left at once by SIGUSR1"),
    ],
)
def test_ctrl_c_and_a_signal_before_the_first_step(tmp_path, run_file, moment, status, reason):
    assert launch("train", "lightningdit", run_file, at=moment, log=tmp_path / "log") == [status]
    found = last_exit(tmp_path / "run")
    assert (found["status"], found["reason"]) == (status, reason)
    newest = checkpoint.newest(tmp_path / "run/checkpoints")
    assert newest is None if moment.name == "make_trainer" else newest.step == 2


def _roll_back(run_file: str, moment: str) -> None:
    """Have a rollback due in every second step, and a signal come before the second one's end, or as it is judged."""
    from launch.training.incidents import Incidents
    from launch.training.rollback import Rollback

    def check(self, step: int, *_) -> None:
        if moment == "judged":
            os.kill(os.getpid(), signal.SIGTERM)
        raise Rollback(0, ((1, step, 7),), "bad steps")

    Incidents.check = check
    if moment == "trained":
        _strike(Moment(STEP, "step", 2, signal.SIGTERM))
    program.run(["train", "lightningdit", run_file, "train.log_every=2"])


@pytest.mark.parametrize("moment", ["trained", "judged"])
def test_a_signal_is_not_lost_in_a_rollback(tmp_path, run_file, moment):
    assert call(_roll_back, run_file, moment, world_size=1, limit=120) == [exit_status.STOPPED]
    reason = {"trained": "stopped by SIGTERM", "judged": "left at once by SIGTERM"}[moment]
    assert last_exit(tmp_path / "run")["reason"] == reason
    if moment == "trained":
        assert checkpoint.newest(tmp_path / "run/checkpoints").step == 2


def _leave_with_words(path: str) -> None:
    sys.stdout = open(path, "w")  # noqa: SIM115 what is left in it must be written out
    sys.stdout.write("last words")
    heartbeat.leave_at_once(signal.SIGTERM)


def test_who_leaves_at_once_still_says_what_it_had_to_say(tmp_path):
    assert exit_code(_fork.Process(target=_leave_with_words, args=[str(tmp_path / "said")])) == exit_status.STOPPED
    assert (tmp_path / "said").read_text() == "last words"


# --- an error


def test_what_a_loader_process_cannot_read_ends_the_run_with_a_sentence(tmp_path):
    broken = toy.write_images(tmp_path / "images") / "class0/broken.png"
    broken.write_bytes(b"\x89PNG cut short")
    data = {"data_path": str(tmp_path / "images"), "num_workers": 2}
    path = toy.write_run(tmp_path / "run.yaml", toy.VAVAE, data=data, train={"output_dir": str(tmp_path)})
    assert launch("train", "vavae", str(path), log=tmp_path / "log", limit=120) == [2]
    said = (tmp_path / "log.0").read_text()
    assert f"error: cannot read image {broken}" in said and "Traceback" not in said
    assert last_exit(tmp_path / "run")["reason"].startswith(f"cannot read image {broken}")


@pytest.mark.parametrize(("lost", "number"), [(1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_a_lost_process_ends_the_others_with_one_message(tmp_path, run_file, lost, number):
    """Killed, or stopped, beside one whose main thread waits for it in a collective."""
    moment, patience = Moment(STEP, "step", 2, number, rank=lost), 2.0 if number == signal.SIGSTOP else 30.0
    command = ("train", "lightningdit", run_file, f"train.heartbeat_timeout={patience}")
    statuses = launch(*command, world_size=2, at=moment, log=tmp_path / "log")
    assert statuses[lost] == -signal.SIGKILL and statuses[1 - lost] == exit_status.LOST_PEER
    (message,) = errors(tmp_path / "log")
    how = "was killed or ended without a word" if number == signal.SIGKILL else "has been stopped for 2 s"
    assert message.startswith(f"error: rank {lost} (process ") and how in message
    found = last_exit(tmp_path / "run")
    assert found["status"] == exit_status.LOST_PEER and how in found["reason"] and found["rank"] == 1 - lost


def _fail(step: int, error: Exception):
    """Have Engine.step raise."""
    from launch.training.engine import Engine

    real, calls = Engine.step, iter(range(1, 1 << 30))

    def failing(self):
        if next(calls) == step:
            raise error
        return real(self)

    Engine.step = failing


def _train_and_fail(run_file: str, log: str, failing: tuple[int, ...]) -> None:
    rank = int(os.environ["RANK"])
    print_to(f"{log}.{rank}")
    from launch.__main__ import run

    if rank in failing:
        _fail(3, ValueError("no good"))
    run(["train", "lightningdit", run_file])


@pytest.mark.parametrize("failing", [(1,), (0, 1)])
def test_an_error_is_said_once_by_the_process_that_met_it(tmp_path, run_file, failing):
    statuses = call(_train_and_fail, run_file, str(tmp_path / "log"), failing, world_size=2)
    assert statuses == [exit_status.ERROR] * 2
    (message,) = errors(tmp_path / "log")
    said_by = tuple(f"error: rank {rank} (process " for rank in failing)  # whichever met it first
    assert message.startswith(said_by) and message.endswith(": no good")
    assert last_exit(tmp_path / "run") == {"status": 2, "reason": "no good", "rank": 0, "step": 3}


def _fail_before_all_have_met(run_file: str, log: str, failing: int) -> None:
    rank = int(os.environ["RANK"])
    print_to(f"{log}.{rank}")
    from launch.__main__ import run

    if rank == 0:  # by then the other one waits, or has failed: nobody listens yet
        time.sleep(3.0)
    run(["train", "lightningdit", run_file, *(["train.no_such_key=1"] if rank == failing else [])])


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_before_all_have_met_ends_the_others_too(tmp_path, run_file, failing):
    statuses = call(_fail_before_all_have_met, run_file, str(tmp_path / "log"), failing, world_size=2)
    assert statuses == [exit_status.ERROR] * 2
    (message,) = errors(tmp_path / "log")
    assert message.startswith(f"error: rank {failing} (process ") and "no_such_key" in message


def test_what_another_start_may_find_changed_has_a_status_that_says_so(monkeypatch):
    monkeypatch.setattr(processes, "_meeting", False)
    monkeypatch.setattr(processes, "RENDEZVOUS_TIMEOUT", timedelta(seconds=0.2))
    with pytest.raises(processes.NoMeetingError, match="not all of WORLD_SIZE 2 processes have come") as alone:
        processes.rendezvous(LaunchEnvironment(0, 2, 0, "127.0.0.1", free_port()))
    with socket.create_server(("", 0)) as server, pytest.raises(processes.PortInUseError, match="in use") as taken:
        processes.rendezvous(LaunchEnvironment(0, 2, 0, "127.0.0.1", server.getsockname()[1]))
    assert [program._status(each.value) for each in (alone, taken)] == [exit_status.LOST_PEER, exit_status.IN_USE]
    assert program._status(DirectoryInUseError("x")) == exit_status.IN_USE


def test_a_launchers_signal_ends_the_wait_for_a_process_that_may_still_come(monkeypatch):
    monkeypatch.setattr(processes, "hurry", threading.Event())
    monkeypatch.setattr(program, "_ending", True)
    threading.Timer(0.2, program._leave_at_once, [signal.SIGTERM]).start()
    begin = time.monotonic()
    assert not processes._comes(LaunchEnvironment(1, 2, 0, "127.0.0.1", free_port()))
    assert time.monotonic() - begin < processes.ANNOUNCE_PATIENCE / 2


def _lose_the_reader() -> None:
    told = []
    heartbeat.end_all = lambda *args: told.append(args)
    program._program = lambda argv: os.write(_closed_pipe(), b"text")
    status = program.main([])
    os._exit(7 if [(status, None)] == [(each[0], each[2]) for each in told] and status == 141 else 1)


def _closed_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def test_a_reader_that_goes_ends_all_processes_in_order():
    assert exit_code(_fork.Process(target=_lose_the_reader)) == 7


def test_a_package_that_is_not_ours_on_one_machine_is_told_to_the_others(monkeypatch, capsys):
    told = []
    monkeypatch.setattr(program, "_ending", False)
    monkeypatch.setattr(processes, "announce_failure", lambda *args: told.append(args))
    monkeypatch.setattr(program.packages, "foreign_packages", lambda: {"common": "common is another one's"})
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert program.main(["train"]) == 2 and told == [(2, "common is another one's")]
    assert capsys.readouterr().err == "error: common is another one's\n"
