"""Timing: iterations of several providers in interleaved rounds, by CUDA graphs and events, past the L2.

An iteration calls the work with several sets of buffers in turn, so that a set that comes again has left the L2 cache,
and often enough that the gap between two iterations does not matter. The clock times whole iterations, each provider's
in rounds that alternate with the others', and drops the first iteration of each round. What is random in the machine
thus falls on all providers alike.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch

#: Bytes that the sets hold at least: a buffer below about 150 MB measures the L2 of today's GPUs, so twice that, …
FOOTPRINT = 300_000_000
#: … and this many times the L2, where that is more.
TIMES_L2 = 5
#: Bytes that an iteration moves at least, about a millisecond's: between two replays of a graph the device idles.
ITERATION_BYTES = 3_000_000_000
MOST_CALLS = 640
ROUNDS = 8
#: Seconds of iterations before the first that counts: clocks rise, handles and caches fill.
WARM_UP = 0.2


class Device(Protocol):
    """A device that runs and times iterations; tests replace it."""

    kind: str
    l2_bytes: int

    def active(self) -> AbstractContextManager:
        """Everything that belongs to a measurement is made and run in this context."""

    def replayable(self, iteration: Callable[[], Any]) -> tuple[Callable[[], Any], str]:
        """An iteration to run again and again, and how it is run: "graph", "events: why no graph" or "host clock"."""

    def seconds(self, iteration: Callable[[], Any], count: int) -> list[float]:
        """Run the iteration `count` times; the seconds of each."""


@dataclass(frozen=True)
class Iteration:
    """A unit of timing: `run` makes `calls` calls; `restore`, never timed, puts back what they have overwritten."""

    run: Callable[[], Any]
    calls: int = 1
    restore: Callable[[], None] = lambda: None
    method: str = ""


@dataclass
class Timing:
    """Seconds of one call, from iterations of `calls` calls each, made in so many rounds."""

    calls: int
    method: str
    samples: list[float] = field(default_factory=list)
    rounds: int = 0

    def quantile(self, q: float) -> float:
        return float(np.quantile(self.samples, q))

    @property
    def median(self) -> float:
        return self.quantile(0.5)

    @property
    def spread(self) -> float:
        """Width of the middle 60 % of the samples, as a part of their median."""
        return (self.quantile(0.8) - self.quantile(0.2)) / self.median


class IterationFailed(RuntimeError):
    """A provider's iteration raised: `name` says whose, the cause says what."""

    def __init__(self, name: Any):
        self.name = name
        super().__init__(f"the iteration of {name} failed")


def iteration_size(moved: int, l2_bytes: int) -> tuple[int, int]:
    """Sets of buffers, and calls of an iteration, where a call moves so many bytes; neither is above `MOST_CALLS`."""
    moved = max(1, moved)
    sets = min(MOST_CALLS, max(1, math.ceil(max(FOOTPRINT, TIMES_L2 * l2_bytes) / moved)))
    return sets, min(MOST_CALLS, max(sets, math.ceil(ITERATION_BYTES / moved)))


def interleave(
    iterations: Mapping[Any, Iteration], device: Device, seconds: float, rounds: int = ROUNDS
) -> dict[Any, Timing]:
    """Time the iterations by turns; about `seconds` of samples for each, in `rounds` rounds.

    Raises:
        IterationFailed: an iteration raised.
    """
    return deque(time_rounds(iterations, device, seconds, rounds), maxlen=1)[0]


def time_rounds(
    iterations: Mapping[Any, Iteration], device: Device, seconds: float, rounds: int
) -> Iterator[dict[Any, Timing]]:
    """The same round by round: all that has been timed, first after the warm-up (nothing yet), then after each round.

    Each round begins with another provider, so that none always follows the same one.
    """
    counts: dict[Any, int] = {}
    timings = {name: Timing(iteration.calls, iteration.method) for name, iteration in iterations.items()}
    names = list(iterations)
    for name in names:
        with _named(name):
            counts[name] = _count(iterations[name], device, seconds / rounds, len(iterations))
    yield timings
    for turn in range(rounds if names else 0):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            with _named(name):
                iterations[name].restore()
                samples = device.seconds(iterations[name].run, counts[name] + 1)[1:]
            timings[name].samples += [sample / iterations[name].calls for sample in samples]
            timings[name].rounds += 1
            yield timings


@contextmanager
def _named(name: Any) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise IterationFailed(name) from error


def _count(iteration: Iteration, device: Device, seconds: float, providers: int) -> int:
    """Warm the iteration up, and say how many fit into `seconds`."""
    iteration.restore()
    once = max(device.seconds(iteration.run, 2)[1], 1e-7)
    device.seconds(iteration.run, max(1, math.ceil(WARM_UP / providers / once)))
    return max(1, int(seconds / once))


class CudaDevice:
    """Iterations as CUDA graphs, where they can be captured, between CUDA events."""

    kind = "cuda"

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.l2_bytes = torch.cuda.get_device_properties().L2_cache_size

    def active(self) -> AbstractContextManager:
        return torch.cuda.stream(self.stream)

    def replayable(self, iteration):
        for _ in range(2):  # compiles, tunes, fills caches: none of it can be captured
            iteration()
        torch.cuda.synchronize()
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.graph(graph, pool, self.stream):
                kept = iteration()
        except RuntimeError as error:
            _end_allocations(pool)
            torch.cuda.synchronize()
            first = error.__context__ or error  # what the iteration raised, before the capture could not be ended
            return iteration, f"events: {str(first).splitlines()[0]}"
        return _Replay(graph, kept), "graph"

    def seconds(self, iteration, count):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        marks[0].record()
        for mark in marks[1:]:
            iteration()
            mark.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1000 for start, end in pairwise(marks)]


def _end_allocations(pool: tuple[int, int]) -> None:
    """Clean up after a failed capture, as torch before 2.12 does not: its allocator then refuses to free any memory."""
    with suppress(RuntimeError):  # it was done, and the graph will give the pool back
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        torch._C._cuda_releasePool(torch.cuda.current_device(), pool)


@dataclass(frozen=True)
class _Replay:
    """A captured iteration with its results, whose memory the graph writes."""

    graph: Any
    kept: Any

    def __call__(self) -> None:
        self.graph.replay()


class HostDevice:
    """A CPU and the host's clock around each iteration. For tests of the bench; its rows say "cpu"."""

    kind = "cpu"
    l2_bytes = 0

    def active(self) -> AbstractContextManager:
        return nullcontext()

    def replayable(self, iteration):
        iteration()
        return iteration, "host clock"

    def seconds(self, iteration, count):
        found = []
        for _ in range(count):
            start = time.perf_counter()
            iteration()
            found.append(time.perf_counter() - start)
        return found
