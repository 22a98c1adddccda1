"""Every op × backend × case × dtype, on a CPU and (marked `gpu`) on a device. Nothing here knows an op or a backend."""

from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_unflatten

import kernels
from kernels.backends.device import cuda_reasons
from kernels.registry import FLOATS, Backend, Op
from kernels.testing import checks
from kernels.testing.cases import Case
from kernels.testing.tolerance import differentiable, leaves, named, tensors_of

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BACKENDS = [(op, name) for op in kernels.OPS.values() for name in op.backends]
#: Backends that a run on a GPU tells nothing new about: the reference, with which the others are compared, and the
#: emulation, which computes on the CPU.
NOT_FOR_GPUS = ("reference", "emulated")


def all_cases() -> Iterator:
    """Op, backend name, case, dtype and device: small cases on the CPU, all of them on a GPU."""
    for op, name in BACKENDS:
        for case in op.cases:
            for dtype in DTYPES:
                if dtype in op.dtypes & case.dtypes:
                    label = f"{op.name}-{name}-{case.id}-{str(dtype).removeprefix('torch.')}"
                    if not case.production:
                        yield pytest.param(op, name, case, dtype, "cpu", id=f"{label}-cpu")
                    if name not in NOT_FOR_GPUS:
                        yield pytest.param(op, name, case, dtype, "cuda", id=f"{label}-cuda", marks=pytest.mark.gpu)


def first_cases(also: tuple[str, ...] = ()) -> Iterator:
    """Op, backend name and device: for checks that one or a few cases settle.

    also: backends that the check says something about on a GPU all the same.
    """
    for op, name in BACKENDS:
        yield pytest.param(op, name, "cpu", id=f"{op.name}-{name}-cpu")
        if name not in NOT_FOR_GPUS or name in also:
            yield pytest.param(op, name, "cuda", id=f"{op.name}-{name}-cuda", marks=pytest.mark.gpu)


def test_a_gpu_is_asked_what_a_cpu_cannot_tell():
    for found in (all_cases(), first_cases()):
        names = {device: {p.values[1] for p in params} for device, params in by_device(found).items()}
        assert names["cpu"] >= {"reference", "triton", "emulated"} and names["cuda"] == {"triton", "cuda", "library"}
    assert "reference" in {p.values[1] for p in by_device(first_cases(also=("reference",)))["cuda"]}


def by_device(found: Iterator) -> dict[str, list]:
    parts = {"cpu": [], "cuda": []}
    for param in found:
        parts[param.values[-1]].append(param)
        assert bool(param.marks) == (param.values[-1] == "cuda")
    return parts


def unsupported_reasons(op: Op, name: str, case: Case, dtype: torch.dtype, device: str) -> list[str]:
    """Why the backend cannot serve this call here; empty if it can."""
    if reasons := op.reasons(name) or (cuda_reasons() if device == "cuda" else []):
        return reasons
    backend = op.backend(name)
    if dtype not in backend.dtypes:
        return [f"{name} does not serve {dtype} here"]
    return backend.unsupported(**case.inputs(dtype, device)) if backend.unsupported is not None else []


def able(op: Op, name: str, case: Case, dtype: torch.dtype, device: str) -> Backend:
    """The backend, or a skip with its own reasons."""
    if reasons := unsupported_reasons(op, name, case, dtype, device):
        pytest.skip("; ".join(reasons))
    return op.backend(name)


def small_cases(op: Op, name: str, device: str) -> list[tuple[Backend, Case, torch.dtype]]:
    """Small cases that the backend serves, each with the widest dtype it has; skips where there are fewer than four."""
    if reasons := op.reasons(name) or (cuda_reasons() if device == "cuda" else []):
        pytest.skip("; ".join(reasons))
    backend = op.backend(name)
    dtype = next(dtype for dtype in DTYPES if dtype in backend.dtypes & op.dtypes)
    cases = [case for case in op.cases if not case.production and dtype in case.dtypes]
    refused = {case.id: reasons for case in cases if (reasons := unsupported_reasons(op, name, case, dtype, device))}
    if len(cases) - len(refused) < 4:
        pytest.skip("; ".join(f"{case}: {', '.join(reasons)}" for case, reasons in refused.items()))
    return [(backend, case, dtype) for case in cases if case.id not in refused]


@pytest.mark.parametrize(("op", "name", "case", "dtype", "device"), all_cases())
def test_forward(op, name, case, dtype, device):
    checks.check_forward(op, able(op, name, case, dtype, device), case, dtype, device)


@pytest.mark.parametrize(
    ("op", "name", "case", "dtype", "device"), [param for param in all_cases() if param.values[0].differentiable]
)
def test_gradients(op, name, case, dtype, device):
    checks.check_gradients(op, able(op, name, case, dtype, device), case, dtype, device)


@pytest.mark.parametrize(("op", "name", "device"), [c for c in first_cases() if c.values[0].differentiable])
def test_partial_gradients(op, name, device):
    for backend, case, dtype in small_cases(op, name, device)[:5]:
        checks.check_partial_gradients(op, backend, case, dtype, device)


@pytest.mark.parametrize(("op", "name", "device"), first_cases(also=("reference",)))
def test_same_bits_in_every_run(op, name, device):
    """On a CPU of some cases: there, threads and programs take turns. On a GPU of the reference too: a run on it, where
    nothing else can serve, is to repeat as well."""
    for backend, case, dtype in small_cases(op, name, device)[:: 1 if device == "cuda" else 3]:
        checks.check_repeats(op, backend, case, dtype, device)


@pytest.mark.parametrize(("op", "name", "device"), first_cases())
def test_compiles_as_one_graph(op, name, device):
    for backend, case, dtype in small_cases(op, name, device)[1:3]:
        checks.check_compiled(op, backend, case, dtype, device)


@pytest.mark.parametrize(("op", "name", "device"), first_cases())
def test_compiles_with_inductor(op, name, device):
    backend, case, dtype = small_cases(op, name, device)[3]
    checks.check_compiled(op, backend, case, dtype, device, compiler="inductor")


@pytest.mark.parametrize(("op", "name", "device"), first_cases())
def test_registered_operators(op, name, device):
    backend, case, dtype = small_cases(op, name, device)[2]
    if not backend.torch_ops:
        pytest.skip(f"{name} registers no operators for {op.name}")
    checks.check_registration(op, backend, case, dtype, device)


@pytest.mark.parametrize(("op", "name", "device"), first_cases())
def test_signature_and_limits(op, name, device):
    for backend, case, _ in small_cases(op, name, device):
        checks.check_signature(op, backend)
        checks.check_limits(op, backend, case, device)


@pytest.mark.parametrize("op", [op for op in kernels.OPS.values() if op.differentiable], ids=lambda op: op.name)
def test_gradients_of_the_reference_are_those_of_its_results(op):
    """Against finite differences in float64."""
    for case in op.cases:
        if case.production or case.dtypes != FLOATS:  # where narrow dtypes do not fit, neither do finite differences
            continue
        inputs = checks.as_float64(case.inputs(torch.float64))
        asked, structure = tree_flatten(leaves(inputs, [n for n in op.differentiable if inputs[n] is not None]))

        def call(*values, inputs=inputs, structure=structure):
            results = named(op.backend("reference").run(**inputs | tree_unflatten(values, structure)))
            return tuple(differentiable(op, results).values())

        assert torch.autograd.gradcheck(call, asked, fast_mode=True, eps=1e-7, atol=1e-5), case.id


@pytest.mark.parametrize("op", kernels.OPS.values(), ids=lambda op: op.name)
def test_cases_and_the_reference_stay_on_their_device(op):
    """On one that is only made up, whose tensors do not mix with a CPU's either. It can draw no production cases."""
    with FakeTensorMode():
        for case in op.cases:
            if case.production or torch.float32 not in case.dtypes & op.dtypes:
                continue
            inputs = case.inputs(torch.float32, "cuda")
            found = inputs | checks.outputs(op, checks.reference(op), inputs)
            strays = [n for n, v in found.items() if any(t.device.type != "cuda" for t in tensors_of(v))]
            assert not strays, f"{case.id}: {strays}"
