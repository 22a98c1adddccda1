"""This process's side of the watchdog (`launch.runtime.watchdog`): starting it, telling it how it leaves, obeying it.

One process's error ends all of a run, within seconds and with one message. Whoever meets one asks `may_speak`, and
calls `leave`; the others leave at once with the same status, wherever their main threads are: it takes no collective,
which would wait for one that is gone.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, NoReturn, Protocol

from launch.runtime import exit_status, last_exit
from launch.runtime.launcher import LaunchEnvironment, LaunchError
from launch.runtime.packages import ROOT
from launch.runtime.watchdog.member import Settings
from launch.runtime.watchdog.program import IGNORED

TIMEOUT = 30.0  # seconds
ANSWER_TIMEOUT = 3.0  # seconds in which the watchdogs say who is to speak
START_TIMEOUT = 150.0  # seconds; watchdogs give up sooner
FLUSH_TIMEOUT = 1.0  # seconds; the reader of a pipe may be stopped
_KEY = "launch/watchdog"


class Store(Protocol):
    """What processes of a run hand each other values by, as `torch.distributed.Store`."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...


@dataclass
class _Heartbeat:
    watchdog: subprocess.Popen
    connection: socket.socket
    before_leaving: Callable[[], None]
    left: bool = False

    def __post_init__(self):
        self.met, self.answered, self.granted = threading.Event(), threading.Event(), False
        self.address: dict[str, Any] = {}
        self.listening = threading.Event()

    def send(self, message: dict) -> None:
        with suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def obey(self) -> None:
        """Read what the watchdog says, until it is gone."""
        with suppress(OSError, ValueError), self.connection.makefile("rb") as lines:
            for line in lines:
                self._take(json.loads(line))
        if not self.left:  # the watchdog itself was killed: the others learn that from its connections, and say it
            self._leave({"leave": exit_status.LOST_PEER, "reason": "its watchdog was killed", "record": False})

    def _take(self, message: dict) -> None:
        if "port" in message:
            self.address = message
            self.listening.set()
        if "met" in message:
            self.met.set()
        if "granted" in message:
            self.granted = message["granted"]
            self.answered.set()
        if "leave" in message:
            self._leave(message)

    def _leave(self, order: dict) -> None:
        """End this process, wherever its main thread is. Where this blocks, the watchdog kills it."""
        if order["record"]:
            last_exit.write(order["leave"], order["reason"])
        for step in (self.before_leaving, sys.stdout.flush, sys.stderr.flush):
            with suppress(Exception):
                step()
        os._exit(order["leave"])


_heartbeat: _Heartbeat | None = None


def start(environment: LaunchEnvironment, store: Store, timeout: float, before_leaving: Callable[[], None]) -> None:
    """Start the watchdog of this process, and wait until those of all processes of the run have met.

    Args:
        timeout: seconds after which a process that does not answer is lost.
        before_leaving: called where this process is made to leave: ends its children.

    Raises LaunchError where they do not meet.
    """
    global _heartbeat
    if _heartbeat is not None or environment.world_size == 1:
        return
    main = {}
    if environment.rank:
        main = {"address": environment.address, **json.loads(store.get(_KEY))}
    settings = Settings(environment.rank, environment.world_size, os.getpid(), timeout, **main)
    watchdog, connection = _spawn(settings)
    heartbeat = _heartbeat = _Heartbeat(watchdog, connection, before_leaving)
    threading.Thread(target=heartbeat.obey, name="heartbeat", daemon=True).start()
    if not environment.rank:
        heartbeat.listening.wait(START_TIMEOUT)
        store.set(_KEY, json.dumps(heartbeat.address))
    if not heartbeat.met.wait(START_TIMEOUT):
        raise LaunchError(f"the watchdogs of the run's processes have not met within {START_TIMEOUT:g} s")


def _spawn(settings: Settings) -> tuple[subprocess.Popen, socket.socket]:
    """A watchdog, and the connection to it."""
    ours, theirs = socket.socketpair()
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from launch.runtime.watchdog.program import main"
    command = [sys.executable, "-I", "-S", "-c", f"{program}; main(sys.argv[1])", json.dumps(asdict(settings))]
    # A signal to all processes of a job may come before it ignores them.
    former = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)
    try:
        return subprocess.Popen(command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL), ours
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)
        theirs.close()


def may_speak() -> bool:
    """Whether this process is the one to say an error that it met: of several that meet one, one is."""
    if _heartbeat is None or not _heartbeat.met.is_set():
        return True
    _heartbeat.send({"claim": True})
    return _heartbeat.answered.wait(ANSWER_TIMEOUT) is False or _heartbeat.granted


def end_all(status: int, reason: str, say: Callable[[], None] | None) -> None:
    """Say an error that this process met, unless another says its own, and have all leave; this process is to follow.

    say: prints it; None: it is said already.
    """
    if say is not None:
        if may_speak():
            say()
        else:
            await_order(ANSWER_TIMEOUT)  # that of the one that speaks
    _record(status, reason)
    leave(status, reason)


def await_order(seconds: float) -> None:
    """Wait for the watchdog to end this process, as another is lost or has failed; returns where none is known to."""
    if _heartbeat is not None:
        time.sleep(seconds)


def leave(status: int, reason: str) -> None:
    """Tell all processes of the run to leave with this status, quietly, as this one is about to."""
    if _heartbeat is not None and not _heartbeat.left:
        _heartbeat.left = True
        _heartbeat.send({"left": status, "in_order": False, "reason": reason})


def stop() -> None:
    """Say that this process leaves as all have agreed."""
    if _heartbeat is not None and not _heartbeat.left:
        _heartbeat.left = True
        _heartbeat.send({"left": exit_status.DONE, "in_order": True})


def _record(status: int, reason: str) -> None:
    """Of the main process: the others have it write what they met."""
    if os.environ.get("RANK", "0") == "0":
        last_exit.write(status, reason)


def leave_at_once(number: int) -> NoReturn:
    """End all processes of the run as this one got a signal that asks for it; from any thread."""
    status, name = exit_status.of_signal(number), signal.Signals(number).name
    text = f"left at once by {name}; what was saved before stays" if may_speak() else ""
    _record(status, f"left at once by {name}")
    leave(status, f"left at once by {name}")
    last_words = threading.Thread(target=_flush, args=[text], daemon=True)
    last_words.start()
    last_words.join(FLUSH_TIMEOUT)
    if _heartbeat is not None:
        with suppress(Exception):
            _heartbeat.before_leaving()
    os._exit(status)


def _flush(text: str) -> None:
    for stream, end in ((sys.stderr, f"{text}\n" if text else ""), (sys.stdout, "")):
        with suppress(Exception):
            stream.write(end)
            stream.flush()
