"""The bench's calls of torch on a device, with stand-ins where torch would ask a driver."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from bench.measure.breakdown import Interval, on_device
from bench.measure.timing import CudaDevice

POOL = (0, 7)


class Allocator:
    """torch.cuda and its allocator, as a capture moves them in torch 2.11; `ends`: whether a capture can be ended."""

    def __init__(self, patch, ends: bool):
        self.ends, self.underway, self.uses = ends, set(), 0
        patch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: POOL)
        patch.setattr(torch.cuda, "graph", self.graph)
        patch.setattr(torch.cuda, "synchronize", lambda: None)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch._C, "_cuda_endAllocateToPool", self.end, raising=False)
        patch.setattr(torch._C, "_cuda_releasePool", self.release, raising=False)

    @contextmanager
    def graph(self, graph, pool, stream):
        self.underway.add(pool)
        self.uses += 1
        try:
            yield
        finally:
            if not self.ends:
                raise RuntimeError("operation failed due to a previous error during capture\nand more")
            self.underway.remove(pool)

    def end(self, device, pool):
        if pool not in self.underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.underway.remove(pool)

    def release(self, device, pool):
        self.uses -= 1


def raising():
    calls = []

    def iteration():
        calls.append(None)
        if len(calls) > 2:
            raise RuntimeError("operation not permitted when stream is capturing\ndetails")

    return iteration


@pytest.mark.parametrize(
    ("iteration", "ends", "method", "uses"),
    [
        (lambda: "results", True, "graph", 1),
        (raising(), False, "events: operation not permitted when stream is capturing", 0),
        (raising(), True, "events: operation not permitted when stream is capturing", 1),
        (lambda: "results", False, "events: operation failed due to a previous error during capture", 0),
    ],
    ids=["captured", "broken", "raised", "not ended"],
)
def test_a_capture_that_fails_leaves_the_allocator_as_it_was(iteration, ends, method, uses, monkeypatch):
    """`uses`: of the pool, by a graph that will give it back."""
    allocator, device = Allocator(monkeypatch, ends), CudaDevice.__new__(CudaDevice)
    device.stream = None
    run, told = device.replayable(iteration)
    assert told == method and not allocator.underway and allocator.uses == uses
    assert (run is iteration) == (method != "graph") and (method != "graph" or run.kept == "results")


def test_seconds_of_iterations_are_the_milliseconds_between_events(monkeypatch):
    """Iterations of 2, 40 and 500 ms on a device whose clock runs on with each."""
    clock, iterations = [0.0], iter([0.002, 0.040, 0.500])

    class Event:
        """As torch's: `elapsed_time` in milliseconds."""

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock[0]

        def elapsed_time(self, end):
            return (end.at - self.at) * 1e3

    def iteration():
        clock[0] += next(iterations)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert CudaDevice.__new__(CudaDevice).seconds(iteration, 3) == pytest.approx([0.002, 0.040, 0.500])


def test_regions_are_no_kernels():
    """A profiler lays the name of a region over the kernels that ran in it."""

    def event(name, device, start, end, annotation=False):
        return SimpleNamespace(
            name=name,
            device_type=getattr(torch.autograd.DeviceType, device),
            time_range=SimpleNamespace(start=start, end=end),
            is_user_annotation=annotation,
        )

    events = [
        event("aten::mm", "CPU", 0, 9),
        event("nvjet", "CUDA", 10, 30),
        event("Memset", "CUDA", 30, 30),
        event("Optimizer.step#AdamW.step", "CUDA", 10, 80, annotation=True),
    ]
    assert on_device(events) == [Interval("nvjet", pytest.approx(1e-5), pytest.approx(3e-5))]
    on_a_cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=on_a_cpu) as profile, torch.profiler.record_function("a region"):
        torch.zeros(1)
    assert {event.name: event.is_user_annotation for event in profile.events()}["a region"]
