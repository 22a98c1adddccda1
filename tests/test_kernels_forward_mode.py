"""Forward modes of ops (`<op>_jvp`): `torch.func.jvp` of ops and finite differences; ops called with dual tensors."""

import copy
import pickle

import pytest
import torch
from torch.autograd import forward_ad

import kernels
from kernels.forward_mode import SUFFIX
from kernels.registry import FLOATS, Op
from kernels.testing.tolerance import as_float64, flattened, leaves, named, random_like, reference

FORWARD_MODES = [op for op in kernels.OPS.values() if op.forward_mode_of]
forward_modes = pytest.mark.parametrize("jvp", FORWARD_MODES, ids=lambda op: op.name)


def small(op: Op) -> list:
    return [case for case in op.cases if not case.production]


def split(inputs: dict) -> tuple[dict, dict]:
    """A forward mode's arguments as those of its op, and the tangents that are given by argument."""
    primal = {name: value for name, value in inputs.items() if not name.endswith(SUFFIX)}
    tangents = {name.removesuffix(SUFFIX): value for name, value in inputs.items() if name.endswith(SUFFIX)}
    return primal, {name: tangent for name, tangent in tangents.items() if tangent is not None}


def by_torch(function, primal: dict, tangents: dict) -> tuple[dict, dict]:
    """Results and their tangents by `torch.func.jvp`, by name."""
    names = list(tangents)

    def call(*values):
        return named(function(**primal | dict(zip(names, values, strict=True))))

    return torch.func.jvp(call, tuple(primal[name] for name in names), tuple(tangents.values()))


def pairs(op: Op, results: tuple) -> tuple[dict, dict]:
    """Results of a forward mode, and their tangents, by the names that `by_torch` gives them."""
    return named(results[::2]), named(results[1::2])


def assert_close(got: dict, want: dict, where: str, atol: float) -> None:
    """atol: relative to the largest value of each result."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        error, scale = float((got[name].double() - value.double()).abs().max()), float(value.abs().max())
        assert error <= atol * scale, f"{where} {name}: error {error:.3e}, largest value {scale:.3e}"


def test_the_forward_modes_are_those_of_the_ops_that_the_transformer_calls():
    assert {op.forward_mode_of: op.name for op in FORWARD_MODES} == {
        name: f"{name}_jvp"
        for name in ("adaln_rms_norm", "gated_residual_adaln_rms_norm", "swiglu", "rope_attention", "stacked_linear")
    }


@forward_modes
def test_it_is_the_jacobian_of_the_op_times_the_tangents(jvp):
    """Of every case in float64, to rounding; the two differ in the order of sums only."""
    primal_op = kernels.OPS[jvp.forward_mode_of]
    for case in small(jvp):
        inputs = as_float64(case.inputs(torch.float64))
        want = by_torch(reference(primal_op), *split(inputs))
        got = pairs(jvp, reference(jvp)(**inputs))
        for found, wanted in zip(got, want, strict=True):
            assert_close(found, wanted, case.id, atol=1e-12)


@forward_modes
def test_it_agrees_with_finite_differences(jvp):
    """Central ones of the op itself, in float64: their error is h² times a third derivative, and rounding over h."""
    primal_op, step = kernels.OPS[jvp.forward_mode_of], 1e-5
    for case in small(jvp):
        if case.dtypes != FLOATS:  # scores so large that no step is small
            continue
        inputs = as_float64(case.inputs(torch.float64))
        primal, tangents = split(inputs)
        # Rows of 1e-3 and their tangents are of one size: a step is 1e-5 of it.
        ahead, behind = (
            named(reference(primal_op)(**primal | {n: primal[n] + sign * step * t for n, t in tangents.items()}))
            for sign in (1, -1)
        )
        _, got = pairs(jvp, reference(jvp)(**inputs))
        assert_close(got, {n: (ahead[n] - behind[n]) / (2 * step) for n in ahead}, case.id, atol=1e-7)


def served(op: Op, backend: str, dtype: torch.dtype = torch.float32) -> bool:
    return backend in op.backends and not op.reasons(backend) and dtype in op.backend(backend).dtypes


BACKENDS = [(jvp, name) for jvp in FORWARD_MODES for name in ("reference", "triton", "library") if name in jvp.backends]
backends = pytest.mark.parametrize(("jvp", "name"), BACKENDS, ids=[f"{op.name}-{name}" for op, name in BACKENDS])


@backends
@pytest.mark.parametrize("how", ["torch.func.jvp", "dual level", "compiled"])
def test_an_op_takes_dual_tensors(jvp, name, how):
    """Every backend, in float32: outputs, tangents, and the gradients of outputs to what has no tangent."""
    if not served(jvp, name):
        pytest.skip("; ".join(jvp.reasons(name)))
    primal_op = kernels.OPS[jvp.forward_mode_of]
    ops = kernels.select("reference", **{primal_op.name: name, jvp.name: name})
    function, case = getattr(ops, primal_op.name), next(c for c in small(jvp) if c.id == "odd")
    primal, tangents = split(case.inputs(torch.float32))
    want = by_torch(reference(primal_op), *split(as_float64(case.inputs(torch.float32))))
    if how == "dual level":
        with forward_ad.dual_level():
            duals = {n: forward_ad.make_dual(primal[n], t) for n, t in tangents.items()}
            unpacked = {k: forward_ad.unpack_dual(v) for k, v in named(function(**primal | duals)).items()}
            got = {k: v.primal for k, v in unpacked.items()}, {k: v.tangent for k, v in unpacked.items()}
    elif how == "compiled":
        torch._dynamo.reset()
        compiled = torch.compile(lambda p, t: by_torch(function, p, t), fullgraph=True, backend="aot_eager")
        got = compiled(primal, tangents)
        assert all(
            torch.equal(a, b) for a, b in zip(compiled(primal, tangents)[1].values(), got[1].values(), strict=True)
        )
    else:
        got = by_torch(function, primal, tangents)
    for found, wanted in zip(got, want, strict=True):
        assert_close(found, wanted, how, atol=2e-6)


@backends
def test_gradients_come_through_the_outputs_of_dual_calls_alone(jvp, name):
    """Those of weights and biases, which have no tangents, as they are without any."""
    if not served(jvp, name):
        pytest.skip("; ".join(jvp.reasons(name)))
    primal_op = kernels.OPS[jvp.forward_mode_of]
    ops = kernels.select("reference", **{primal_op.name: name, jvp.name: name})
    for case in (c for c in small(jvp) if c.id in ("odd", "bias", "bias_norm")):
        primal, tangents = split(case.inputs(torch.float32))
        constant = [n for n in primal_op.differentiable if n not in tangents and primal[n] is not None]
        if not constant:
            continue
        found = []
        for inputs, function in ((primal, getattr(ops, primal_op.name)), (as_float64(primal), reference(primal_op))):
            asked = leaves(inputs, constant)
            moved = {n: t.to(inputs[n].dtype) for n, t in tangents.items()}
            results, tangents_of_results = by_torch(function, inputs | asked, moved)
            if name != "reference" and not found:
                assert not any(t.requires_grad for t in tangents_of_results.values()), "they are constants"
            total = sum((result * random_like(result)).sum() for result in results.values())
            by_name = flattened(asked)
            found.append(dict(zip(by_name, torch.autograd.grad(total, list(by_name.values())), strict=True)))
        assert_close(*found, case.id, atol=2e-6)


def test_an_argument_without_a_tangent_is_a_constant():
    ops, x = (
        kernels.select("reference", stacked_linear="library", swiglu="triton", swiglu_jvp="triton"),
        torch.randn(3, 8),
    )
    w, b = [torch.randn(4, 8)], [torch.randn(4)]
    y, tangent = torch.func.jvp(lambda s: ops.swiglu(x) * s, (torch.ones(3, 4),), (torch.zeros(3, 4),))
    assert torch.equal(y, ops.swiglu(x)) and not tangent.any(), "nothing that the op was given has a tangent"
    y, tangent = torch.func.jvp(lambda x: ops.stacked_linear(x, w, b), (x,), (torch.ones(3, 8),))
    torch.testing.assert_close(tangent[0], w[0].sum(1).expand(3, 4))


def test_a_tangent_of_a_weight_is_refused():
    ops, x, bias = kernels.select("reference", swiglu="triton", swiglu_jvp="triton"), torch.randn(3, 8), torch.randn(8)
    with pytest.raises(ValueError, match=r"^swiglu: bias has a tangent; allowed: tangents of gate_up$"):
        torch.func.jvp(lambda bias: ops.swiglu(x, bias=bias), (bias,), (bias,))
    w, b = [torch.randn(4, 8)], [torch.randn(4)]
    with pytest.raises(ValueError, match=r"^stacked_linear: weights has a tangent; allowed: tangents of x$"):
        torch.func.jvp(lambda w: kernels.select("auto").stacked_linear(x, [w], b), tuple(w), tuple(w))


def test_a_backend_without_a_kernel_for_it_says_so():
    ops, x = kernels.select("reference", swiglu="triton", swiglu_jvp="cuda"), torch.randn(3, 8)
    want = kernels.select("reference").swiglu(x)
    torch.testing.assert_close(ops.swiglu(x), want)
    with pytest.raises(kernels.BackendUnavailable, match=r"^swiglu_jvp: backend 'cuda' .* this op has no cuda backend"):
        torch.func.jvp(ops.swiglu, (x,), (x,))


def test_bundles_copied_or_pickled_take_dual_tensors_too():
    ops, x = kernels.select("reference", swiglu="triton", swiglu_jvp="triton"), torch.randn(3, 8)
    want = torch.func.jvp(ops.swiglu, (x,), (x,))
    for other in (pickle.loads(pickle.dumps(ops)), copy.deepcopy(ops)):
        assert all(torch.equal(a, b) for a, b in zip(torch.func.jvp(other.swiglu, (x,), (x,)), want, strict=True))
