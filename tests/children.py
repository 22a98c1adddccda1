"""Runs `python -m launch …`, or a function, in child processes that start in milliseconds, and kills them at moments.

Children fork from a server that has imported the programs but started nothing (no process group, no thread).
"""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

_context = multiprocessing.get_context("forkserver")
#: The last is what DeepSpeed imports where an engine is made: torch.compile, with seconds of modules behind it.
PRELOADED = [
    "launch.train",
    "launch.sample",
    "launch.training.trainer",
    "launch.training.engine",
    "vavae.task",
    "deepspeed.runtime.zero.muon.muon_optimizer",
]
_context.set_forkserver_preload(PRELOADED)


@dataclass(frozen=True)
class Moment:
    """The `call`-th call (from 1) of `owner.name`, such as Moment("launch.training.checkpoint", "write_json", 2).

    rank: where it strikes; None: on every process.
    """

    module: str
    name: str
    call: int
    signal: int = signal.SIGKILL
    rank: int | None = None


def launch(
    *argv: str, world_size: int = 1, at: Moment | None = None, log: Path | None = None, limit: float = 240
) -> list[int]:
    """Run a program on `world_size` processes; returns their exit codes (−9: killed by SIGKILL, and not by us).

    Raises TimeoutError where one of them still runs after `limit` seconds: it is killed, and its test has to fail.
    """
    return _run(" ".join(argv), limit, world_size, _child, argv, at, log)


def call(function: Callable, *args, world_size: int, at: Moment | None = None, limit: float = 240) -> list[int]:
    """Call a module's function in processes that can form a group; returns exit codes, raises as `launch` does."""
    return _run(function.__name__, limit, world_size, _call, function, args, at)


def _run(what: str, limit: float, world_size: int, target: Callable, *args) -> list[int]:
    port = free_port()
    children = [_context.Process(target=target, args=(rank, world_size, port, *args)) for rank in range(world_size)]
    for child in children:
        child.start()
    return _ended(what, children, limit)


def _ended(what: str, children: Sequence[BaseProcess], limit: float) -> list[int | None]:
    """The exit codes of processes; none of them is left running, whatever happens here."""
    end = time.monotonic() + limit
    try:
        for child in children:
            child.join(timeout=max(0.0, end - time.monotonic()))
    finally:
        late = [rank for rank, child in enumerate(children) if child.exitcode is None]
        for rank in late:
            children[rank].kill()
            children[rank].join()
    if late:
        raise TimeoutError(f"{what}: after {limit:g} s still running: ranks {late}")
    return [child.exitcode for child in children]


def _join(rank: int, world_size: int, port: int) -> None:
    import torch

    torch.set_num_threads(1)
    if world_size > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }


def _call(rank: int, world_size: int, port: int, function: Callable, args: tuple, at: Moment | None) -> None:
    _join(rank, world_size, port)
    if at is not None and at.rank in (None, rank):
        _strike(at)
    function(*args)


def _child(rank: int, world_size: int, port: int, argv, at: Moment | None, log: Path | None) -> None:
    if log is not None:
        print_to(f"{log}.{rank}")
    _join(rank, world_size, port)
    if at is not None and at.rank in (None, rank):
        _strike(at)
    from launch.__main__ import run

    run(list(argv))


def print_to(path: str) -> None:
    """Have what this process prints, and says as errors, appended to a file."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)


def _strike(at: Moment) -> None:
    """Send this process the signal when the moment comes, just before the call is carried out."""
    owner = sys.modules[at.module.split(":")[0]]
    for part in at.module.split(":")[1:]:
        owner = getattr(owner, part)
    real, count = getattr(owner, at.name), iter(range(1, 1 << 30))

    def counted(*args, **kwargs):
        if next(count) == at.call:
            os.kill(os.getpid(), at.signal)
        return real(*args, **kwargs)

    setattr(owner, at.name, counted)


@contextmanager
def started(process: BaseProcess) -> Iterator[None]:
    """Start a process that the block waits for; one that has not ended with it is killed."""
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def exit_code(child: BaseProcess, within: float = 240) -> int | None:
    """Start a process, and wait for it; raises TimeoutError where it still runs after so many seconds: it is killed."""
    child.start()
    return _ended(child.name, [child], within)[0]


@contextmanager
def running(args: Sequence, **options) -> Iterator[subprocess.Popen]:
    """A program that is killed where it still runs at the end of the block."""
    process = subprocess.Popen(args, **options)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def eventually(condition: Callable[[], object], within: float = 120.0) -> bool:
    """Whether a condition comes true within so many seconds."""
    end = time.monotonic() + within
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def alive(pid: int) -> bool:
    """Whether there is such a process that has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def all_ended(pids: Iterable[int], within: float) -> bool:
    """Whether the processes end within so many seconds; those that do not are killed."""
    deadline = time.monotonic() + within
    while left := [pid for pid in pids if alive(pid)]:
        if time.monotonic() > deadline:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            return False
        time.sleep(0.02)
    return True
