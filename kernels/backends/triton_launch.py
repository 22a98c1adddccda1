"""Launches of Triton kernels, the device they are configured for, and which calls Triton can serve here."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from kernels.arguments import dtype_names
from kernels.backends.device import triton_interpreted, triton_reasons
from kernels.backends.operators import is_fake_call, operator  # noqa: F401  the Triton backends import it from here
from kernels.registry import Backend

INTERPRETED = triton_interpreted()
#: The interpreter multiplies bfloat16 as bit patterns and truncates where a device rounds.
DTYPES = frozenset({torch.float32, torch.float16} | (set() if INTERPRETED else {torch.bfloat16}))
#: Compute capability whose launch configurations the interpreter runs.
INTERPRETED_ARCHITECTURE = 90


def _allow_range_over_scalars() -> None:
    """Let `range` in interpreted kernels take scalars.

    The interpreter of Triton 3.6 holds them as arrays of one element, and its `__index__` calls `int` of those, which
    NumPy 2.4 refuses. There is no public hook. Without this
    tests/test_kernels_launch_adaln.py::test_second_stage_adds_up_more_samples_and_chunks_than_it_holds fails.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_lang_tensor


if INTERPRETED:
    _allow_range_over_scalars()


@dataclass(frozen=True)
class Launch:
    """A launch, recorded instead of run: the kernel, its grid, arguments, compile-time values and options."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple
    options: dict[str, Any]


class _State(threading.local):
    """Of this thread: the list that records launches, and the architecture they are configured for."""

    launches: list[Launch] | None = None
    architecture: int | None = None


_state = _State()


def launch(kernel, grid: tuple[int, ...], *args, **options) -> None:
    """Run `kernel[grid](*args, **options)`, unless only the shapes of the results are asked for."""
    if not is_fake_call():
        kernel[grid](*args, **options)
    elif _state.launches is not None:
        _state.launches.append(Launch(kernel, grid, args, options))


@contextmanager
def recorded(architecture: int) -> Iterator[list[Launch]]:
    """Collect the launches of calls with tensors on the device "meta", as for this compute capability (90 for sm_90).

    Ops compute nothing then. Autograd runs the backward pass in the same thread, so its launches come too.
    """
    before = _state.launches, _state.architecture
    _state.launches, _state.architecture = [], architecture
    try:
        yield _state.launches
    finally:
        _state.launches, _state.architecture = before


def architecture() -> int:
    """Compute capability of the current device, 90 for sm_90: what launch configurations are chosen by."""
    if _state.architecture is not None:
        return _state.architecture
    return INTERPRETED_ARCHITECTURE if INTERPRETED else _capability(torch.cuda.current_device())


@cache
def _capability(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def num_sms() -> int:
    """Multiprocessors of the current device.

    Without a device, those of the largest one of the recorded compute capability: A100, H100, B200.
    """
    if _state.architecture is not None or INTERPRETED:
        return {80: 108, 100: 148}.get(architecture(), 132)
    return _num_sms(torch.cuda.current_device())


@cache
def _num_sms(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def unsupported_reasons(*tensors: torch.Tensor | None, dtypes: Iterable[torch.dtype] = DTYPES) -> list[str]:
    """Why Triton kernels cannot take these tensors here, by device and dtype; empty if they can."""
    given = [tensor for tensor in tensors if tensor is not None]
    wrong = [tensor.dtype for tensor in given if tensor.dtype not in dtypes]
    reasons = [f"dtype {dtype} is none of {dtype_names(dtypes)}" for dtype in wrong]
    if not INTERPRETED and given[0].device.type == "cpu":
        reasons.append("the tensors are on the CPU, where Triton kernels run in its interpreter only")
    return reasons


def backend(
    run: Callable[..., Any],
    unsupported: Callable[..., list[str]],
    torch_ops: Iterable[str],
    configs: Mapping[str, Any],
    dtypes: frozenset[torch.dtype] = DTYPES,
    min_capability: tuple[int, int] = (8, 0),
) -> Backend:
    """The backend `triton` of an op.

    Args:
        run: the op.
        unsupported: reasons against a call, `unsupported_reasons` among them.
        torch_ops, configs, dtypes, min_capability: as `Backend` has them.
    """
    return Backend(
        "triton",
        run,
        partial(triton_reasons, min_capability),
        unsupported,
        dtypes,
        emulated=INTERPRETED,
        torch_ops=tuple(torch_ops),
        configs=configs,
        min_capability=min_capability,
    )
