"""Registration of operators with `torch.library`, for every backend that has operators."""

import threading
from collections.abc import Callable, Iterable
from functools import wraps

import torch
from torch._guards import TracingContext
from torch._library.utils import get_layout_constraint_tag

NAMESPACE = "ldit"


class _State(threading.local):
    """Of this thread: whether launches are left out, because only shapes, dtypes and strides of results are wanted."""

    fake = False


_state = _State()
#: Every operator registered here.
_definitions: list[torch.library.CustomOpDef] = []
_lowered = False


def is_fake_call() -> bool:
    """Whether this thread is in the fake implementation of an operator, so that launches are to be left out."""
    return _state.fake


def operator(name: str, mutates: Iterable[str] = ()) -> Callable[[Callable], torch.library.CustomOpDef]:
    """Decorator: register a function that allocates its results and launches kernels as the operator `ldit::<name>`.

    Its parameters carry the type annotations that `torch.library.custom_op` asks for. The same function with its
    launches left out (`is_fake_call`) is the fake implementation, from which `torch.compile` learns shapes, dtypes and
    strides; so it reads no values. Its first argument, a tensor or a list of them, decides the device.
    """

    def register(function: Callable) -> torch.library.CustomOpDef:
        @wraps(function)
        def real_impl(first, *args, **kwargs):
            with torch.cuda.device_of(first[0] if isinstance(first, list) else first):
                return function(first, *args, **kwargs)

        @wraps(function)
        def fake_impl(*args, **kwargs):
            if not _lowered and TracingContext.try_get() is not None:
                register_lowerings()
            before, _state.fake = _state.fake, True
            try:
                return function(*args, **kwargs)
            finally:
                _state.fake = before

        definition = torch.library.custom_op(f"{NAMESPACE}::{name}", real_impl, mutates_args=tuple(mutates))
        definition.register_fake(fake_impl)
        _definitions.append(definition)
        if _lowered:
            _register_lowering(definition)
        return definition

    return register


def register_lowerings() -> None:
    """Register Inductor's fallback lowering for every operator of this module, later ones too.

    Otherwise Inductor would make such an entry where it first meets an operator in a graph, and before that write a
    message with all the nodes that the operator's arguments come from, nested in each other: in the backward pass of a
    deep network this takes a time that doubles with each block.
    """
    global _lowered
    if not _lowered:
        _lowered = True
        for definition in _definitions:
            _register_lowering(definition)


def _register_lowering(definition: torch.library.CustomOpDef) -> None:
    from torch._inductor.lowering import lowerings, make_fallback, tag_to_layout_constraint  # a second to import

    overload = definition._opoverload
    if overload not in lowerings:
        constraint = tag_to_layout_constraint(get_layout_constraint_tag(overload, with_default=True))
        make_fallback(overload, layout_constraint=constraint, warn=False)
