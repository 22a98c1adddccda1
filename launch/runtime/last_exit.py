"""How a run ended: `last_exit.json` in its directory, for schedulers and people.

    {"status": 75, "reason": "stopped by SIGTERM", "rank": 0, "step": 1200}

Launchers often end with a status of their own, and none tells which run it was. The file is removed when the run
starts: one that is there tells of the last start, and none is there while it runs or where all processes were killed.
rank is the process that wrote it: the main one, or where that was lost another. step is the one it stood at.

Where LIGHTNINGDIT_LAST_EXIT names a file, the same and the directory are written there, with status null while it runs.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from signal import Signals

from common.files import write_json
from launch.runtime import exit_status

NAME = "last_exit.json"
VARIABLE = "LIGHTNINGDIT_LAST_EXIT"


@dataclass
class Run:
    """A run as this process knows it. step: gives the step it stands at; stopped_by: the signal that ended it early."""

    directory: Path
    rank: int
    step: Callable[[], int | None] = lambda: None
    stopped_by: int | None = None


_run: Run | None = None


@contextmanager
def recorded(directory: Path, rank: int) -> Iterator[Run]:
    """Record how the run in `directory` ends; where the block ends well, the main process (rank 0) writes it.

    After an exception only the program knows the status: it calls `write`.
    """
    global _run
    _run = run = Run(directory, rank)
    if rank == 0:
        with suppress(OSError):
            (directory / NAME).unlink(missing_ok=True)
        _write_variable(run, {"status": None, "reason": "running", "rank": rank, "step": None})
    yield run
    if rank == 0:
        reason = f"stopped by {Signals(run.stopped_by).name}" if run.stopped_by else "done"
        write(exit_status.of_signal(run.stopped_by), reason)
    _run = None


def write(status: int, reason: str) -> None:
    """Write how the run of this process ends, if there is one; no directory is made anew for it."""
    if (run := _run) is None:
        return
    content = {"status": status, "reason": reason, "rank": run.rank, "step": run.step()}
    with suppress(OSError):  # a full disk, say: it is what is being reported
        if run.directory.is_dir():
            write_json(run.directory / NAME, content)
    _write_variable(run, content)


def _write_variable(run: Run, content: dict) -> None:
    if path := os.environ.get(VARIABLE):
        with suppress(OSError):
            write_json(path, content | {"directory": os.path.abspath(run.directory)})
