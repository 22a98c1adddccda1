"""Data loading in background processes or threads, which end however reading ends.

An exception in a worker is raised unchanged where its item is asked for, so that its message, which names the file,
is not buried in another process's traceback.
"""

import os
import pickle
import signal
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data._utils.signal_handling import _remove_worker_pids

from launch.runtime.lifetime import STOP_SIGNALS, signal_on_parent_exit

SHARED_MEMORY = Path("/dev/shm")
CLOSE_TIMEOUT = 5.0  # seconds that a reader gets to end


def read_in_processes(dataset: Dataset, keys: Iterable, *, num_workers: int, pin_memory: bool = False) -> Generator:
    """`dataset[key]` for each of `keys`, in order, read ahead by processes (without any: by this one, when asked).

    Closing the generator (or an exception that leaves it) ends the processes at once; they end with this one, too, and
    leave its signals to it.

    Raises what `dataset[key]` raises, for the key that it belongs to, and ChildProcessError where a process is killed.
    """
    if not num_workers:
        yield from DataLoader(dataset, sampler=keys, batch_size=None, pin_memory=pin_memory)
        return
    items = iter(
        DataLoader(
            _ReturnExceptions(dataset),
            sampler=keys,
            batch_size=None,
            num_workers=num_workers,
            pin_memory=pin_memory,
            # Whatever the start method of this process: workers share its memory and have it as their parent.
            multiprocessing_context="fork",
            worker_init_fn=partial(_init_worker, parent=os.getpid()),
        )
    )
    # Else torch raises its error wherever the main thread is when a worker dies, such as amid a collective.
    _remove_worker_pids(id(items))
    items._worker_pids_set = False
    try:
        while (item := _next(items)) is not None:
            if isinstance(item, _Failure):
                raise item.exception()
            yield item
    finally:
        _kill(items)


def read_in_threads(load: Callable[[Any], Any], keys: Iterable, *, threads: int) -> Generator:
    """`load(key)` for each of `keys`, in order, read ahead by so many threads, two keys each.

    Closing the generator waits a few seconds for what is being read, and no longer.
    """
    keys = iter(keys)
    # As torch's own pinning thread does, lest each of these start a team of threads for its part of a batch.
    pool = ThreadPoolExecutor(threads, "loader", initializer=torch.set_num_threads, initargs=(1,))
    coming: deque[Future] = deque()
    try:
        coming.extend(pool.submit(load, key) for key in islice(keys, 2 * threads))
        while coming:
            loaded = coming[0].result()
            coming.popleft()
            coming.extend(pool.submit(load, key) for key in islice(keys, 1))
            yield loaded
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        if not wait([future for future in coming if not future.cancelled()], timeout=CLOSE_TIMEOUT).not_done:
            pool.shutdown()


@dataclass(frozen=True)
class _Failure:
    """An exception on its way from a worker."""

    pickled: bytes

    @classmethod
    def of(cls, error: Exception) -> "_Failure":
        error.add_note(f"in loader process {get_worker_info().id}:\n{traceback.format_exc()}")
        try:
            pickled = pickle.dumps(error)
            pickle.loads(pickled)  # some can be written and not read
        except Exception:
            pickled = pickle.dumps(RuntimeError("".join(traceback.format_exception(error))))
        return cls(pickled)

    def exception(self) -> Exception:
        return pickle.loads(self.pickled)


class _ReturnExceptions(Dataset):
    """A dataset that returns its exceptions: torch would replace their message by a traceback."""

    def __init__(self, dataset: Dataset):
        self._dataset = dataset

    def __getitem__(self, key):
        try:
            return self._dataset[key]
        except Exception as e:
            return _Failure.of(e)


def _init_worker(number: int, parent: int) -> None:
    """A launcher signals every process below it: workers must outlive the step that ends in a checkpoint."""
    for ignored in STOP_SIGNALS:
        signal.signal(ignored, signal.SIG_IGN)
    signal_on_parent_exit(signal.SIGKILL, parent)


def _next(items):
    """The next item, or None after the last."""
    try:
        return next(items, None)
    except (RuntimeError, OSError, EOFError) as e:
        # Exceptions of the dataset come as items: this is one of the loader itself, mostly as a worker has died.
        for worker in items._workers:
            worker.join(timeout=1 / len(items._workers))
        dead = [worker for worker in items._workers if worker.exitcode is not None]
        if not dead:
            raise
        raise ChildProcessError(_describe_death(dead[0], len(items._workers))) from e


def _describe_death(worker, num_workers: int) -> str:
    who = f"loader process {worker.pid} (one of data.num_workers {num_workers})"
    if worker.exitcode >= 0:
        return f"{who} ended with status {worker.exitcode}"
    reasons = {
        signal.SIGKILL: ": the system kills so where memory runs out; fewer workers need less",
        signal.SIGBUS: ": no room in /dev/shm (in a container: --shm-size), or a file that was cut short while in use",
    }
    number = signal.Signals(-worker.exitcode)
    return f"{who} was ended by {number.name}{reasons.get(number, '')}"


def _kill(items) -> None:
    """End the workers as they are: torch's own way waits for locks, which one that was killed may have held."""
    items._shutdown = True
    if hasattr(items, "_pin_memory_thread"):
        items._pin_memory_thread_done_event.set()
    end_processes(items._workers)


def end_processes(workers: Sequence[Any]) -> None:
    """Kill loader processes and free what they were about to hand over."""
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join(timeout=CLOSE_TIMEOUT)  # one that waits for a disk that does not answer cannot even be killed
        # torch takes the name away only once both have it open.
        for memory in SHARED_MEMORY.glob(f"torch_{worker.pid}_*"):
            with suppress(OSError):
                memory.unlink()
