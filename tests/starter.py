"""`python -m tests.starter WORLD_SIZE PROGRAM …`: a launcher that only starts processes and waits for them.

It imports the programs once and forks, so that a start takes seconds. It ends none of them, hands SIGTERM on to all,
and ends with the first status that was not 0, as a shell gives it.
"""

import atexit
import importlib
import multiprocessing
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

from launch.runtime.lifetime import signal_on_parent_exit
from tests.children import PRELOADED, free_port

_fork = multiprocessing.get_context("fork")


def main(world_size: int, argv: list[str]) -> int:
    for module in PRELOADED:
        importlib.import_module(module)
    port, running, first = free_port(), set(), 0
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # one that comes before all are started waits
    for rank in range(world_size):
        if (pid := os.fork()) == 0:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
            _be(rank, world_size, port, argv)
        running.add(pid)

    def hand_on(number: int, frame: object) -> None:
        for pid in running:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(pid, number)

    signal.signal(signal.SIGTERM, hand_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    while running:
        pid, status = os.wait()
        running.discard(pid)
        status = os.waitstatus_to_exitcode(status)
        first = first or (128 - status if status < 0 else status)
    return first


def start(world_size: int, argv: list[str], said: Path) -> multiprocessing.Process:
    """The same as a child of this process, which imports the programs once for all; what it says goes to a file."""
    for module in PRELOADED:
        importlib.import_module(module)
    child = _fork.Process(target=_say_into, args=(os.getpid(), said, world_size, argv))
    child.start()
    return child


def stop(child: multiprocessing.Process) -> None:
    """End what `start` has started, if it has not ended by itself; its processes end with it."""
    child.kill()
    child.join()


def _say_into(parent: int, said: Path, world_size: int, argv: list[str]) -> None:
    signal_on_parent_exit(signal.SIGKILL, parent)  # the run ends with it
    atexit._clear()  # of this process's parent, such as the removal of its temporary directories
    handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    os._exit(main(world_size, argv))


def _be(rank: int, world_size: int, port: int, argv: list[str]) -> None:
    """One process of the run."""
    import torch

    torch.set_num_threads(1)
    place = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ |= {name: str(value) for name, value in place.items()}
    from launch.__main__ import run

    run(argv)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
