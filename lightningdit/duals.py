"""Functions and layers that take a tensor, or a tensor with its tangent (`kernels.forward_mode.Dual`).

They compute what PyTorch's forward mode would, but for one thing: a tangent is a constant to autograd, as it is to the
ops. So nothing is kept of tangents for a backward pass, which goes through values alone.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.forward_mode import Dual

Value: TypeAlias = Tensor | Dual


def linear_map(function: Callable[[Tensor], Tensor], x: Value) -> Value:
    """`function` of x, where it is linear without a constant (a reshape, a cast, a slice) and has no weights."""
    return Dual(function(x.value), function(x.tangent)) if isinstance(x, Dual) else function(x)


def differentiated(function: Callable[..., Any], *args: Value | None) -> Any:
    """`function(*args)` in plain PyTorch, of tensors and what it closes over, with tangents where arguments have them.

    Args that are None or plain tensors are constants. A tuple of results is a tuple of `Dual`s.
    """
    places = [i for i, arg in enumerate(args) if isinstance(arg, Dual)]
    if not places:
        return function(*args)

    def of_duals(*values: Tensor) -> Any:
        given = dict(zip(places, values, strict=True))
        return function(*(given.get(i, arg) for i, arg in enumerate(args)))

    duals = [arg for arg in args if isinstance(arg, Dual)]
    values, tangents = tuple(dual.value for dual in duals), tuple(dual.tangent for dual in duals)
    result, tangent, *_ = torch.func.jvp(of_duals, values, tangents)
    if isinstance(result, tuple):
        return tuple(Dual(value, t.detach()) for value, t in zip(result, tangent, strict=True))
    return Dual(result, tangent.detach())


def linear(x: Value, weight: Tensor, bias: Tensor | None = None) -> Value:
    """x [..., in] · weightᵀ [out, in] + bias [out] → [..., out]."""
    if isinstance(x, Dual):
        return Dual(F.linear(x.value, weight, bias), F.linear(x.tangent, weight.detach()))
    return F.linear(x, weight, bias)


def add(x: Value, y: Value) -> Value:
    """x + y, of one shape or broadcast."""
    if not isinstance(x, Dual) and not isinstance(y, Dual):
        return x + y
    value = value_of(x) + value_of(y)
    tangents = [z.tangent for z in (x, y) if isinstance(z, Dual)]
    tangent = tangents[0] + tangents[1] if len(tangents) == 2 else tangents[0].expand_as(value)
    return Dual(value, tangent)


def subtract(x: Tensor, y: Value) -> Value:
    """x - y of a constant x."""
    return Dual(x - y.value, -y.tangent) if isinstance(y, Dual) else x - y


def chunk(x: Value, parts: int, dim: int) -> tuple[Value, ...]:
    """As `Tensor.chunk`."""
    if isinstance(x, Dual):
        return tuple(map(Dual, x.value.chunk(parts, dim=dim), x.tangent.chunk(parts, dim=dim)))
    return x.chunk(parts, dim=dim)


def stack(parts: Sequence[Value], dim: int) -> Value:
    """As `torch.stack`, of parts that all have tangents or none."""
    if isinstance(parts[0], Dual):
        return Dual(*(torch.stack(which, dim) for which in zip(*parts, strict=True)))
    return torch.stack([value_of(part) for part in parts], dim)


def value_of(x: Value) -> Tensor:
    """x without its tangent."""
    return x.value if isinstance(x, Dual) else x


class Linear(nn.Linear):
    """nn.Linear of a tensor, with or without a tangent."""

    def forward(self, x: Value) -> Value:  # type: ignore[override]
        return linear(x, self.weight, self.bias)


class CastLinear(nn.Linear):
    """A linear layer that casts its weights to its input's dtype: an input in float32 is multiplied in float32."""

    def forward(self, x: Value) -> Value:  # type: ignore[override]
        return linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class DeferredBiasLinear(nn.Linear):
    """A linear layer whose bias the next op adds: pass it `deferred_bias`. With `defer_bias` off, a plain nn.Linear."""

    defer_bias = True

    @property
    def deferred_bias(self) -> Tensor | None:
        return self.bias if self.defer_bias else None

    def forward(self, x: Value) -> Value:  # type: ignore[override]
        return linear(x, self.weight, None if self.defer_bias else self.bias)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm of a tensor, with or without a tangent; only what has no weights is differentiated by PyTorch."""

    def forward(self, x: Value) -> Value:  # type: ignore[override]
        if not isinstance(x, Dual):
            return super().forward(x)
        value, tangent = differentiated(lambda v: F.layer_norm(v, self.normalized_shape, eps=self.eps), x)
        return Dual(value * self.weight + self.bias, tangent * self.weight.detach())
