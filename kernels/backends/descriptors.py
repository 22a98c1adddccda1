"""Triton's tensor descriptors, for kernels that use the tensor memory accelerator (TMA, sm_90)."""

from collections.abc import Callable
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.backends import triton_launch
from kernels.backends.operators import is_fake_call
from kernels.registry import Backend

#: No float32, whose products would run without tensor cores.
DTYPES = triton_launch.DTYPES - {torch.float32}
#: Bytes that every row has to begin at a multiple of.
ALIGNMENT = 16


def aligned_rows(tensor: torch.Tensor) -> torch.Tensor:
    """`[…, width]` as `[rows, width]`, one row after the other from an aligned address on; a copy where it is not."""
    rows = tensor.flatten(0, -2).contiguous()
    return rows if is_fake_call() or rows.data_ptr() % ALIGNMENT == 0 else rows.clone()


def tensor_descriptor(rows: torch.Tensor, height: int, width: int) -> TensorDescriptor:
    """Descriptor of `[rows, columns]`, accessed in blocks `[height, width]`; elements outside read as 0."""
    return TensorDescriptor.from_tensor(rows, [height, width])


def alignment_reasons(itemsize: int, *widths: int) -> list[str]:
    """Why rows of `widths` elements, one after the other, do not begin at aligned addresses; empty if they do."""
    odd = [width for width in widths if width * itemsize % ALIGNMENT]
    return [f"rows of {width} numbers do not begin at multiples of {ALIGNMENT} bytes" for width in odd[:1]]


def backend(run: Callable[..., Any], unsupported: Callable[..., list[str]], torch_op: str, config: Any) -> Backend:
    """The backend `triton` of an op that has one operator and one launch configuration; see `triton_launch.backend`."""
    return triton_launch.backend(run, unsupported, (torch_op,), {"config": config}, DTYPES, min_capability=(9, 0))
