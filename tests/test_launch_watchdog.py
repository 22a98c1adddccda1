"""Watchdogs: three of them in threads of one process, beside processes that only sleep."""

import ctypes
import errno
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from unittest.mock import patch

import pytest

from launch.runtime import process_table, wire
from launch.runtime.watchdog import base, main_process, member, others, program
from launch.runtime.watchdog.main_process import MainWatchdog
from launch.runtime.watchdog.member import Member, Settings
from launch.runtime.watchdog.others import PeerWatchdog, answers
from launch.runtime.wire import Wire
from tests.children import all_ended, call, exit_code

_fork = multiprocessing.get_context("fork")


_member_of = Member.of


def _without_watchdog(settings: Settings, port: int) -> Member:
    """A lost process is killed with its watchdog, which here is the process of the tests."""
    return replace(_member_of(settings, port), watchdog=0, watchdog_started=None)


class Process:
    """A process that sleeps, its watchdog in a thread here, and the connection between them."""

    def __init__(self, rank: int, world_size: int, timeout: float, said: list[str], main: dict | None = None):
        self.sleeper = subprocess.Popen(["sleep", "600"])
        ours, theirs = socket.socketpair()
        ours.settimeout(20)
        self.wire, self.messages = Wire(ours), []
        settings = Settings(rank, world_size, self.sleeper.pid, timeout, **(main or {}))
        with patch.object(Member, "of", _without_watchdog):
            self.watchdog = (PeerWatchdog if rank else MainWatchdog)(settings, Wire(theirs), said.append)
        self.ticks, self._tick = 0, self.watchdog.tick
        self.watchdog.tick = self._count
        self.thread = threading.Thread(target=self.watchdog.run, daemon=True)
        self.thread.start()

    def _count(self, now: float) -> None:
        self._tick(now)
        self.ticks += 1

    def wait_for_ticks(self, count: int, seconds: float = 60.0) -> None:
        """Wait until the watchdog has looked after everything so many times."""
        ticks, end = self.ticks + count, time.monotonic() + seconds
        while self.ticks < ticks:
            assert time.monotonic() < end, "the watchdog hangs"
            time.sleep(0.01)

    def kill(self) -> None:
        self.sleeper.kill()
        self.sleeper.wait()

    def end(self) -> None:
        """End the process, and with it its watchdog."""
        self.kill()
        self.thread.join(60)
        assert not self.thread.is_alive()

    def wait_for(self, key: str, seconds: float = 60.0) -> dict:
        """The first message with this key."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.messages += self.wire.receive() or []
            for message in self.messages:
                if key in message:
                    return message
            time.sleep(0.01)
        raise TimeoutError(f"no {key} in {self.messages}")


@contextmanager
def run_of(world_size: int, timeout: float = 30.0, *, stand_ins: int = 0):
    """Processes whose watchdogs have met, and what the watchdogs print; the last of the run may be stand-ins' part."""
    said: list[str] = []
    processes: list[Process] = []
    try:
        for rank in range(world_size - stand_ins):
            main = {"address": "127.0.0.1", **processes[0].wait_for("port")} if rank else None
            processes.append(Process(rank, world_size, timeout, said, main))
        for process in processes if not stand_ins else ():
            process.wait_for("met")
        yield processes, said
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.end()


@pytest.mark.parametrize("lost", [1, 2])
def test_a_killed_process_is_named_once_and_all_others_are_told(lost):
    with run_of(3) as (processes, said):
        processes[lost].kill()
        orders = [each.wait_for("leave") for each in processes if each is not processes[lost]]
        assert [order["leave"] for order in orders] == [74, 74] and [order["record"] for order in orders] == [
            True,
            False,
        ]
        (message,) = said
        assert f"rank {lost} (process {processes[lost].sleeper.pid} on {socket.gethostname()}) was killed" in message


@pytest.mark.parametrize(("lost", "killed_by"), [(0, 0), (1, 2)])
def test_a_watchdog_that_still_has_others_to_tell_is_not_killed(monkeypatch, lost, killed_by):
    """That of the main process: whoever is told first would keep the others from being told, and they would speak."""
    killed = []
    monkeypatch.setattr(Member, "kill", lambda member: killed.append(member.rank))
    with run_of(3) as (processes, said):
        processes[lost].kill()
        for process in processes:
            if process is not processes[lost]:
                process.wait_for("leave")
        assert len(said) == 1 and killed == [lost] * killed_by


@pytest.mark.parametrize("lost", [0, 1])
def test_a_stopped_process_is_named_and_killed(lost):
    with run_of(2, timeout=1.0) as (processes, said):
        os.kill(processes[lost].sleeper.pid, signal.SIGSTOP)
        assert processes[1 - lost].wait_for("leave")["record"]
        assert processes[lost].sleeper.wait(60) == -signal.SIGKILL
        assert len(said) == 1 and f"rank {lost} " in said[0] and "has been stopped for 1 s" in said[0]


def test_a_lost_main_watchdog_is_named_by_the_lowest_rank_that_answers(monkeypatch):
    """Its machine is gone: nothing comes any more."""
    monkeypatch.setattr(others, "PROBE_TIMEOUT", 60.0)
    with run_of(3, timeout=1.0) as (processes, said):
        monkeypatch.setattr(processes[0].watchdog, "wires", list)  # no beats,
        monkeypatch.setattr(processes[0].watchdog, "lost", lambda *_: None)  # and no judgement
        orders = [process.wait_for("leave") for process in processes[1:]]
        assert [order["record"] for order in orders] == [True, False]
        (message,) = said
        assert "rank 0 " in message and "has not answered for 1 s" in message


def test_the_lowest_rank_says_the_cause_that_another_noticed_first(monkeypatch):
    """Which then kills the main process, stopped with its watchdog: that is not what ended the run."""
    monkeypatch.setattr(others, "PROBE_TIMEOUT", 60.0)
    with run_of(3) as (processes, said):
        monkeypatch.setattr(processes[0].watchdog, "lost", lambda *_: None)
        processes[2].watchdog._main_lost("has not answered")
        assert not processes[2].wait_for("leave")["record"]
        processes[0].sleeper.wait(60)
        assert processes[1].wait_for("leave")["record"]
        assert len(said) == 1 and "rank 0 " in said[0] and "has not answered" in said[0]


def test_a_lost_main_process_and_rank_1_leave_rank_2_to_speak(monkeypatch):
    token, tried, connect = "x", [], socket.create_connection
    monkeypatch.setattr(others.socket, "create_connection", lambda *a, **k: tried.append(a) or connect(*a, **k))
    monkeypatch.setattr(others, "PROBE_TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as full, socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
        gone.close()
        members = [Member(1, "a", "", 1, None, 1, None, port, "127.0.0.1")]
        assert not answers(members, token, "")
        # One that is stopped: the system takes the connection, and nobody answers.
        members.append(Member(2, "b", "", 1, None, 1, None, full.getsockname()[1], "127.0.0.1"))
        tried.clear()
        assert not answers([*members, members[1]], token, "") and len(tried) == 2  # of a machine once
    monkeypatch.setattr(others, "PROBE_TIMEOUT", 60.0)
    with run_of(2) as (processes, _):
        own = processes[1].watchdog
        assert answers([own.own], own.settings.token, "") and not answers([own.own], "another run's", "")


def test_one_process_says_its_error_and_the_others_leave_with_its_status(monkeypatch):
    status = 65
    monkeypatch.setattr(main_process, "CLAIM_DELAY", 2.0)  # however late the second claim comes
    with run_of(3) as (processes, said):
        for process in processes[1:]:
            process.wire.send({"claim": True})
        granted = [process.wait_for("granted")["granted"] for process in processes[1:]]
        assert granted == [True, False]
        processes[1].wire.send({"left": status, "in_order": False, "reason": "no good"})
        orders = [processes[rank].wait_for("leave") for rank in (0, 2)]
        assert [(order["leave"], order["reason"]) for order in orders] == [(status, "no good")] * 2
        assert orders[0]["record"] and not said


def test_the_main_process_comes_first_where_all_meet_an_error(monkeypatch):
    monkeypatch.setattr(main_process, "CLAIM_DELAY", 60.0)
    with run_of(3) as (processes, _):
        for process in reversed(processes):
            process.wire.send({"claim": True})
        assert [process.wait_for("granted")["granted"] for process in processes] == [True, False, False]


def test_processes_that_leave_in_order_are_not_lost():
    with run_of(3) as (processes, said):
        for process in (processes[2], processes[0]):
            process.wire.send({"left": 0, "in_order": True})
            process.end()
        processes[1].wait_for_ticks(6)
        assert processes[1].thread.is_alive()
        processes[1].wire.send({"claim": True})  # there is nobody else to ask
        assert processes[1].wait_for("granted")["granted"]
        assert not said and not any("leave" in message for message in processes[1].messages)


def test_a_process_that_does_not_leave_is_killed(monkeypatch):
    monkeypatch.setattr(base, "LEAVE_GRACE", 0.5)
    with run_of(2) as (processes, _):
        processes[1].kill()
        processes[0].wait_for("leave")
        assert processes[0].sleeper.wait(60) == -signal.SIGKILL


@pytest.mark.parametrize("in_order", [True, False])
def test_a_process_that_says_it_leaves_and_does_not_is_killed(monkeypatch, in_order):
    """As where a library blocks at the end, and with it all threads; the other one goes on, or leaves for this one's
    error alone."""
    monkeypatch.setattr(base, "LEFT_GRACE", 0.5)
    with run_of(2) as (processes, said):
        processes[1].wire.send({"left": 0 if in_order else 2, "in_order": in_order, "reason": "no good"})
        assert processes[1].sleeper.wait(60) == -signal.SIGKILL
        if in_order:
            processes[0].wait_for_ticks(2)
            assert not any("leave" in message for message in processes[0].messages)
        else:
            assert processes[0].wait_for("leave")["leave"] == 2
        assert not said


def test_time_in_which_the_watchdog_did_not_run_is_no_silence(monkeypatch):
    """A suspended terminal, a machine that slept."""
    with run_of(2) as (processes, said):
        jump, real = [0.0], time.monotonic
        monkeypatch.setattr(base.time, "monotonic", lambda: real() + jump[0])
        for process in processes:
            process.wait_for_ticks(1)
        jump[0] = 3600.0
        jumped = time.monotonic()
        for process in processes:
            process.wait_for_ticks(3)
        assert jumped > 3600.0 and not said


def test_only_the_same_process_is_killed(monkeypatch):
    killed, kill = [], os.kill
    monkeypatch.setattr(member.os, "kill", lambda *args: killed.append(args) or kill(*args))
    sleeper = subprocess.Popen(["sleep", "600"])
    started, table = process_table.started(sleeper.pid), process_table.namespace()
    for other in ({"started": "another boot/1"}, {"table": "another machine"}, {"started": None}):
        place = {"table": table, "started": started} | other
        Member(1, "a", pid=sleeper.pid, watchdog=0, watchdog_started=None, port=0, **place).kill_process()
    assert not killed
    Member(1, "a", table, sleeper.pid, started, 0, None, 0).kill_process()
    assert sleeper.wait(60) == -signal.SIGKILL


def connect(process: Process, sent: bytes) -> socket.socket:
    """A connection to the watchdog of a process, over which this has come."""
    connection = socket.create_connection(("127.0.0.1", process.watchdog.own.port), timeout=60)
    connection.sendall(sent)
    return connection


def test_strangers_are_sent_away(monkeypatch):
    """Those that say nothing, or never end a line, too."""
    monkeypatch.setattr(base, "INTRODUCTION", 0.5)
    monkeypatch.setattr(wire, "LONGEST", 1 << 16)
    request, endless = b"GET / HTTP/1.1\r\n\r\n", bytes(1 << 18)
    with run_of(2) as (processes, said):
        for sent in (request, b'{"token": "wrong", "member": {}}\n', b'{"token": 1}\n', b"[1]\n", b"", endless):
            with connect(processes[0], b"") as connection, suppress(ConnectionError):
                connection.sendall(sent)
                assert connection.recv(10) == b""
        processes[0].wait_for_ticks(2)
        assert not said and processes[0].thread.is_alive() and not processes[0].watchdog._strangers


def test_a_watchdog_that_can_take_no_connection_does_not_spin(monkeypatch):
    class Full:
        def accept(self):
            raise OSError(errno.EMFILE, "Too many open files")

        def close(self):
            pass

    with run_of(2) as (processes, said):
        listener, processes[0].watchdog.listener = processes[0].watchdog.listener, Full()
        with connect(processes[0], b""):
            processes[0].wait_for_ticks(1)
            begin = time.monotonic()
            processes[0].wait_for_ticks(5)
            assert time.monotonic() - begin > 3 * base.TICK and not said
        processes[0].watchdog.listener = listener


def test_a_watchdog_may_introduce_itself_and_beat_in_one_breath():
    """Where the main process's is late it gets both at once. A second one of the same rank is another run's."""
    with run_of(2, stand_ins=1) as (processes, said):
        token = processes[0].wait_for("port")["token"]
        peer = asdict(Member(1, "a", "", 1, None, 0, None, 1))
        introduction = json.dumps({"token": token, "member": peer}).encode() + b"\n"
        with connect(processes[0], introduction + b"{}\n") as connection:
            processes[0].wait_for("met")
            lines = connection.makefile()
            assert "members" in json.loads(lines.readline()) and json.loads(lines.readline()) == {}
            with connect(processes[0], introduction) as second:
                assert second.recv(10) == b""
            connection.sendall(b'{"left": 0, "in_order": true}\n')
            while connection.recv(1 << 10):
                pass
        assert not said


def _say_into_a_full_pipe() -> None:
    _, writer = os.pipe()
    os.set_blocking(writer, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(1 << 12))
    os.set_blocking(writer, True)
    os.dup2(writer, 2)
    program.say("no one reads this")
    os._exit(7)


def test_a_reader_that_is_stopped_does_not_stop_the_watchdog():
    assert exit_code(_fork.Process(target=_say_into_a_full_pipe), within=60) == 7


def _hold_the_lock(seconds: float) -> None:
    """Meet another process, and let neither thread of this one run for some time."""
    import torch.distributed as dist

    from launch.runtime import heartbeat
    from launch.runtime.launcher import launch_environment
    from launch.runtime.processes import rendezvous

    environment = launch_environment()
    store = rendezvous(environment)
    heartbeat.start(environment, store, 2.0, lambda: None)
    if environment.rank == 1:
        ctypes.PyDLL(None).usleep(int(1e6 * seconds))  # PyDLL keeps Python's lock
    dist.Store.add(store, "done", 1)
    while store.add("done", 0) < 2:
        time.sleep(0.05)
    heartbeat.stop()
    os._exit(0)


def test_a_process_that_holds_pythons_lock_is_not_lost():
    assert call(_hold_the_lock, 5.0, world_size=2) == [0, 0]


def _start_and_be_killed(path: str) -> None:
    from launch.runtime import heartbeat
    from launch.runtime.launcher import launch_environment
    from launch.runtime.processes import rendezvous

    environment = launch_environment()
    store = rendezvous(environment)
    heartbeat.start(environment, store, 30.0, lambda: None)
    with open(f"{path}.{environment.rank}", "w") as f:
        f.write(str(heartbeat._heartbeat.watchdog.pid))
    if environment.rank == 0:
        store.set("started", str(os.getpid()))
        time.sleep(600)
    for pid in (int(store.get("started")), os.getpid()):
        os.kill(pid, signal.SIGKILL)


def test_watchdogs_end_with_their_processes(tmp_path):
    """Also where all are killed, and none is left that would have to be told."""
    assert call(_start_and_be_killed, str(tmp_path / "pid"), world_size=2) == [-signal.SIGKILL] * 2
    pids = [int((tmp_path / f"pid.{rank}").read_text()) for rank in (0, 1)]
    assert all_ended(pids, within=60)
