"""Benchmarks for pytest-benchmark and its comparison tools, on a GPU; a run of the tests does not collect them.

    pytest bench/ --benchmark-json=now.json [-k "swiglu and XL and bfloat16"]
    pytest-benchmark compare before.json now.json

A test is one provider of an op, or one way to train, made and checked as `bench.ops` and `bench.step` do: what is wrong
is not timed. pytest-benchmark does the timing, by CUDA events; a sample is the time of one call.
"""

from contextlib import ExitStack
from functools import lru_cache
from typing import NoReturn

import pytest

pytest.importorskip("pytest_benchmark")

import torch

import kernels
from bench import ops, step
from bench.gate import compare
from bench.measure import ceilings, timing
from bench.measure.comparison import Comparison
from bench.measure.failures import status_of
from bench.measure.losses import LOSS_BASELINES
from bench.measure.progress import PeakMemory
from bench.measure.rows import Log, machine
from bench.pages.measured import HEADLINE
from bench.workloads.providers import providers_for
from kernels.backends.device import cuda_reasons

SECONDS, WARMUP_SECONDS, LEAST_ROUNDS = 1.0, 0.2, 5
EXTRA = ("gpu", "revision", "fraction", "bound", "method", "calls", "images_per_second", "mfu", "peak_gb")


class CudaTimer:
    """Seconds on the GPU, by an event at each reading; `calls`: of a call, where so many lie between two readings."""

    __name__ = "CUDA events"

    def __init__(self) -> None:
        self.calls, self._total = 1, 0.0
        self._last: torch.cuda.Event | None = None

    def __call__(self) -> float:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        if self._last is not None:  # summed up, as an event's float32 milliseconds are too coarse for a long session
            self._total += self._last.elapsed_time(event) / 1000
        self._last = event
        return self._total / self.calls


TIMER = CudaTimer()
NEEDS = cuda_reasons()
pytestmark = [
    pytest.mark.skipif(bool(NEEDS), reason=f"speed is measured on a GPU: {'; '.join(NEEDS)}"),
    pytest.mark.benchmark(timer=TIMER),
]

OPS = [
    pytest.param(job, direction, provider.name, id="-".join([*job.names.values(), direction, provider.name]))
    for job in ops.jobs(kernels.OPS.values())
    for direction in (ops.DIRECTIONS[:2] if job.op.differentiable else ("forward",))
    for provider in providers_for(job.op)
]
STEPS = next(step.jobs([HEADLINE[0]], [HEADLINE[1]], list(step.QUICK)))


@pytest.fixture(scope="module")
def parts():
    """Device, log (without a file) and ceilings."""
    device = timing.CudaDevice()
    log = Log(device.kind)
    return device, log, ceilings.measure(device, log)


@pytest.fixture(scope="module")
def op_comparison(parts):
    return ops.OpComparison(*parts)


@pytest.fixture(scope="module")
def by_direction(op_comparison):
    """Job → what `OpComparison.by_direction` says, kept for the neighbouring tests."""
    return lru_cache(maxsize=1)(op_comparison.by_direction)


@pytest.fixture(scope="module")
def step_comparison(parts):
    return step.StepComparison(*parts)


@pytest.fixture(scope="module")
def baseline_loss(step_comparison):
    """The first loss of the plain model, which those of the other ways are checked against."""
    name = next(name for name in LOSS_BASELINES if name in STEPS.providers)
    ready = step_comparison.prepare(STEPS, name, None)
    ready.release()
    return {name: ready.value}


@pytest.mark.parametrize(("job", "direction", "provider"), OPS)
def test_op(benchmark, op_comparison, by_direction, job, direction, provider):
    benchmark.group = f"{job} {direction}"
    row = op_comparison.named(job, provider) | {"kind": "op"}
    with op_comparison.device.active():
        try:
            found, absent = by_direction(job)
        except Exception as error:
            refuse(row, *status_of(error))
        if provider in absent:
            refuse(row, *absent[provider])
        (wanted,) = (one for one in found if one.direction == direction)
        measure(benchmark, op_comparison, wanted, provider, op_comparison.set_up(wanted), {})


@pytest.mark.parametrize("variant", STEPS.providers)
def test_step(benchmark, step_comparison, baseline_loss, variant):
    benchmark.group = str(STEPS)
    measure(benchmark, step_comparison, STEPS, variant, None, baseline_loss)


def measure(benchmark, comparison: Comparison, job, name: str, shared, values: dict) -> None:
    """Make a provider, check it beside the values of others, and let pytest-benchmark time it."""
    row, device = comparison.named(job, name) | {"kind": comparison.kind}, comparison.device
    with ExitStack() as stack:
        stack.callback(comparison.tidy)
        try:
            with PeakMemory(device.kind == "cuda") as peak:
                ready = comparison.prepare(job, name, shared)
            stack.callback(ready.release)
            wrong = comparison.wrong(job, values | {name: ready.value}, shared)
        except Exception as error:
            refuse(row, *status_of(error))
        if name in wrong:
            refuse(row, "incorrect", wrong[name])
        (iteration,) = ready.iterations.values()
        once = max(device.seconds(iteration.run, 2)[1], 1e-7)
        TIMER.calls = iteration.calls
        benchmark.pedantic(
            iteration.run,
            setup=iteration.restore,
            rounds=max(LEAST_ROUNDS, int(SECONDS / once)),
            warmup_rounds=int(WARMUP_SECONDS / once) + 1,
        )
        ready.early[""] = timing.Timing(iteration.calls, iteration.method, list(benchmark.stats.stats.data))
        facts = machine(device.kind) | ready.about | comparison.figures(job, ready) | {"peak_gb": peak.gigabytes}
        benchmark.extra_info |= {key: facts[key] for key in EXTRA if key in facts}


def refuse(row: dict, status: str, why: str) -> NoReturn:
    """Fail where a provider of ours is wrong or fails; skip any other that cannot be timed."""
    if status in compare.WRONG and compare.mine(row):
        pytest.fail(f"{status}: {why}", pytrace=False)
    pytest.skip(f"{status}: {why}")
