"""Providers of an op: our backends, its reference, torch.compile of that, and the baselines."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from bench.baselines import BASELINES, Adapter, Provider
from kernels.registry import BackendUnavailable, Op
from kernels.testing.tolerance import reference

Compiler = Callable[[Callable[..., Any]], Callable[..., Any]]


def inductor(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile` for exactly these shapes, as one graph or not at all."""
    # Backward passes are timed again and again over one forward pass; with donated buffers they could run only once.
    torch._functorch.config.donated_buffer = False
    return torch.compile(function, fullgraph=True, dynamic=False)


def providers_for(op: Op, compiler: Compiler = inductor, emulated: bool = False) -> Iterator[Provider]:
    """All providers of an op: our backends, "eager" and "compile" (the reference), the baselines.

    emulated: let backends take part that run in an emulator, to test the bench.
    """
    for name in ours(op):
        yield Provider(
            name,
            partial(_backend, op, name, emulated),
            partial(_unsupported, op, name),
            package="triton" if name == "triton" else "torch",
        )
    eager = Provider("eager", lambda: Adapter(reference(op)), includes="the reference, op by op")
    yield eager
    yield _compiled(eager, compiler, "compile")
    for baseline in BASELINES.get(op.name, ()):
        yield baseline
        if baseline.also_compiled:
            yield _compiled(baseline, compiler, f"{baseline.name}-compile")


def ours(op: Op) -> list[str]:
    """Our backends for devices, as "auto" prefers them; those too that it never takes, such as ops in graphs have."""
    having = [name for name in op.backends if name not in ("reference", "emulated")]
    return sorted(having, key=lambda name: op.order.index(name) if name in op.order else len(op.order))


def _compiled(provider: Provider, compiler: Compiler, name: str) -> Provider:
    """The same under torch.compile, which fuses what is around its library call."""

    def load() -> Adapter:
        adapter = provider.load()
        return replace(adapter, run=compiler(adapter.run))

    return replace(provider, name=name, load=load, includes=f"torch.compile of: {provider.includes}")


def _backend(op: Op, name: str, emulated: bool) -> Adapter:
    reasons = op.reasons(name)
    if not reasons and op.backend(name).emulated and not emulated:
        reasons = ["it would run in an emulator"]
    if reasons:
        raise BackendUnavailable(op.name, name, reasons)
    return Adapter(op.bind(op.backend(name)))


def _unsupported(op: Op, name: str, **inputs: Any) -> list[str]:
    unsupported = op.backend(name).unsupported
    return unsupported(**inputs) if unsupported is not None else []
