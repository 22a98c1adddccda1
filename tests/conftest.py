"""Without a CUDA device Triton's kernels run in its interpreter; that has to be said before Triton is imported.

And the order of the files.
"""

import os

import pytest

from kernels.device import cuda_reasons, triton_interpreted, triton_reasons

if cuda_reasons():
    os.environ.setdefault("TRITON_INTERPRET", "1")

#: Files that take longest, by the time they take. They come first: with a process for each core, one of them at the end
#: would leave the other cores without work.
LONGEST = (
    "test_compiled_step.py", "test_kernels_ops.py", "test_launch_train.py", "test_csrc_emulation.py",
    "test_kernels_ahead_of_time.py", "test_csrc_mutations.py", "test_step_guards.py", "test_models_on_kernels.py",
    "test_csrc_setup.py", "test_launch_digits.py", "test_launch_evaluate.py", "test_csrc_resources.py",
    "test_launch_metrics.py", "test_kernels_registry.py", "test_bench_step.py", "test_bench_gpu_script.py",
    "test_launch_quickstart.py", "test_bench_triage_rehearsal.py", "test_kernels_compilation.py",
)  # fmt: skip


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def hopper(request) -> str:
    """A device that takes Triton's kernels for sm_90: "cpu", in the interpreter, or "cuda"; skips where it cannot."""
    reasons = cuda_reasons((9, 0)) if request.param == "cuda" else triton_reasons()
    if reasons or triton_interpreted() != (request.param == "cpu"):
        pytest.skip("; ".join(reasons) or f"Triton's kernels do not run on {request.param} here")
    return request.param


def pytest_collection_modifyitems(items):
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))
