"""Without a CUDA device Triton's kernels run in its interpreter; that has to be said before Triton is imported.

And the order of the files, and the seeds of what tests draw.
"""

import os
import random
import sys
import zlib
from collections import Counter
from collections.abc import Mapping

import numpy as np
import pytest
import torch

from kernels.backends.device import cuda_reasons, triton_interpreted, triton_reasons

if cuda_reasons():
    os.environ.setdefault("TRITON_INTERPRET", "1")

#: Files that take longest, by the time they take. They come first: with a process for each core, one of them at the end
#: would leave the other cores without work. A run of all tests says at its end which are missing here.
LONGEST = (
    "test_compiled_step.py",
    "test_kernels_compile_modes.py",
    "test_kernels_ops.py",
    "test_launch_train.py",
    "test_csrc_emulation.py",
    "test_kernels_ahead_of_time.py",
    "test_csrc_mutations.py",
    "test_kernels_graph_pass.py",
    "test_step_guards.py",
    "test_models_on_kernels.py",
    "test_packaging.py",
    "test_damage.py",
    "test_full_disk.py",
    "test_csrc_setup.py",
    "test_launch_images.py",
    "test_launch_digits.py",
    "test_launch_evaluate.py",
    "test_csrc_resources.py",
    "test_launch_metrics.py",
    "test_kernels_registry.py",
    "test_bench_step.py",
    "test_bench_gpu_script.py",
    "test_launch_quickstart.py",
    "test_bench_triage_rehearsal.py",
    "test_bench_comparison.py",
    "test_launch_deepspeed_options.py",
)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def hopper(request) -> str:
    """A device that takes Triton's kernels for sm_90: "cpu", in the interpreter, or "cuda"; skips where it cannot."""
    reasons = cuda_reasons((9, 0)) if request.param == "cuda" else triton_reasons()
    if reasons or triton_interpreted() != (request.param == "cpu"):
        pytest.skip("; ".join(reasons) or f"Triton's kernels do not run on {request.param} here")
    return request.param


LINEAR = torch.nn.functional.linear
THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def as_before():
    """What a test must not leave to those after it.

    ZeRO 3 puts its own linear function into torch for the rest of the process; after an error a program is about to
    end, and takes signals so; a watchdog of this process would end it, minutes later, in the middle of another test.
    With another number of threads sums round otherwise, also where a fixture of a whole file has left it so.
    """
    put_threads_back()
    yield
    put_threads_back()
    torch.nn.functional.linear = LINEAR
    if program := sys.modules.get("launch.__main__"):
        program._ending = False
    heartbeat = sys.modules.get("launch.runtime.heartbeat")
    assert heartbeat is None or heartbeat._heartbeat is None, "the test left a watchdog of this process"


def put_threads_back() -> None:
    if torch.get_num_threads() != THREADS:
        torch.set_num_threads(THREADS)


def pytest_collection_modifyitems(items):
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


def left_out(seconds: Mapping[str, float]) -> list[str]:
    """Of the files and the seconds they took, those outside LONGEST that take more than 2 % of all the time."""
    return sorted(name for name, took in seconds.items() if name not in LONGEST and took > 0.02 * sum(seconds.values()))


def pytest_terminal_summary(terminalreporter):
    seconds = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if hasattr(report, "duration"):
                seconds[report.nodeid.partition("::")[0].rpartition("/")[2]] += report.duration
    if len(seconds) > 2 * len(LONGEST) and (missing := left_out(seconds)):
        some = ", ".join(f"{name} ({seconds[name]:.0f} s)" for name in missing)
        terminalreporter.write_line(f"LONGEST in tests/conftest.py is stale, it lacks: {some}")


def seed(name: str) -> None:
    """Let the global generators start at a place of this name."""
    start = zlib.crc32(name.encode())
    random.seed(start)
    np.random.seed(start)
    torch.manual_seed(start)


# A tolerance that holds for some draws and not for others is no test: equal tests draw equal numbers, in any order, and
# whichever other tests run.


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef):
    seed(fixturedef.argname)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item):
    seed(item.nodeid)
