"""Save a run in the background: a copy of the state in host memory, then files written while training goes on.

At a save every process copies its own part of weights, average and moments (`Engine.own_parts`): that is the pause. A
thread then sends it to the main process, whose thread writes the files, one part of a tensor after the other: the same
bytes as `Engine.full_state` and `checkpoint.save` make. The threads have a process group of their own.
"""

import copy
import logging
import platform
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from common.files import WriteError, path_exists
from common.tensors import TensorInParts
from launch.runtime import launcher
from launch.runtime.processes import Processes
from launch.training import checkpoint
from launch.training.config import TrainConfig
from launch.training.engine import Engine
from launch.training.log import RunLog

logger = logging.getLogger(__name__)

#: That a process waits for another one to send or take a part; one that has ended is noticed at once.
PEER_TIMEOUT = timedelta(minutes=30)
LEAVE_TIMEOUT = 20.0  # seconds that a run which ends by an error still gives to a save


@dataclass(frozen=True)
class Saved:
    """A checkpoint that has been written, times in seconds.

    Attributes:
        pause_seconds: that the host waited.
        copy_seconds: that a GPU's copy to host memory took beside the next passes; what is left of it when they have
            ended, the device waits for. None without a GPU, whose copy is the pause.
        write_seconds: from the pause's end to the checkpoint being whole.
        seconds: of both.
    """

    step: int
    pause_seconds: float
    write_seconds: float
    seconds: float
    bytes: int
    copy_seconds: float | None = None

    def row(self) -> dict[str, Any]:
        """As an event of the run's log."""
        times = {key: getattr(self, key) for key in ("pause_seconds", "copy_seconds", "write_seconds")}
        times = {key: value for key, value in times.items() if value is not None}
        return {"step": self.step, "event": "saved", **times, "bytes": self.bytes}


def report(saved: Saved, log: RunLog) -> None:
    """Write it into the run's log, which says it, too."""
    launcher.warn_of_slow_checkpoint(saved.seconds)
    log.write_event(saved.row())


def versions() -> dict[str, str]:
    """Of what computed a state, for the record."""
    return {"python": platform.python_version(), "torch": torch.__version__, "deepspeed": version("deepspeed")}


class HostCopy:
    """This process's part of one engine's state, in float32 in host memory, which is taken once and used again.

    On a GPU the memory is pinned and the copy runs on a stream of its own beside the next forward and backward passes:
    the engine lets nothing change the state before its end, and whoever reads the copy calls `wait`.
    """

    def __init__(self, engine: Engine, device: torch.device, is_main: bool):
        self._engine, self._is_main = engine, is_main
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._begun: torch.cuda.Event | None = None
        self._copied: torch.cuda.Event | None = None
        #: Name → first element and number of elements of this process's part.
        self.extents = {name: (start, part.numel()) for name, start, part in engine.own_parts("model")}
        self.untrained: dict[str, torch.Tensor] = {}
        sizes = [size for _, size in self.extents.values()]
        self._parts = {
            key: dict(zip(self.extents, _host_memory(sum(sizes), device).split(sizes), strict=True))
            for key in checkpoint.KEYS
        }

    def part(self, key: str, name: str) -> torch.Tensor:
        """float32 [elements], flat; see `wait`."""
        return self._parts[key][name]

    def fill(self) -> None:
        """Copy the present state; on a GPU it is only begun."""
        if self._stream is None:
            self._copy()
        else:
            self._stream.wait_stream(torch.cuda.current_stream())
            self._begun, self._copied = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._begun.record(self._stream)
            with torch.cuda.stream(self._stream):
                self._copy()
            self._copied.record(self._stream)
            self._engine.copied = self._copied
        self.untrained = self._engine.untrained_state() if self._is_main else {}

    def _copy(self) -> None:
        for key, parts in self._parts.items():
            for name, _, value in self._engine.own_parts(key):
                parts[name].view(value.shape).copy_(value.detach(), non_blocking=True)

    def wait(self) -> float | None:
        """Until the copy has ended → seconds that it took on a GPU, None without one."""
        if self._begun is None or self._copied is None:
            return None
        self._copied.synchronize()
        return self._begun.elapsed_time(self._copied) / 1e3


def _host_memory(size: int, device: torch.device) -> torch.Tensor:
    """float32 [size] on the CPU, pinned for a GPU where that is possible, every page of it there already."""
    if device.type == "cuda":
        try:
            return torch.empty(size, dtype=torch.float32, pin_memory=True)
        except RuntimeError as e:
            logger.warning("%d bytes cannot be pinned, so saving waits for the GPU (%s)", 4 * size, e)
    return torch.empty(size, dtype=torch.float32).fill_(0)


class Saver:
    """Saves the state of a run's engines; every process has one and calls the same methods at the same steps.

    At most one save is being written. With `train.background_save` false, a save is gathered and written before `save`
    returns, and no host memory is held.

    Args:
        directory: where the checkpoints are. The first save makes it; once gone, it is an error.
        train: for `background_save`, `keep_checkpoints` and `keep_every`.
    """

    def __init__(self, directory: Path, engines: Mapping[str, Engine], processes: Processes, train: TrainConfig):
        self._directory, self._engines, self._processes, self._train = directory, engines, processes, train
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._finished: deque[Saved] = deque()
        self._written = False
        self._copies: dict[str, HostCopy] = {}
        self._group: dist.ProcessGroup | None = None
        if train.background_save:
            self._copies = {
                name: HostCopy(engine, processes.device, processes.is_main) for name, engine in engines.items()
            }
            extents = processes.all_gather({name: each.extents for name, each in self._copies.items()})
            self._layout = {name: _layout([of_rank[name] for of_rank in extents]) for name in engines}
            if any(parts for of_rank in extents[1:] for parts in of_rank.values()):
                self._group = dist.new_group(backend="gloo", timeout=PEER_TIMEOUT)
        self._awaited: deque[tuple[int, int]] = deque()  # rank and elements of the parts still to be received

    def save(self, state: dict | None) -> None:
        """Save the present step: `state` (the main process's, else None) and the tensors of all engines.

        Returns when the state may change again. Waits for the save before, if that is still being written, and raises
        what it met; what this one meets, `poll` or `wait` raise.
        """
        begin = time.perf_counter()
        self.wait()
        if not self._train.background_save:
            self._save_inline(state, begin)
            return
        for each in self._copies.values():
            each.fill()
        pause = time.perf_counter() - begin
        work = partial(self._write_parts, copy.deepcopy(state), begin, pause) if state is not None else self._send
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint writer", daemon=True)
        self._thread.start()

    def poll(self) -> list[Saved]:
        """The saves that have ended since the last call (on the main process); raises what the last one met."""
        self._raise()
        return [self._finished.popleft() for _ in range(len(self._finished))]

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing is being written, at most so many seconds → whether that is so; raises as `poll`."""
        if self._thread is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                return False
            self._thread = None
        self._raise()
        return True

    def leave(self) -> None:
        """End in a moment, also where an error is on its way: what is being written gets some seconds, and no say."""
        try:
            if not self.wait(LEAVE_TIMEOUT):
                logger.warning("the checkpoint that was being written is given up; the one before it is whole")
        except Exception as e:
            logger.warning("the checkpoint that was being written is lost: %s", e)

    def close(self) -> None:
        """Give back host memory and the process group, once nothing is being written; nothing can be saved then."""
        self.leave()
        if self._thread is None:
            self._copies = {}
            if self._group is not None:
                dist.destroy_process_group(self._group)
                self._group = None

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as e:
            self._error = e
            with suppress(RuntimeError):
                self._discard_awaited()

    def _save_inline(self, state: dict | None, begin: float) -> None:
        is_main = state is not None
        networks = {name: engine.full_state(keep=is_main) for name, engine in self._engines.items()}
        if state is not None:
            gathered = time.perf_counter()
            written = self._write(state, networks)
            end = time.perf_counter()
            self._finished.append(Saved(state["step"], end - begin, end - gathered, end - begin, written))
        self._processes.barrier()

    def _write_parts(self, state: dict, begin: float, pause: float) -> None:
        copied = [each.wait() for each in self._copies.values()]
        self._awaited = deque(
            (rank, size)
            for network in self._engines
            for _ in checkpoint.KEYS
            for parts in self._layout[network].values()
            for rank, _, size in parts
            if rank > 0
        )
        written = self._write(
            state,
            {name: {key: self._tensors(name, key) for key in checkpoint.KEYS} for name in self._engines},
        )
        end = time.perf_counter()
        copy_seconds = None if None in copied else sum(filter(None, copied))
        self._finished.append(Saved(state["step"], pause, end - begin - pause, end - begin, written, copy_seconds))

    def _write(self, state: dict, networks: Mapping) -> int:
        """Write a checkpoint and remove those that are not to be kept → its bytes."""
        self._check_directory()
        try:
            path = checkpoint.save(self._directory, state, networks)
            if self._train.keep_checkpoints:
                checkpoint.prune(self._directory, self._train.keep_checkpoints, self._train.keep_every)
            written = sum(file.stat().st_size for file in path.iterdir())
        except OSError:
            self._check_directory()
            raise
        self._written = True
        return written

    def _check_directory(self) -> None:
        """Raise WriteError where the directory that a save has made was moved or removed, or is unmounted."""
        if self._written and not path_exists(self._directory):
            raise WriteError(f"cannot write {self._directory}: it is gone")

    def _tensors(self, network: str, key: str) -> dict[str, torch.Tensor | TensorInParts]:
        tensors: dict[str, torch.Tensor | TensorInParts] = {
            name: TensorInParts(torch.float32, shape, partial(self._parts, network, key, name))
            for name, shape in self._engines[network].shapes().items()
        }
        if key == "model":
            tensors.update(self._copies[network].untrained)
        return tensors

    def _parts(self, network: str, key: str, name: str) -> Iterator[torch.Tensor]:
        for rank, _, size in self._layout[network].get(name, ()):
            yield self._copies[network].part(key, name) if rank == 0 else self._receive(rank, size)

    def _receive(self, rank: int, size: int) -> torch.Tensor:
        expected = self._awaited.popleft()
        assert expected == (rank, size), f"parts are sent in another order: {expected}, not {(rank, size)}"
        part = torch.empty(size, dtype=torch.float32)
        try:
            dist.recv(part, src=rank, group=self._group)
        except RuntimeError:
            self._awaited.clear()  # nothing more will come
            raise
        return part

    def _discard_awaited(self) -> None:
        """Take what peers still send: they do not know that it cannot be written."""
        while self._awaited:
            self._receive(*self._awaited[0])

    def _send(self) -> None:
        """Send this process's parts in the order in which the main one writes them."""
        for each in self._copies.values():
            each.wait()
            for key in checkpoint.KEYS:
                for name in each.extents:
                    dist.send(each.part(key, name), dst=0, group=self._group)


def _layout(extents: list[dict[str, tuple[int, int]]]) -> dict[str, list[tuple[int, int, int]]]:
    """From each rank's extents, name → the parts of a parameter in their order: rank, first element, elements."""
    parts: dict[str, list[tuple[int, int, int]]] = {}
    for rank, own in enumerate(extents):
        for name, (start, size) in own.items():
            parts.setdefault(name, []).append((rank, start, size))
    return {name: sorted(found, key=lambda part: part[1]) for name, found in parts.items()}
