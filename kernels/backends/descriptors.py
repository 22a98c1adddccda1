"""Tensors as Triton's descriptors take them, for kernels that use the tensor memory accelerator (sm_90)."""

from collections.abc import Callable
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.backends import triton_launch
from kernels.backends.operators import dry
from kernels.registry import Backend

#: Float32 products would run without tensor cores.
DTYPES = triton_launch.DTYPES - {torch.float32}
#: Bytes that every row has to begin at a multiple of.
ALIGNMENT = 16


def table(tensor: torch.Tensor) -> torch.Tensor:
    """`[…, width]` as `[rows, width]`, one row after the other from an aligned address on; a copy where need be."""
    rows = tensor.flatten(0, -2).contiguous()
    return rows if dry() or rows.data_ptr() % ALIGNMENT == 0 else rows.clone()


def described(rows: torch.Tensor, height: int, width: int) -> TensorDescriptor:
    """`[rows, columns]`, to be accessed in blocks of `height` × `width`; what lies outside reads as 0."""
    return TensorDescriptor.from_tensor(rows, [height, width])


def misaligned(itemsize: int, *widths: int) -> list[str]:
    """Why rows of so many numbers, one after the other, do not begin at aligned addresses; empty if they do."""
    odd = [width for width in widths if width * itemsize % ALIGNMENT]
    return [f"rows of {width} numbers do not begin at multiples of {ALIGNMENT} bytes" for width in odd[:1]]


def backend(run: Callable[..., Any], unsupported: Callable[..., list[str]], torch_op: str, config: Any) -> Backend:
    """The backend `triton` of an op that has one operator and one launch configuration; see `triton_launch.backend`."""
    return triton_launch.backend(run, unsupported, (torch_op,), {"config": config}, DTYPES, minimum=(9, 0))
