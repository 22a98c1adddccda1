"""Entry points for pytest-benchmark, on a GPU; a run of the tests does not collect them.

    pytest bench/ --benchmark-json=now.json [-k "swiglu and XL and bfloat16"]
    pytest-benchmark compare before.json now.json

A test is one provider of a group that is measured together. All of it is checked as `python -m bench.ops` and
`bench.step` check: what is wrong is not timed.
"""

import pytest

pytest.importorskip("pytest_benchmark")

import kernels
from bench import step
from bench.measure import ceilings
from bench.measure.rows import Log
from bench.measure.timing import CudaDevice
from bench.ops import DIRECTIONS, OpJob, jobs
from bench.pages.measured import HEADLINE
from bench.plugins.samples import REPLAY, Last, OpBench, StepBench, play, row_of
from bench.workloads.providers import providers_for
from kernels.backends.device import cuda_reasons

NEEDS = cuda_reasons()
pytestmark = [pytest.mark.skipif(bool(NEEDS), reason="; ".join(NEEDS)), pytest.mark.benchmark(timer=REPLAY)]

COMPARISONS = [
    pytest.param(job, direction, provider.name, id="-".join([*job.names.values(), direction, provider.name]))
    for job in jobs(kernels.OPS.values())
    for direction in (DIRECTIONS[:2] if job.op.differentiable else ("forward",))
    for provider in providers_for(job.op)
]  # fmt: skip
STEPS = next(step.jobs([HEADLINE[0]], [HEADLINE[1]], list(step.QUICK)))


@pytest.fixture(scope="module")
def parts():
    """What a bench needs: the device, a log without a file, ceilings."""
    device = CudaDevice()
    log = Log(device.kind)
    return device, log, ceilings.measure(device, log)


@pytest.fixture(scope="module")
def measured_op(parts):
    return Last(OpBench(*parts).measured)


@pytest.fixture(scope="module")
def measured_step(parts):
    return Last(StepBench(*parts).measured)


@pytest.mark.parametrize(("job", "direction", "provider"), COMPARISONS)
def test_op(benchmark, measured_op, job: OpJob, direction: str, provider: str):
    benchmark.group = f"{job} {direction}"
    play(benchmark, *row_of(measured_op(job), direction, provider))


@pytest.mark.parametrize("variant", [variant.name for variant in STEPS.variants])
def test_step(benchmark, measured_step, variant: str):
    benchmark.group = f"{STEPS.model} batch {STEPS.batch}"
    play(benchmark, *measured_step(STEPS)[variant])
