"""Memory layouts that kernels ask for: contiguous, channels-last, dense rows."""

from typing import overload

import torch


def memory_format(x: torch.Tensor) -> torch.memory_format:
    """Channels-last where `x` is laid out so and not also contiguous, else contiguous."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


@overload
def contiguous(tensor: torch.Tensor) -> torch.Tensor: ...
@overload
def contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None: ...
def contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor without gaps, if one is given; a copy where it has some."""
    return None if tensor is None else tensor.contiguous()


@overload
def dense_rows(tensor: torch.Tensor) -> torch.Tensor: ...
@overload
def dense_rows(tensor: torch.Tensor | None) -> torch.Tensor | None: ...
def dense_rows(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """A matrix whose rows are contiguous. They may lie apart and are not copied then, as parts of one modulation."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()
