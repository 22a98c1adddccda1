"""The generic checks on backends they have never seen: a right one passes, wrong ones fail.

Most wrong backends are a reference with one edit of its source, `wrong_edits` in the op's `expectations.py`: a
forgotten eps, a margin ignored, a sign flipped.
"""

import importlib
import shutil
import types
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import kernels
from kernels.registry import FILES, Backend, Op, choose
from kernels.testing import checks
from kernels.testing.cases import Case

DTYPES = (torch.float32, torch.bfloat16)
SWIGLU = kernels.OPS["swiglu"]


def edited(op: Op, old: str = "", new: str = "") -> Backend:
    """The reference of the op with one edit of its source."""
    original = importlib.import_module(f"kernels.{op.name}.reference")
    source = Path(original.__file__).read_text()
    assert not old or source.count(old) == 1, f"{old!r} occurs {source.count(old)} times"
    module = types.ModuleType("edited")
    exec(compile(source.replace(old, new) if old else source, f"{op.name} with {new!r}", "exec"), vars(module))
    return Backend("edited", vars(module)[op.name])


def failures(op: Op, backend: Backend) -> Iterable[str]:
    """Cases in which a check finds the backend wrong."""
    for case in op.cases:
        for dtype in DTYPES:
            if case.production or dtype not in op.dtypes & case.dtypes:
                continue
            try:
                checks.check_forward(op, backend, case, dtype)
                if op.differentiable:
                    checks.check_gradients(op, backend, case, dtype)
            except AssertionError as error:
                yield f"{case.id} {dtype}: {error}"


@pytest.mark.parametrize(
    ("op", "old", "new"),
    [
        pytest.param(op, *edit, id=f"{op.name}-{'-'.join(edit)}")
        for op in kernels.OPS.values()
        for edit in op.expectations.wrong_edits
    ],
)
def test_a_wrong_backend_is_found(op, old, new):
    assert next(iter(failures(op, edited(op, old, new))), None), f"nothing finds {old!r} changed into {new!r}"


@pytest.mark.parametrize("op", kernels.OPS.values(), ids=lambda op: op.name)
def test_a_right_backend_passes(op):
    """The control: the same machinery without an edit."""
    assert op.expectations.wrong_edits and list(failures(op, edited(op))) == []


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """The op `swiglu` in a folder of its own, to which a backend file has been added: nothing else is changed."""
    root = tmp_path_factory.mktemp("ops")
    shutil.copytree(Path(kernels.__file__).parent / "swiglu", root / "planted_swiglu")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(root)
        op = replace(SWIGLU, package="planted_swiglu")
        assert op.backends == SWIGLU.backends
        shutil.copy(Path(__file__).parent / "kernel_planted.py", root / "planted_swiglu" / f"{FILES['triton']}.py")
        importlib.invalidate_caches()
        yield op


def test_a_file_in_the_folder_is_a_backend(planted):
    assert set(planted.backends) == {*SWIGLU.backends, "triton"}
    for choice in ("triton", "auto"):
        ops = choose({"swiglu": planted}, choice, {})
        assert ops.table()["swiglu"]["backend"] == "triton"
        x = torch.linspace(-2, 2, 8)
        torch.testing.assert_close(ops.swiglu(x), kernels.select("reference").swiglu(x))
    with pytest.raises(kernels.BackendUnavailable, match=r"dtype torch.float64 is not served"):
        ops.swiglu(x.double())


def test_a_registered_backend_passes_every_check(planted):
    backend = planted.backend("triton")
    checks.check_signature(planted, backend)
    small = [case for case in planted.cases if not case.production]
    for case in small:
        for dtype in (torch.float32, torch.float16):
            checks.check_forward(planted, backend, case, dtype)
            checks.check_gradients(planted, backend, case, dtype)
            checks.check_repeats(planted, backend, case, dtype)
        checks.check_partial_gradients(planted, backend, case, torch.float32)
        checks.check_limits(planted, backend, case)
    checks.check_registration(planted, backend, small[3], torch.float16)
    checks.check_compiled(planted, backend, small[3], torch.float32)


@pytest.mark.parametrize("times, right", [(1.8, True), (5, False), (15, False)])
def test_a_kernel_of_several_times_the_error_of_the_reference_is_found(tmp_path, monkeypatch, times, right):
    """The reference loses digits to a large number in between, far more than the last ones."""
    files = {
        "__init__": '"""Planted."""',
        "reference": """
from kernels.registry import Backend
def lossy(x): return (x + 1e4) - 1e4
BACKEND = Backend("reference", lossy)
""",
    }
    (tmp_path / "planted_lossy").mkdir()
    for name, text in files.items():
        (tmp_path / "planted_lossy" / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    op = Op("lossy", lambda x: None, package="planted_lossy")
    case = Case("any", lambda draw: {"x": draw.normal(1000)})
    backend = Backend("planted", lambda x: x + times * (op.backend("reference").run(x) - x))
    if right:
        checks.check_forward(op, backend, case, torch.float32)
    else:
        with pytest.raises(AssertionError, match=r"error .*, limit .*, that of the reference"):
            checks.check_forward(op, backend, case, torch.float32)


# Operators that compute the right numbers and are registered, bounded or behaved wrongly.

CASE = next(case for case in SWIGLU.cases if case.id == "odd")


def operator(name: str, fake=None, forward=None):
    """A custom operator for `swiglu` without a gradient, and the backend that calls it."""
    run = SWIGLU.backend("reference").run

    @torch.library.custom_op(f"planted::{name}", mutates_args=())
    def function(gate_up: torch.Tensor) -> torch.Tensor:
        return (forward or run)(gate_up)

    function.register_fake(fake or run)
    return Backend("planted", lambda gate_up, *, bias=None: function(gate_up), torch_ops=(f"planted::{name}",))


def test_a_missing_gradient_is_found():
    backend = operator("no_gradient")
    checks.check_forward(SWIGLU, backend, CASE, torch.float32)
    with pytest.raises(RuntimeError, match="autograd"):
        checks.check_gradients(SWIGLU, backend, CASE, torch.float32)


@pytest.mark.parametrize(
    ("name", "fake"),
    [("wrong_shape", torch.empty_like), ("wrong_dtype", lambda gate_up: gate_up.chunk(2, dim=-1)[0].double())],
)
def test_a_wrong_fake_is_found(name, fake):
    with pytest.raises(Exception, match=r"fake|[Mm]ismatch|not equal"):
        checks.check_registration(replace(SWIGLU, differentiable=()), operator(name, fake), CASE, torch.float32)


def test_an_operator_that_returns_its_input_is_found():
    first = operator("alias", lambda x: x, lambda x: x)
    with pytest.raises(Exception, match="alias"):
        checks.check_registration(replace(SWIGLU, differentiable=()), first, CASE, torch.float32)


def test_an_operator_named_and_never_called_is_found():
    backend = replace(SWIGLU.backend("reference"), torch_ops=("planted::nowhere",))
    with pytest.raises(AssertionError, match="planted::nowhere"):
        checks.check_registration(SWIGLU, backend, CASE, torch.float32)


def test_a_graph_break_is_found():
    def swiglu(gate_up, *, bias=None):
        scale = float(gate_up.detach().sum() * 0 + 1)  # read by the host
        return SWIGLU.backend("reference").run(gate_up * scale)

    checks.check_forward(SWIGLU, Backend("planted", swiglu), CASE, torch.float32)
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        checks.check_compiled(SWIGLU, Backend("planted", swiglu), CASE, torch.float32)


def test_a_result_never_written_is_found():
    def swiglu(gate_up, *, bias=None):
        out = torch.empty_like(gate_up.chunk(2, dim=-1)[0])
        out[:-1] = SWIGLU.backend("reference").run(gate_up[:-1])
        return out

    with pytest.raises(AssertionError, match="error nan"):
        checks.check_forward(SWIGLU, Backend("planted", swiglu), CASE, torch.float32)


def test_an_argument_written_to_is_found():
    def swiglu(gate_up, *, bias=None):
        result = SWIGLU.backend("reference").run(gate_up)
        gate_up[..., 0] = 0
        return result

    with pytest.raises(AssertionError, match="argument gate_up was changed"):
        checks.check_forward(SWIGLU, Backend("planted", swiglu), CASE, torch.float32)


def test_a_run_that_differs_from_the_one_before_is_found():
    calls = iter(range(9))

    def swiglu(gate_up, *, bias=None):
        return SWIGLU.backend("reference").run(gate_up) * (1 + 2**-23 * next(calls))

    with pytest.raises(AssertionError, match="differs between two runs"):
        checks.check_repeats(SWIGLU, Backend("planted", swiglu), CASE, torch.float32)


def test_a_dtype_that_is_not_refused_is_found():
    backend = replace(SWIGLU.backend("reference"), dtypes=frozenset({torch.float32}))
    with pytest.raises(AssertionError, match="does not refuse"):
        checks.check_limits(SWIGLU, backend, CASE)
    with pytest.raises(AssertionError, match="no reason against"):
        checks.check_limits(SWIGLU, replace(backend, unsupported=lambda gate_up, *, bias=None: []), CASE)


def test_another_signature_is_found():
    with pytest.raises(AssertionError, match="takes"):
        checks.check_signature(SWIGLU, Backend("planted", lambda x: x))


def test_a_backward_that_needs_a_dense_upstream_is_found():
    class Swiglu(torch.autograd.Function):
        @staticmethod
        def forward(ctx, gate_up):
            ctx.save_for_backward(gate_up)
            return SWIGLU.backend("reference").run(gate_up)

        @staticmethod
        def backward(ctx, grad):
            leaf = ctx.saved_tensors[0].detach().requires_grad_()
            with torch.enable_grad():
                result = SWIGLU.backend("reference").run(leaf)
            # As a kernel that is given a pointer: it reads what lies in memory, whatever the strides are.
            memory = torch.empty_like(grad, memory_format=torch.contiguous_format).fill_(torch.nan)
            count = min(grad.untyped_storage().nbytes() // grad.element_size(), grad.numel())
            memory.view(-1)[:count] = torch.as_strided(grad, (count,), (1,))
            return torch.autograd.grad(result, leaf, memory)[0]

    backend = Backend("planted", lambda gate_up, *, bias=None: Swiglu.apply(gate_up))
    checks.check_gradients(SWIGLU, backend, CASE, torch.float32)
    with pytest.raises(AssertionError, match="error nan"):
        checks.check_partial_gradients(SWIGLU, backend, CASE, torch.float32)
