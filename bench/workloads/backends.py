"""Choice of backends for the ops of a variant: one for all ops that have it, and others by the name of the op."""

from collections.abc import Iterable, Mapping

import kernels
from common.text import nearest
from kernels.registry import FILES, Ops

#: What can be asked for by name; "emulated" computes on a CPU whatever the device is.
CHOICES = ("auto", *(name for name in FILES if name != "emulated"))


def per_op(backend: str, named: Mapping[str, str]) -> dict[str, str]:
    """Op → backend, without the ops that are left to "auto".

    `backend` is for the ops that models call and that have it: "cuda" leaves those without a CUDA kernel to "auto", and
    ops in graphs are asked for by name only. `named` comes before it.

    Raises:
        ValueError: no backend, or no op, is called so.
    """
    _check_backend(backend)
    for name, value in named.items():
        _check_op(name, value)
    having = {name for name, op in kernels.OPS.items() if backend in op.backends and not op.graph_pass}
    return dict.fromkeys(sorted(having), backend) | dict(named)


def select(backend: str, named: Mapping[str, str]) -> Ops:
    return kernels.select("auto", **per_op(backend, named))


def parse(texts: Iterable[str]) -> tuple[str | None, dict[str, str]]:
    """Parse `--kernels BACKEND` and `--kernels OP=BACKEND`, repeated: the backend of all ops, if any, and of some.

    Raises:
        ValueError: an unknown name, a backend that the op lacks, or two backends for the same ops.
    """
    found: dict[str, str] = {}
    for text in texts:
        op, equals, backend = text.rpartition("=")
        _check_op(op, backend) if equals else _check_backend(backend)
        if found.setdefault(op, backend) != backend:
            raise ValueError(f"both {found[op]} and {backend} for {op or 'all ops'}")
    return found.pop("", None), dict(sorted(found.items()))


def _check_backend(name: str) -> None:
    if name not in CHOICES:
        raise ValueError(f"no backend is called {name!r}{nearest(name, CHOICES)}; known: {', '.join(CHOICES)}")


def _check_op(name: str, backend: str) -> None:
    if name not in kernels.OPS:
        raise ValueError(f"no op is called {name!r}{nearest(name, kernels.OPS)}; known: {', '.join(kernels.OPS)}")
    _check_backend(backend)
    having = ("auto", *kernels.OPS[name].backends)
    if backend not in having:
        raise ValueError(f"{name} has no {backend} backend, only {', '.join(n for n in having if n in CHOICES)}")
