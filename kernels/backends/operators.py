"""Operators of `torch.library` around kernels, whichever compiler made those."""

import threading
from collections.abc import Callable, Iterable
from functools import wraps

import torch
from torch._guards import TracingContext

NAMESPACE = "ldit"


class _State(threading.local):
    """Of this thread: whether launches are left out, because only the shapes of results are asked for."""

    dry = False


_state = _State()
#: Every operator registered here.
_definitions: list[torch.library.CustomOpDef] = []
_lowered = False


def dry() -> bool:
    """Whether launches are to be left out, now and in this thread."""
    return _state.dry


def operator(name: str, mutates: Iterable[str] = ()) -> Callable[[Callable], torch.library.CustomOpDef]:
    """Decorator: register a function that allocates its results and launches kernels as the operator `ldit::<name>`.

    Its parameters carry the type annotations that `torch.library.custom_op` asks for. The same function, its launches
    left out (`dry`), tells shapes, dtypes and strides to `torch.compile`; so it reads no values and only its first
    argument, a tensor or a list of them, decides the device.
    """

    def register(function: Callable) -> torch.library.CustomOpDef:
        @wraps(function)
        def on_its_device(first, *args, **kwargs):
            with torch.cuda.device_of(first[0] if isinstance(first, list) else first):
                return function(first, *args, **kwargs)

        @wraps(function)
        def without_launches(*args, **kwargs):
            if not _lowered and TracingContext.try_get() is not None:
                register_lowerings()
            before, _state.dry = _state.dry, True
            try:
                return function(*args, **kwargs)
            finally:
                _state.dry = before

        definition = torch.library.custom_op(f"{NAMESPACE}::{name}", on_its_device, mutates_args=tuple(mutates))
        definition.register_fake(without_launches)
        _definitions.append(definition)
        if _lowered:
            _register_lowering(definition)
        return definition

    return register


def register_lowerings() -> None:
    """Tell Inductor how it calls every operator of this module, those registered later too.

    Without, it would make such an entry where it first meets an operator in a graph, and before that write a message
    with all the nodes that the operator's arguments come from, nested in each other: in the backward pass of a deep
    network this takes a time that doubles with each block.
    """
    global _lowered
    if not _lowered:
        _lowered = True
        for definition in _definitions:
            _register_lowering(definition)


def _register_lowering(definition: torch.library.CustomOpDef) -> None:
    from torch._inductor.lowering import lowerings, make_fallback, tag_to_layout_constraint  # a second to import
    from torch._library.utils import get_layout_constraint_tag

    overload = definition._opoverload
    if overload not in lowerings:
        constraint = tag_to_layout_constraint(get_layout_constraint_tag(overload, with_default=True))
        make_fallback(overload, layout_constraint=constraint, warn=False)
