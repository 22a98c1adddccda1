"""Operators of `torch.library` around kernels, whichever compiler made those."""

import threading
from collections.abc import Callable, Iterable
from functools import wraps

import torch

NAMESPACE = "ldit"


class _State(threading.local):
    """Of this thread: whether launches are left out, because only the shapes of results are asked for."""

    dry = False


_state = _State()


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
            before, _state.dry = _state.dry, True
            try:
                return function(*args, **kwargs)
            finally:
                _state.dry = before

        definition = torch.library.custom_op(f"{NAMESPACE}::{name}", on_its_device, mutates_args=tuple(mutates))
        definition.register_fake(without_launches)
        return definition

    return register
