"""Argument checks shared by the ops. Each raises ValueError with the op, the argument, its value and what is allowed.

They read metadata only: no device is asked, and `torch.compile` traces through them.
"""

import torch

from kernels.registry import FLOATS


def refuse(op: str, argument: str, value, allowed: str) -> None:
    raise ValueError(f"{op}: {argument} is {value}; allowed: {allowed}")


def check_shape(op: str, argument: str, tensor: torch.Tensor, shape: tuple[int, ...], names: str) -> None:
    """Require exactly `shape`, whose dimensions the op's docstring calls `names`."""
    if tensor.shape != shape:
        refuse(op, f"shape of {argument}", tuple(tensor.shape), f"{tuple(shape)} ({names})")


def check_rank(op: str, argument: str, tensor: torch.Tensor, names: str) -> None:
    """Require as many dimensions as `names` has, none of them empty."""
    if tensor.ndim != names.count(",") + 1 or tensor.numel() == 0:
        refuse(op, f"shape of {argument}", tuple(tensor.shape), f"[{names}], no dimension 0")


def check_dtype(op: str, argument: str, tensor: torch.Tensor, allowed=FLOATS) -> None:
    if tensor.dtype not in allowed:
        refuse(op, f"dtype of {argument}", tensor.dtype, dtype_names(allowed))


def dtype_names(dtypes) -> str:
    return ", ".join(sorted(str(dtype) for dtype in dtypes))


def check_device(op: str, first: torch.Tensor, **others: torch.Tensor | None) -> None:
    """Require every tensor of `others` that is given on the device of `first`."""
    for argument, tensor in others.items():
        if tensor is not None and tensor.device != first.device:
            refuse(op, f"device of {argument}", tensor.device, f"{first.device}, as the first argument")


def check_eps(op: str, eps: float) -> None:
    if not eps > 0:
        refuse(op, "eps", eps, "a positive number")


def accumulation_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """float64 if any of the tensors is, else float32: the dtype of statistics, reductions and products."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def check_tangent(op: str, argument: str, tensor: torch.Tensor | None, tangent: torch.Tensor | None) -> None:
    """Require a tangent like its argument: of the same shape, dtype and device, and None for None."""
    name = f"{argument}_tangent"
    if (tensor is None) != (tangent is None):
        given = "None" if tangent is None else "a tensor"
        refuse(op, name, given, f"a tensor if and only if {argument} is one")
    if tensor is not None and tangent is not None:
        if tangent.shape != tensor.shape:
            refuse(op, f"shape of {name}", tuple(tangent.shape), f"{tuple(tensor.shape)}, that of {argument}")
        check_dtype(op, name, tangent, {tensor.dtype})
        check_device(op, tensor, **{name: tangent})
