"""A process of a run as its watchdogs know it, and what they say of one that is lost."""

import os
import signal
import socket
from contextlib import suppress
from dataclasses import dataclass

from launch.runtime import process_table

DIED = "was killed or ended without a word"
STOPPED = "has been stopped for {:g} s (by SIGSTOP, say)"
SILENT = "has not answered for {:g} s: stopped, swapped out, or its machine is down or cannot be reached"


@dataclass(frozen=True)
class Settings:
    """What a watchdog is given. rank, world_size: of the run; pid: the process to watch.

    timeout: seconds of silence that make a process lost.
    address, port, token: where the main process's watchdog listens, and the password of the run's watchdogs; that one
    itself is given none of them.
    """

    rank: int
    world_size: int
    pid: int
    timeout: float
    address: str = ""
    port: int = 0
    token: str = ""


@dataclass(frozen=True)
class Member:
    """A process of a run, and its watchdog.

    table: names the table of processes that the numbers are of; started, watchdog_started: see `process_table.started`.
    address, port: where the watchdog listens.
    """

    rank: int
    host: str
    table: str
    pid: int
    started: str | None
    watchdog: int
    watchdog_started: str | None
    port: int
    address: str = ""

    @classmethod
    def of(cls, settings: Settings, port: int) -> "Member":
        """The process of these settings, of which this one is the watchdog."""
        pid, own = settings.pid, os.getpid()
        started, host = process_table.started(pid), socket.gethostname()
        table = process_table.namespace()
        return cls(settings.rank, host, table, pid, started, own, process_table.started(own), port)

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"

    def kill_process(self) -> None:
        """End the process, stopped or not, if it is of this machine and still the same one."""
        self._kill(self.pid, self.started)

    def kill(self) -> None:
        """End the process and its watchdog so."""
        self._kill(self.pid, self.started)
        self._kill(self.watchdog, self.watchdog_started)

    def _kill(self, pid: int, started: str | None) -> None:
        here = self.table and self.table == process_table.namespace()
        if here and started is not None and process_table.started(pid) == started:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
