"""Signals to a run, and errors in one of its processes: all leave, with the documented status and one message."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from launch.runtime import exit_status, lifetime
from launch.runtime.lifetime import StopRequest
from launch.training import checkpoint
from tests import toy
from tests.children import Moment, call, launch
from tests.run_rows import rows

_fork = multiprocessing.get_context("fork")
STEP = "launch.training.engine:Engine"


@pytest.fixture
def run_file(tmp_path) -> str:
    data = {"data_path": str(toy.write_latents(tmp_path / "latents"))}
    train = {"output_dir": str(tmp_path), "log_every": 4, "ckpt_every": 100, "heartbeat_timeout": 2.0}
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


def _get(numbers, pause: float, blocked: bool) -> None:
    """Get two signals in a process that would go on after the first, and blocks its main thread after it or not."""
    with StopRequest(lambda number: os._exit(exit_status.of_signal(number))) as stop:
        os.kill(os.getpid(), numbers[0])
        assert stop.number == numbers[0]
        if os.fork() == 0:
            time.sleep(pause)
            os.kill(os.getppid(), numbers[1])
            os._exit(0)
        if blocked:  # as in a collective: Python's handlers do not run
            signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGCHLD,))
            multiprocessing.connection.wait([], timeout=0)
            os.wait()
            _hold_main_thread()
        else:
            os.wait()
            time.sleep(0.3)
        assert stop.number == numbers[0]
    assert all(signal.getsignal(number) is signal.SIG_IGN for number in lifetime.STOP_SIGNALS)  # it is leaving
    os._exit(7)


def _hold_main_thread() -> None:
    """Wait in C for longer than a test takes, without Python's lock and in spite of signals."""
    import ctypes

    end = time.monotonic() + 5
    while (left := end - time.monotonic()) > 0:
        ctypes.CDLL(None).poll(None, 0, int(1000 * left))


@pytest.mark.parametrize(
    ("numbers", "pause", "status"),
    [
        ((signal.SIGINT, signal.SIGINT), 0.1, 7),
        ((signal.SIGINT, signal.SIGINT), 0.8, 130),
        ((signal.SIGTERM, signal.SIGINT), 0.8, 130),
        ((signal.SIGUSR1, signal.SIGTERM), 0.8, 7),
        ((signal.SIGTERM, signal.SIGTERM), 0.8, 7),
    ],
)
def test_a_second_ctrl_c_ends_at_once_and_copies_do_not(numbers, pause, status):
    process = _fork.Process(target=_get, args=(numbers, pause, False))
    process.start()
    process.join(60)
    assert process.exitcode == status


def test_a_second_ctrl_c_ends_a_process_whose_main_thread_waits_for_ever():
    process, begin = _fork.Process(target=_get, args=((signal.SIGINT, signal.SIGINT), 0.8, True)), time.monotonic()
    process.start()
    process.join(60)
    assert process.exitcode == 130 and time.monotonic() - begin < 4


@pytest.mark.parametrize(
    ("numbers", "agreed"),
    [
        ((None, None), None),
        ((None, signal.SIGTERM), signal.SIGTERM),
        ((signal.SIGUSR1, signal.SIGTERM), signal.SIGUSR1),
        ((signal.SIGTERM, signal.SIGINT), signal.SIGINT),
    ],
)
def test_processes_agree_on_the_signal_of_a_person_first(numbers, agreed):
    stops = [StopRequest(os._exit) for _ in numbers]
    votes = []
    for stop, number in zip(stops, numbers, strict=True):
        stop.number = number
        stop.agree(lambda vote: votes.append(vote) or vote)
    for stop, number in zip(stops, numbers, strict=True):
        stop.number = number
        assert stop.agree(lambda vote: max(votes)) == agreed and stop.number == agreed


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
    moment = Moment(STEP, "step", 2, number, rank=lost)
    begin = time.monotonic()
    statuses = launch("train", "lightningdit", run_file, world_size=2, at=moment, log=tmp_path / "log", limit=60)
    assert time.monotonic() - begin < 45
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
    handle = os.open(f"{log}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 2)
    from launch.__main__ import run

    if rank in failing:
        _fail(3, ValueError("no good"))
    run(["train", "lightningdit", run_file])


@pytest.mark.parametrize("failing", [(1,), (0, 1)])
def test_an_error_is_said_once_by_the_process_that_met_it(tmp_path, run_file, failing):
    statuses = call(_train_and_fail, run_file, str(tmp_path / "log"), failing, world_size=2, limit=60)
    assert statuses == [exit_status.ERROR] * 2
    (message,) = errors(tmp_path / "log")
    assert message.startswith(f"error: rank {failing[0]} (process ") and message.endswith(": no good")
    assert last_exit(tmp_path / "run") == {"status": 2, "reason": "no good", "rank": 0, "step": 3}


def _fail_before_all_have_met(run_file: str, log: str, failing: int) -> None:
    rank = int(os.environ["RANK"])
    handle = os.open(f"{log}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 2)
    from launch.__main__ import run

    if rank == failing:
        time.sleep(1.0)  # the other one waits by then
    run(["train", "lightningdit", run_file, *(["train.no_such_key=1"] if rank == failing else [])])


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_before_all_have_met_ends_the_others_too(tmp_path, run_file, failing):
    begin = time.monotonic()
    statuses = call(_fail_before_all_have_met, run_file, str(tmp_path / "log"), failing, world_size=2, limit=90)
    assert statuses == [exit_status.ERROR] * 2 and time.monotonic() - begin < 60
    (message,) = errors(tmp_path / "log")
    assert message.startswith(f"error: rank {failing} (process ") and "no_such_key" in message
