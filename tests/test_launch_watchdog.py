"""Watchdogs: three of them in threads of one process, beside processes that only sleep."""

import ctypes
import os
import signal
import socket
import subprocess
import threading
import time
from contextlib import contextmanager

import pytest

from launch.runtime import process_table
from launch.runtime.watchdog import base
from launch.runtime.watchdog.main_process import MainWatchdog
from launch.runtime.watchdog.member import Member, Settings
from launch.runtime.watchdog.others import PeerWatchdog, answers
from launch.runtime.wire import Wire
from tests.children import all_ended, call


class Process:
    """A process that sleeps, its watchdog in a thread here, and the connection between them."""

    def __init__(self, rank: int, world_size: int, timeout: float, said: list[str], main: dict | None = None):
        self.sleeper = subprocess.Popen(["sleep", "600"])
        ours, theirs = socket.socketpair()
        ours.settimeout(20)
        self.wire, self.messages = Wire(ours), []
        settings = Settings(rank, world_size, self.sleeper.pid, timeout, **(main or {}))
        self.watchdog = (PeerWatchdog if rank else MainWatchdog)(settings, Wire(theirs), said.append)
        self.thread = threading.Thread(target=self.watchdog.run, daemon=True)
        self.thread.start()

    def wait_for(self, key: str, seconds: float = 15.0) -> dict:
        """The first message with this key."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.messages += self.wire.receive() or []
            for message in self.messages:
                if key in message:
                    return message
            time.sleep(0.01)
        raise TimeoutError(f"no {key} in {self.messages}")


@pytest.fixture(autouse=True)
def spare_this_process(monkeypatch):
    """Here it is the watchdog of all, which is killed with a lost process."""
    monkeypatch.setattr(Member, "kill", Member.kill_process)


@contextmanager
def run_of(world_size: int, timeout: float = 1.0):
    """Processes whose watchdogs have met, and what the watchdogs print."""
    said: list[str] = []
    main = Process(0, world_size, timeout, said)
    where = main.wait_for("port")
    others = [
        Process(rank, world_size, timeout, said, {"address": "127.0.0.1", **where}) for rank in range(1, world_size)
    ]
    processes = [main, *others]
    try:
        for process in processes:
            process.wait_for("met")
        yield processes, said
    finally:
        for process in processes:
            process.sleeper.kill()
            process.sleeper.wait()
        for process in processes:
            process.thread.join(20)


def kill(process: Process) -> None:
    process.sleeper.kill()
    process.sleeper.wait()


@pytest.mark.parametrize("lost", [1, 2])
def test_a_killed_process_is_named_once_and_all_others_are_told(lost):
    with run_of(3) as (processes, said):
        begin = time.monotonic()
        kill(processes[lost])
        orders = [each.wait_for("leave") for each in processes if each is not processes[lost]]
        assert time.monotonic() - begin < 5
        assert [order["leave"] for order in orders] == [74, 74] and [order["record"] for order in orders] == [
            True,
            False,
        ]
        (message,) = said
        assert f"rank {lost} (process {processes[lost].sleeper.pid} on {socket.gethostname()}) was killed" in message


@pytest.mark.parametrize("lost", [0, 1])
def test_a_stopped_process_is_named_and_killed(lost):
    with run_of(2) as (processes, said):
        os.kill(processes[lost].sleeper.pid, signal.SIGSTOP)
        assert processes[1 - lost].wait_for("leave")["record"]
        assert processes[lost].sleeper.wait(10) == -signal.SIGKILL
        assert len(said) == 1 and f"rank {lost} " in said[0] and "has been stopped for 1 s" in said[0]


def test_a_lost_main_watchdog_is_named_by_the_lowest_rank_that_answers(monkeypatch):
    """Its machine is gone: nothing comes any more."""
    with run_of(3) as (processes, said):
        monkeypatch.setattr(processes[0].watchdog, "wires", list)  # no beats,
        monkeypatch.setattr(processes[0].watchdog, "lost", lambda *_: None)  # and no judgement
        orders = [process.wait_for("leave") for process in processes[1:]]
        assert [order["record"] for order in orders] == [True, False]
        (message,) = said
        assert "rank 0 " in message and "has not answered for 1 s" in message


def test_a_lost_main_process_and_rank_1_leave_rank_2_to_speak():
    token = "x"
    with socket.create_server(("127.0.0.1", 0)) as full, socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
        gone.close()
        members = [Member(1, "a", "", 1, None, 1, None, port, "127.0.0.1")]
        assert not answers(members, token)
        # One that is stopped: the system takes the connection, and nobody answers.
        members.append(Member(2, "b", "", 1, None, 1, None, full.getsockname()[1], "127.0.0.1"))
        begin = time.monotonic()
        assert not answers([*members, members[1]], token) and time.monotonic() - begin < 4  # of a machine once
    with run_of(2) as (processes, _):
        own = processes[1].watchdog
        assert answers([own.own], own.settings.token) and not answers([own.own], "another run's")


@pytest.mark.parametrize("status", [2, 65])
def test_one_process_says_its_error_and_the_others_leave_with_its_status(status):
    with run_of(3) as (processes, said):
        for process in processes[1:]:
            process.wire.send({"claim": True})
        granted = [process.wait_for("granted")["granted"] for process in processes[1:]]
        assert granted == [True, False]
        processes[1].wire.send({"left": status, "in_order": False, "reason": "no good"})
        orders = [processes[rank].wait_for("leave") for rank in (0, 2)]
        assert [(order["leave"], order["reason"]) for order in orders] == [(status, "no good")] * 2
        assert orders[0]["record"] and not said


def test_the_main_process_comes_first_where_all_meet_an_error():
    with run_of(3) as (processes, _):
        for process in reversed(processes):
            process.wire.send({"claim": True})
        assert [process.wait_for("granted")["granted"] for process in processes] == [True, False, False]


def test_processes_that_leave_in_order_are_not_lost():
    with run_of(3) as (processes, said):
        for process in (processes[0], processes[2]):
            process.wire.send({"left": 0, "in_order": True})
            process.thread.join(10)
            kill(process)
        time.sleep(1.5)
        assert processes[1].thread.is_alive()
        processes[1].wire.send({"claim": True})  # there is nobody else to ask
        assert processes[1].wait_for("granted")["granted"]
        assert not said and not any("leave" in message for message in processes[1].messages)


def test_a_process_that_does_not_leave_is_killed(monkeypatch):
    monkeypatch.setattr(base, "LEAVE_GRACE", 0.5)
    with run_of(2) as (processes, _):
        kill(processes[1])
        processes[0].wait_for("leave")
        assert processes[0].sleeper.wait(10) == -signal.SIGKILL


def test_time_in_which_the_watchdog_did_not_run_is_no_silence(monkeypatch):
    """A suspended terminal, a machine that slept."""
    with run_of(2) as (_, said):
        jump, real = [0.0], time.monotonic
        monkeypatch.setattr(base.time, "monotonic", lambda: real() + jump[0])
        jump[0] = 3600.0
        time.sleep(0.8)
        assert not said


def test_only_the_same_process_is_killed():
    sleeper = subprocess.Popen(["sleep", "600"])
    started, table = process_table.started(sleeper.pid), process_table.namespace()
    for other in ({"started": "another boot/1"}, {"table": "another machine"}, {"started": None}):
        place = {"table": table, "started": started} | other
        Member(1, "a", pid=sleeper.pid, watchdog=0, watchdog_started=None, port=0, **place).kill_process()
    time.sleep(0.1)
    assert sleeper.poll() is None
    Member(1, "a", table, sleeper.pid, started, 0, None, 0).kill_process()
    assert sleeper.wait(10) == -signal.SIGKILL


def test_strangers_are_sent_away():
    with run_of(2) as (processes, said):
        port = processes[0].watchdog.own.port
        for sent in (b"GET / HTTP/1.1\r\n\r\n", b'{"token": "wrong", "member": {}}\n', b'{"token": 1}\n', b"[1]\n"):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
                connection.sendall(sent)
                assert connection.recv(10) == b""
        time.sleep(0.5)
        assert not said and processes[0].thread.is_alive()


def _hold_the_lock(seconds: float) -> None:
    """Meet another process, and let neither thread of this one run for some time."""
    import torch.distributed as dist

    from launch.runtime import heartbeat
    from launch.runtime.launcher import launch_environment
    from launch.runtime.processes import rendezvous

    environment = launch_environment()
    store = rendezvous(environment)
    heartbeat.start(environment, store, 1.0, lambda: None)
    if environment.rank == 1:
        ctypes.PyDLL(None).usleep(int(1e6 * seconds))  # PyDLL keeps Python's lock
    dist.Store.add(store, "done", 1)
    while store.add("done", 0) < 2:
        time.sleep(0.05)
    heartbeat.stop()
    os._exit(0)


def test_a_process_that_holds_pythons_lock_is_not_lost():
    assert call(_hold_the_lock, 3.0, world_size=2, limit=60) == [0, 0]


def _start_and_report(path: str) -> None:
    from launch.runtime import heartbeat
    from launch.runtime.launcher import launch_environment
    from launch.runtime.processes import rendezvous

    environment = launch_environment()
    store = rendezvous(environment)
    heartbeat.start(environment, store, 30.0, lambda: None)
    with open(f"{path}.{environment.rank}", "w") as f:
        f.write(str(heartbeat._heartbeat.watchdog.pid))
    store.add("started", 1)
    while store.add("started", 0) < 2:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


def test_watchdogs_end_with_their_processes(tmp_path):
    """Also where all are killed, and none is left that would have to be told."""
    assert call(_start_and_report, str(tmp_path / "pid"), world_size=2, limit=60) == [-signal.SIGKILL] * 2
    pids = [int((tmp_path / f"pid.{rank}").read_text()) for rank in (0, 1)]
    assert all_ended(pids, within=10)
