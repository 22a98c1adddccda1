"""Checks of an op's results against its reference, and iterations of calls over sets of buffers past the L2."""

from collections.abc import Callable
from typing import Any

import torch

from bench.baselines.interface import Adapter, Provider
from bench.measure.timing import Device, Iteration
from kernels.registry import Op
from kernels.testing.tolerance import (
    Inputs,
    Tensors,
    as_float64,
    copied,
    flattened,
    gradients,
    has_half_precision,
    leaves,
    mismatches,
    named,
    outputs,
    reference,
    tensors_of,
    upstream_gradients,
)

DIRECTIONS = ("forward", "backward", "both")


class Reference:
    """The results of one set of arguments that a provider is checked against, as `kernels.testing.tolerance` says,
    and the upstream gradients they belong to."""

    def __init__(self, op: Op, inputs: Inputs):
        self.op, self.inputs = op, inputs
        self._eager = outputs(op, reference(op), inputs)
        inputs_fp64 = as_float64(inputs)
        self._fp64 = outputs(op, reference(op), inputs_fp64)
        self.upstream: Tensors = {}
        if op.differentiable:
            self.upstream = upstream_gradients(op, self._eager)
            self._eager_gradients = gradients(op, reference(op), inputs, self.upstream)
            self._fp64_gradients = gradients(op, reference(op), inputs_fp64, as_float64(self.upstream))

    def mismatches(self, adapter: Adapter, direction: str) -> list[str]:
        """Mismatches of a provider's results in that direction; empty if it may be timed."""
        call = Call(self.op, adapter, copied(self.inputs))
        with torch.set_grad_enabled(bool(self.op.differentiable)):
            results = call.results()
        wrong = []
        if direction != "backward":
            mutated = {name: call.inputs[name] for name in self.op.mutates if call.inputs[name] is not None}
            wrong += mismatches(
                {name: result.detach() for name, result in results.items()} | mutated,
                self._eager,
                self._fp64,
                has_half_precision(self.inputs),
            )
        if direction != "forward":
            found = dict(zip(flattened(call.leaves), call.gradients(results, self.upstream), strict=True))
            merged = {f"gradient of {name}": gradient for name, gradient in adapter.merge(found).items()}
            wrong += mismatches(merged, self._eager_gradients, self._fp64_gradients, has_half_precision(self.inputs))
        return wrong


class Call:
    """One call of a provider with arguments of its own arrangement."""

    def __init__(self, op: Op, adapter: Adapter, inputs: Inputs):
        self.inputs = inputs
        self._run = adapter.run
        self._arranged = adapter.arrange(**inputs)
        names = op.differentiable if adapter.differentiable is None else adapter.differentiable
        self.leaves = leaves(self._arranged, [name for name in names if self._arranged[name] is not None])

    def results(self) -> Tensors:
        return named(self._run(**self._arranged | self.leaves))

    def gradients(self, results: Tensors, upstream: Tensors) -> tuple[torch.Tensor, ...]:
        """Of its leaves, in their order; the forward pass stays as it is, to be asked again."""
        asked = list(flattened(self.leaves).values())
        return torch.autograd.grad(
            [results[name] for name in upstream], asked, list(upstream.values()), retain_graph=True
        )

    def restorer(self) -> Callable[[], None]:
        """A function that puts back the present values of all its arguments."""
        tensors = {t.data_ptr(): t for t in tensors_of([self.inputs, self._arranged])}
        kept = [(t, t.clone()) for t in tensors.values()]

        def restore() -> None:
            for tensor, values in kept:
                tensor.data.copy_(values)  # not seen by autograd, which may have saved the tensor

        return restore


class Sets:
    """Several sets of the same arguments and upstream gradients, in memory of their own; providers share them.

    An iteration makes `calls` calls, each with the next set.
    """

    def __init__(self, expected: Reference, count: int, calls: int):
        self.op, self.count = expected.op, count
        self._calls = calls
        self._inputs = [expected.inputs, *(copied(expected.inputs) for _ in range(count - 1))]
        self._upstreams = [expected.upstream, *(copied(expected.upstream) for _ in range(count - 1))]

    def iteration(self, provider: Provider, adapter: Adapter, direction: str, device: Device) -> Iteration:
        """An iteration of a provider, ready to be repeated; results stay until its end, so that they rotate too.

        Backward, the forward passes have been made before; forward, they save what a backward pass needs, as in
        training.
        """
        own = provider.overwrites or bool(self.op.mutates)
        calls = [Call(self.op, adapter, copied(inputs) if own else inputs) for inputs in self._inputs]
        restorers = [call.restorer() for call in calls] if own else []

        def restore() -> None:
            for each in restorers:
                each()

        run, method = device.replayable(self._run(calls, direction))
        return Iteration(run, self._calls, restore, method)

    def _run(self, calls: list[Call], direction: str) -> Callable[[], Any]:
        turns = [number % len(calls) for number in range(self._calls)]

        def forward() -> list[Tensors]:
            # Detached, so that what autograd has saved is freed, as the next call needs the memory.
            return [{name: result.detach() for name, result in calls[i].results().items()} for i in turns]

        if not self.op.differentiable:
            return torch.no_grad()(forward)
        if direction == "forward":
            return forward
        passes = [call.results() for call in calls]
        upstreams = list(map(_matching, passes, self._upstreams))
        if direction == "backward":
            return lambda: [calls[i].gradients(passes[i], upstreams[i]) for i in turns]
        return lambda: [calls[i].gradients(calls[i].results(), upstreams[i]) for i in turns]


def _matching(results: Tensors, upstream: Tensors) -> Tensors:
    """The upstream gradients in the memory layout of these results, as the layer above would give them."""
    return {
        name: gradient
        if results[name].stride() == gradient.stride()
        else torch.empty_like(results[name], requires_grad=False).copy_(gradient)
        for name, gradient in upstream.items()
    }
