"""Forward-mode differentiation through ops: calls with dual tensors (`torch.func.jvp`) go to an op's forward mode.

The reference needs none of this: it is plain PyTorch, which differentiates it in any mode.
"""

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

SUFFIX = "_tangent"


def taking_duals(
    check: Callable[..., None], function: Callable[..., Any], jvp_check: Callable[..., None], jvp: Callable[..., Any]
) -> Callable[..., Any]:
    """An op's `function`, and where a call has dual tensors, `jvp` of their values and tangents.

    Args:
        check, jvp_check: of the op and of its forward mode, whose parameters are their signatures.
        function, jvp: what computes them.

    Returns:
        A function that returns dual tensors if it is given any. A tangent is a constant to autograd, and an argument
        without one counts as constant. Raises ValueError where an argument has a tangent that `jvp` does not take.
    """
    parameters = signature(check)
    taken = [name.removesuffix(SUFFIX) for name in signature(jvp_check).parameters if name.endswith(SUFFIX)]

    def call(*args, **kwargs):
        if forward_ad._current_level < 0:  # no forward-mode differentiation is going on
            return function(*args, **kwargs)
        bound = parameters.bind(*args, **kwargs)
        bound.apply_defaults()
        inputs, tangents = {}, {}
        for name, value in bound.arguments.items():
            inputs[name] = value
            if name in taken and value is not None:
                inputs[name], tangents[name] = forward_ad.unpack_dual(value)
            elif any(has_tangent(leaf) for leaf in tree_leaves(value)):
                raise ValueError(f"{call.__name__}: {name} has a tangent; allowed: tangents of {', '.join(taken)}")
        if all(tangent is None for tangent in tangents.values()):
            return function(*args, **kwargs)
        for name in taken:
            value, tangent = inputs[name], tangents.get(name)
            inputs[name + SUFFIX] = torch.zeros_like(value) if tangent is None and value is not None else tangent
        results = jvp(**inputs)
        duals = tuple(map(forward_ad.make_dual, results[::2], results[1::2]))
        return duals if len(duals) > 1 else duals[0]

    return call


def has_tangent(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and forward_ad.unpack_dual(value).tangent is not None
