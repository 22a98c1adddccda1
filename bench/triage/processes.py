"""Child processes with a time limit, which neither they nor anything they start can outlive."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bench.measure.rows import ROOT

#: Seconds between SIGTERM and SIGKILL: a bench writes its rows, a compiler may ignore the signal.
GRACE = 10.0
#: A child prints its tracebacks this long before its limit, as far as the limit allows.
NOTICE = 2.0


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        status: its exit status; minus the number of the signal that ended it.
        seconds: from its start to its end.
        why: "timeout" or "stopped" where this process ended it, else empty.
    """

    status: int
    seconds: float
    why: str = ""


def command(module: str, arguments: Sequence[str], limit: float) -> list[str]:
    """The command that runs a module under `bench.triage.run_module`, which prints tracebacks before the limit."""
    notice = max(limit - NOTICE, 0.8 * limit)
    return [sys.executable, "-m", "bench.triage.run_module", f"{notice:.2f}", module, *arguments]


class Child:
    """A command in a session of its own; stdout and stderr go to a file.

    `poll` has to be called now and then: it sends SIGTERM to the child at the limit, and SIGKILL to its whole group
    `grace` seconds later, or as soon as the child itself has ended. A child that not even that ends, as it waits for a
    driver that hangs, is given up after so many seconds more.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        limit: float,
        grace: float = GRACE,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._limit, self._grace, self._clock = limit, grace, clock
        self._why, self._kill_at = "", float("inf")
        variables = {**os.environ, "PYTHONUNBUFFERED": "1"}
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self._begun = clock()
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def poll(self) -> Ended | None:
        """How it ended; None while it runs."""
        now = self._clock()
        if self._over():
            self._kill()  # processes it has left behind would keep memory of the device
            return Ended(self._process.wait(), now - self._begun, self._why)
        if not self._why and now - self._begun >= self._limit:
            self._end("timeout")
        if now >= self._kill_at:
            self._kill()
        if now >= self._kill_at + self._grace:
            return Ended(-signal.SIGKILL, now - self._begun, self._why)
        return None

    def stop(self) -> None:
        """Have it end now, as at its limit."""
        if not self._why:
            self._end("stopped")

    def kill(self) -> None:
        """End it and all it has started at once."""
        self._kill()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(self._grace)

    def _over(self) -> bool:
        """Whether it has ended; as it is not waited for, its number still names its group."""
        if self._process.returncode is not None:
            return True
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _end(self, why: str) -> None:
        self._why, self._kill_at = why, self._clock() + self._grace
        self._process.terminate()

    def _kill(self) -> None:
        if self._process.returncode is None:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):  # the group is empty
                return
