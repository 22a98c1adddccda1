"""Launches of the kernels of `csrc`, and the backends `cuda` and `emulated` that one file of an op declares.

The launchers of `csrc/ops.h` exist twice: compiled for a device (`kernels._cuda`, made by setup.py) and for the CPU
(`kernels.testing.emulation`). The operators are the same; the device of a call's tensors decides which of them runs.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import MappingProxyType, ModuleType
from typing import Any

import torch

from kernels.arguments import dtype_names
from kernels.backends.device import extension, extension_reasons
from kernels.backends.operators import is_fake_call
from kernels.registry import Backend
from kernels.testing import emulation

DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})


def launch(name: str, *args: Any) -> None:
    """Call the launcher `name` with tensors, numbers and None, unless only the shapes of the results are asked for.

    The first argument is a tensor; its device decides where the launcher is looked up.
    """
    if not is_fake_call():
        getattr(launchers(args[0].device), name)(*args)


def launchers(device: torch.device) -> ModuleType:
    return extension() if device.type == "cuda" else emulation.module()


def unsupported_reasons(*tensors: torch.Tensor | None, dtypes: Iterable[torch.dtype] = DTYPES) -> list[str]:
    """Why the kernels cannot take these tensors, by dtype; empty if they can."""
    wrong = [tensor.dtype for tensor in tensors if tensor is not None and tensor.dtype not in dtypes]
    return [f"dtype {dtype} is none of {dtype_names(dtypes)}" for dtype in wrong]


def backends(
    run: Callable[..., Any],
    unsupported: Callable[..., list[str]],
    torch_ops: Iterable[str],
    configs: Mapping[str, Any] = MappingProxyType({}),
    dtypes: frozenset[torch.dtype] = DTYPES,
) -> tuple[Backend, Backend]:
    """The backends `cuda`, for CUDA tensors, and `emulated`, for CPU tensors in tests.

    Args:
        run: the op.
        unsupported: reasons against a call but for its device.
        torch_ops, configs, dtypes: as `Backend` has them.
    """

    def on(device: str) -> Callable[..., list[str]]:
        def reasons(*args, **kwargs):
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            elsewhere = {tensor.device.type for tensor in tensors} - {device, "meta"}
            wrong = [f"the tensors are on {where!r}, this backend serves {device!r}" for where in sorted(elsewhere)]
            return wrong + unsupported(*args, **kwargs)

        return reasons

    backend = partial(Backend, run=run, dtypes=dtypes, torch_ops=tuple(torch_ops), configs=configs)
    return (
        backend("cuda", unavailable=extension_reasons, unsupported=on("cuda")),
        backend("emulated", unavailable=emulation.reasons, unsupported=on("cpu"), emulated=True),
    )
