"""A pytest plugin for several processes on one GPU: a test begins when the memory that it takes is free.

    pytest -p tests.plugins.memory -n 8 -m gpu …

The memory of an op's test is counted beforehand, on meta tensors. Parts of the device's memory are files, and a process
that holds the lock of one may use that part; the locks of a process end with it.
"""

import fcntl
import gc
import sys
import tempfile
import time
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.testing.tolerance import as_float64, gradients, outputs, reference
from tests.plugins.op_parameters import OpParameters, op_parameters

GIB = 1 << 30
#: Bytes of a part; tests that take less need none.
PART = 2 * GIB
#: Bytes of a process beside the parts: its CUDA context and kernels, small tests, and their memory that torch keeps.
BESIDE = 2 * GIB
KEPT = 1 * GIB
#: A check holds the inputs twice, the results in the dtype of the test and the errors of the exact ones beside the
#: reference in float64; at most half as much again in any case, which a test counts.
CHECKED = 2


class Peak(TorchDispatchMode):
    """`bytes` is the peak of the bytes of all tensors made within the context."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self._now = 0
        self._counted: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **kwargs or {})
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._counted:
            self._counted.add(storage._cdata)
            self._now += storage.nbytes()
            self.bytes = max(self.bytes, self._now)
            weakref.finalize(storage, self._remove, storage._cdata, storage.nbytes())

    def _remove(self, storage: int, size: int) -> None:
        self._counted.discard(storage)
        self._now -= size


@cache
def needed(about: OpParameters) -> int:
    """Bytes that a check of an op takes."""
    op = about.op
    with Peak() as peak:
        inputs_fp64 = as_float64(about.case.inputs(about.dtype, "meta"))
        results = outputs(op, reference(op), inputs_fp64)
        if op.differentiable:
            gradients(
                op, reference(op), inputs_fp64, {name: torch.empty_like(result) for name, result in results.items()}
            )
    return CHECKED * peak.bytes


@contextmanager
def reserved(folder: Path, parts: int, count: int) -> Iterator[None]:
    """Hold so many of the parts of the memory; all, if they are fewer."""
    count = min(parts, count)
    with ExitStack() as held:
        with _locked(folder / "queue", fcntl.LOCK_EX):  # one waits at a time: no two hold half of what each needs
            while count:
                for number in range(parts):
                    with suppress(BlockingIOError):  # another process has it, or this one
                        held.enter_context(_locked(folder / f"part {number}", fcntl.LOCK_EX | fcntl.LOCK_NB))
                        count -= 1
                    if not count:
                        break
                else:
                    time.sleep(0.02)
        yield


@contextmanager
def _locked(path: Path, how: int) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, how)
        yield


def parts_of(total: int, processes: int) -> int:
    """The number of parts of so much memory, beside the bytes that each process has anyway; one at least."""
    return max(1, (total - processes * BESIDE) // PART)


def give_back() -> None:
    """Free the memory of the last test: pytest keeps the frames of one that failed, and torch all memory."""
    for name in ("last_type", "last_value", "last_traceback", "last_exc"):
        sys.__dict__.pop(name, None)
    gc.collect()
    torch.cuda.empty_cache()


FOLDER = pytest.StashKey[tempfile.TemporaryDirectory]()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node) -> None:
    """All processes of pytest-xdist lock the same files."""
    node.workerinput["parts"] = node.config.stash.setdefault(FOLDER, tempfile.TemporaryDirectory()).name


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    about = op_parameters(item) if item.get_closest_marker("gpu") and torch.cuda.is_available() else None
    count = needed(about) // PART if about is not None else 0
    with ExitStack() as held:
        worker = getattr(item.config, "workerinput", None)
        if count and worker:
            parts = parts_of(torch.cuda.mem_get_info()[1], worker["workercount"])
            held.enter_context(reserved(Path(worker["parts"]), parts, count))
        result = yield
        if count or (torch.cuda.is_initialized() and torch.cuda.memory_reserved() > KEPT):
            give_back()
    return result
