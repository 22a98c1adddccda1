"""Checks that every backend of every op has to pass. Each raises AssertionError and knows no op by name.

`kernels.testing.tolerance` holds the rule for results.
"""

from collections.abc import Iterable
from contextlib import contextmanager
from inspect import signature

import torch
import torch._inductor.config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from kernels.registry import Backend, Op
from kernels.testing.cases import Case
from kernels.testing.tolerance import (
    Inputs,
    Tensors,
    as_float64,
    copied,
    differentiable,
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


def check_signature(op: Op, backend: Backend) -> None:
    """The backend takes exactly the op's arguments, with the same defaults."""
    want, got = (
        [(p.name, p.kind, p.default) for p in signature(function).parameters.values()]
        for function in (op.check, backend.run)
    )
    assert got == want, f"{op.name}: {backend.name} takes {got}, the op {want}"


def check_forward(op: Op, backend: Backend, case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """Results, and arguments changed in place; nothing else may change, nothing may come from uninitialised memory."""
    inputs = case.inputs(dtype, device)
    before = copied(inputs)
    with poisoned_memory():
        got = outputs(op, op.bind(backend), inputs)
    for name, value in inputs.items():
        pairs = zip(tensors_of(value), tensors_of(before[name]), strict=True)
        assert all(same_bits(*pair) for pair in pairs), f"{op.name}: argument {name} was changed"
    eager = outputs(op, reference(op), inputs)
    assert_within_tolerance(inputs, got, eager, outputs(op, reference(op), as_float64(inputs)))
    for name in eager:
        assert memory_format(got[name]) == memory_format(eager[name]), f"{name}: memory format {got[name].stride()}"
        if name in op.mutates and same_bits(eager[name], inputs[name]):
            assert same_bits(got[name], inputs[name]), f"{name} was to stay as it is, bit for bit"


def check_gradients(op: Op, backend: Backend, case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """The gradients of all differentiable arguments, for random upstream gradients; tangents have none."""
    inputs = case.inputs(dtype, device)
    eager_results = outputs(op, reference(op), inputs)
    upstream = upstream_gradients(op, eager_results)
    wanted = [name for name in op.differentiable if inputs[name] is not None]
    results = named(op.bind(backend)(**inputs | leaves(inputs, wanted)))
    assert {name for name, result in results.items() if result.requires_grad} == set(upstream), "which have gradients"
    with poisoned_memory():
        got = gradients(op, op.bind(backend), inputs, upstream)
    eager = gradients(op, reference(op), inputs, upstream)
    assert_within_tolerance(inputs, got, eager, gradients(op, reference(op), as_float64(inputs), as_float64(upstream)))


def check_partial_gradients(op: Op, backend: Backend, case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """Gradients when only one argument asks for one, one result has one, or the upstream is expanded from a number."""
    inputs = case.inputs(dtype, device)
    names = [name for name in op.differentiable if inputs[name] is not None]
    results = differentiable(op, outputs(op, reference(op), inputs))
    ones = {name: torch.ones((), dtype=r.dtype, device=device).expand_as(r) for name, r in results.items()}
    for wanted, upstream in (
        *(([name], ones) for name in names),
        *((names, {name: gradient}) for name, gradient in ones.items()),
    ):
        got = gradients(op, op.bind(backend), inputs, upstream, wanted)
        eager = gradients(op, reference(op), inputs, upstream, wanted)
        assert_within_tolerance(
            inputs, got, eager, gradients(op, reference(op), as_float64(inputs), as_float64(upstream), wanted)
        )


def check_repeats(op: Op, backend: Backend, case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """Two runs give the same bits, forward and backward."""
    inputs = case.inputs(dtype, device)
    function = op.bind(backend)
    first, second = (outputs(op, function, inputs) for _ in range(2))
    if op.differentiable:
        upstream = upstream_gradients(op, first)
        first, second = ({**run, **gradients(op, function, inputs, upstream)} for run in (first, second))
    for name in first:
        assert same_bits(first[name], second[name]), f"{op.name}: {name} differs between two runs"


def check_compiled(
    op: Op, backend: Backend, case: Case, dtype: torch.dtype, device: str = "cpu", compiler: str = "aot_eager"
) -> None:
    """The op compiles as one graph, and the graph computes the same, forward and backward.

    Without Inductor's cache on disk, which does not see that an operator behind its name has changed.
    """
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        _check_compiled(op, backend, case, dtype, device, compiler)


def _check_compiled(op: Op, backend: Backend, case: Case, dtype: torch.dtype, device: str, compiler: str) -> None:
    function = torch.compile(op.bind(backend), fullgraph=True, backend=compiler)
    inputs = case.inputs(dtype, device)
    eager = outputs(op, reference(op), inputs)
    fp64 = outputs(op, reference(op), as_float64(inputs))
    if op.differentiable:
        upstream = upstream_gradients(op, eager)
        eager = gradients(op, reference(op), inputs, upstream, keep=True)
        fp64 = gradients(op, reference(op), as_float64(inputs), as_float64(upstream), keep=True)
        assert_within_tolerance(inputs, gradients(op, function, inputs, upstream, keep=True), eager, fp64)
    else:
        assert_within_tolerance(inputs, outputs(op, function, inputs), eager, fp64)


def check_registration(op: Op, backend: Backend, case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """`opcheck` of every operator that the backend says it registers, with the arguments a call gives it."""
    inputs = case.inputs(dtype, device)
    function, wanted = op.bind(backend), [name for name in op.differentiable if inputs[name] is not None]
    with OperatorCalls(backend.torch_ops) as forward:
        results = outputs(op, function, inputs | leaves(inputs, wanted))
    with OperatorCalls(set(backend.torch_ops) - set(forward.seen)) as backward:
        if wanted:
            gradients(op, function, inputs, upstream_gradients(op, results))
    missing = set(backend.torch_ops) - set(forward.seen) - set(backward.seen)
    assert not missing, f"{op.name}: {backend.name} names operators that no call reached: {sorted(missing)}"
    for operator, args, kwargs in forward.seen.values():
        torch.library.opcheck(operator, args, kwargs)
    for operator, args, kwargs in backward.seen.values():
        # The gradient of a gradient is asked of nobody.
        torch.library.opcheck(operator, *tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs)))


def check_limits(op: Op, backend: Backend, case: Case, device: str = "cpu") -> None:
    """A dtype outside `backend.dtypes` is refused with a reason."""
    for dtype in (op.dtypes & case.dtypes) - backend.dtypes:
        assert backend.unsupported is not None, f"{op.name}: {backend.name} does not refuse {dtype}"
        reasons = backend.unsupported(**case.inputs(dtype, device))
        assert reasons and all(isinstance(reason, str) for reason in reasons), f"no reason against {dtype}"


def assert_within_tolerance(inputs: Inputs, got: Tensors, eager: Tensors, fp64: Tensors) -> None:
    wrong = mismatches(got, eager, fp64, has_half_precision(inputs))
    assert not wrong, "; ".join(wrong)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, where NaN equals NaN and 0 does not equal −0."""
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def memory_format(tensor: torch.Tensor) -> str:
    """`"channels last"` for a four-dimensional tensor laid out so and not also contiguous, else `"any"`."""
    last = tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return "channels last" if last and not tensor.is_contiguous() else "any"


@contextmanager
def poisoned_memory():
    """Make `torch.empty` and its kin return NaN, so that a result never written does not pass by luck."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


class OperatorCalls(TorchDispatchMode):
    """Records the first call of each operator among `names`: name → the operator, and copies of its arguments."""

    def __init__(self, names: Iterable[str]):
        super().__init__()
        self._names = set(names)
        self.seen: dict[str, tuple[torch._ops.OpOverload, tuple, dict]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name in self._names and name not in self.seen:
            copies = tree_map_only(
                torch.Tensor, lambda t: t.detach().clone().requires_grad_(t.requires_grad), (args, kwargs or {})
            )
            self.seen[name] = func, *copies
        return func(*args, **kwargs or {})
