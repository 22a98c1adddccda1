"""Forward-mode differentiation through ops: calls with tangents go to an op's forward mode (`Op.forward_mode_of`).

Tangents come in two ways. A `Dual` is a tensor and its tangent in Python's hands, for models that carry both through
their layers, compiled, checkpointed or partitioned as always. A dual tensor is PyTorch's own, inside `torch.func.jvp`
or `torch.autograd.forward_ad.dual_level`, for any function.

Either way a tangent is a constant to autograd: gradients flow through values alone. The reference with PyTorch's dual
tensors is the exception: it is plain PyTorch, which differentiates it in any mode, as often as asked.
"""

from collections.abc import Callable
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

SUFFIX = "_tangent"


class Dual(NamedTuple):
    """A tensor and its tangent, of one shape, dtype and device."""

    value: torch.Tensor
    tangent: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        return self.value.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.value.dtype


def taking_tangents(
    check: Callable[..., None],
    function: Callable[..., Any],
    jvp_check: Callable[..., None],
    jvp: Callable[..., Any],
    differentiable: bool,
) -> Callable[..., Any]:
    """An op's `function`, and where a call has tangents, `jvp`.

    Args:
        check, jvp_check: of the op and of its forward mode, whose parameters are their signatures.
        function, jvp: what computes them.
        differentiable: whether PyTorch itself can differentiate `function` forward: then it gets dual tensors.

    Returns:
        A function that returns `Dual`s if it is given any, and dual tensors likewise. An argument without a tangent
        counts as constant. Raises ValueError where an argument has a tangent that `jvp` does not take.
    """
    parameters = signature(check).parameters.values()
    names = [p.name for p in parameters]
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    taken = [name.removesuffix(SUFFIX) for name in signature(jvp_check).parameters if name.endswith(SUFFIX)]

    def call(*args, **kwargs):
        explicit = any(isinstance(value, Dual) for value in (*args, *kwargs.values()))
        if not explicit and (differentiable or forward_ad._current_level < 0):
            return function(*args, **kwargs)  # no forward-mode differentiation is going on, or none of ours
        given = defaults | dict(zip(names, args, strict=False)) | kwargs  # `jvp` refuses what does not fit
        inputs, tangents = {}, {}
        for name, value in given.items():
            inputs[name], tangents[name] = split(value)
            if tangents[name] is not None and name not in taken:
                raise ValueError(f"{call.__name__}: {name} has a tangent; allowed: tangents of {', '.join(taken)}")
        if all(tangent is None for tangent in tangents.values()):
            return function(*args, **kwargs)
        for name in taken:
            value, tangent = inputs[name], tangents[name]
            inputs[name + SUFFIX] = torch.zeros_like(value) if tangent is None and value is not None else tangent
        results = jvp(**inputs)
        pair = Dual if explicit else forward_ad.make_dual
        duals = tuple(map(pair, results[::2], results[1::2]))
        return duals if len(duals) > 1 else duals[0]

    return call


def split(value: Any) -> tuple[Any, Any]:
    """An argument without its tangent, and that: None if it has none; of lists, any tangent in them."""
    if isinstance(value, Dual):
        return value
    if isinstance(value, torch.Tensor):
        return forward_ad.unpack_dual(value)
    tangents = (split(leaf)[1] for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))
    return value, next((tangent for tangent in tangents if tangent is not None), None)
