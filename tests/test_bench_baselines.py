"""The adapters compute the ops: with stand-ins of the packages' signatures, checked as our own backends are."""

import sys
from functools import partial

import pytest
import torch

import kernels
from bench.baselines import BASELINES, Adapter
from bench.measure.work import Reference
from bench.ops import ready
from bench.workloads.providers import providers_for
from kernels.testing.tolerance import leaves, named
from tests import stand_ins

PACKAGES = ("liger_kernel", "apex", "quack", "flash_attn", "flash_attn_interface", "deepspeed")
#: Providers that torch serves on GPUs only.
DEVICE_ONLY = {"sdpa-cudnn", "sdpa-efficient"}
#: Cases whose arguments tell wrong calls apart. Not all of an op's: libraries promise less than our backends.
CASES = {
    "odd",
    "odd_no_shift",
    "XL_width",
    "strided",
    "transposed",
    "float32_stream",
    "bias",  # norms, swiglu
    "odd_no_norm",
    "norm_only",
    "heads_first",
    "width_64",
    "width_72",  # attention
    "one_group",
    "many_groups",
    "contiguous",
    "first_step",
    "no_copy",
    "no_decay",
    "late",
    "odd_flat",
    "many",  # stacked layers
}


@pytest.fixture
def packages(monkeypatch):
    for modules in (stand_ins.LIGER, stand_ins.APEX, stand_ins.QUACK, stand_ins.FLASH, stand_ins.DEEPSPEED):
        stand_ins.install(monkeypatch, modules)


def everyone() -> list:
    return [
        pytest.param(kernels.OPS[op], provider, id=f"{op}-{provider.name}")
        for op, providers in BASELINES.items()
        for provider in providers
    ]


@pytest.mark.parametrize(("op", "provider"), everyone())
def test_an_adapter_computes_its_op(op, provider, packages):
    if provider.name in DEVICE_ONLY:
        pytest.skip("not on a CPU")
    half = provider.name.startswith(("flash", "sdpa-flash"))
    checked = 0
    for case in op.cases:
        if case.id not in CASES:
            continue
        inputs = case.inputs(torch.bfloat16 if half else torch.float32)
        adapter, status, reason = ready(provider, inputs)
        if status == "unsupported":
            assert adapter is None and reason
            continue
        assert status == "ok", reason
        for direction in ("forward", "backward") if op.differentiable else ("forward",):
            assert not Reference(op, inputs).mismatches(adapter, direction), f"{case.id} {direction}"
            checked += 1
    assert checked >= 4


@pytest.mark.parametrize("name", ["apex-fused-adam", "deepspeed-fused-adam", "torch-fused"])
def test_optimizers_take_bfloat16_gradients(name, packages):
    op = kernels.OPS["adamw_ema_"]
    provider = next(c for c in BASELINES["adamw_ema_"] if c.name == name)
    inputs = next(case for case in op.cases if case.id == "late").inputs(torch.bfloat16)
    assert not Reference(op, inputs).mismatches(provider.load(), "forward")


def test_optimizers_refuse_a_step_to_skip(packages):
    inputs = next(c for c in kernels.OPS["adamw_ema_"].cases if c.id == "skipped").inputs(torch.float32)
    for provider in BASELINES["adamw_ema_"]:
        assert ready(provider, inputs)[1:] == ("unsupported", "the averages would be updated in a skipped step too")


def test_packages_that_are_missing_are_said_to_be(monkeypatch):
    stand_ins.remove(monkeypatch, *PACKAGES)
    missing = set()
    for op, providers in BASELINES.items():
        inputs = kernels.OPS[op].cases[0].inputs(torch.float16 if op == "rope_attention" else torch.float32)
        for provider in providers:
            adapter, status, reason = ready(provider, inputs)
            if not provider.name.startswith(("sdpa", "torch", "func-jvp")):
                assert (adapter, status) == (None, "unavailable") and reason.startswith("not installed: "), provider
                missing |= {package for package in PACKAGES if package in reason}
    assert missing == set(PACKAGES)


def test_no_package_is_imported_before_it_is_asked_for(monkeypatch):
    stand_ins.remove(monkeypatch, *PACKAGES)
    for name in [name for name in sys.modules if name.startswith("bench")]:
        monkeypatch.delitem(sys.modules, name)
    import bench.ops

    assert list(bench.ops.providers_for(kernels.OPS["rope_attention"]))


@pytest.mark.parametrize(
    ("op", "name", "module", "wrong", "mismatch"),
    [
        (
            "adaln_rms_norm",
            "quack",
            "quack",
            {"rmsnorm": lambda x, weight, eps: stand_ins.rms(x, weight, 0.0)},
            "result 0: error",
        ),  # eps dropped
        (
            "gated_residual_adaln_rms_norm",
            "quack",
            "quack",
            {"rmsnorm": lambda x, weight, residual, eps, **rest: (stand_ins.rms(x + residual, weight, eps), residual)},
            "result 0: error",
        ),  # the residual returned without the branch
        (
            "swiglu",
            "liger",
            "liger_kernel.ops.swiglu",
            {"LigerSiLUMulFunction": type("Wrong", (), {"apply": staticmethod(lambda a, b: a.sigmoid() * b)})},
            "result 0: error",
        ),
        (
            "group_norm_silu",
            "apex",
            "apex.contrib.group_norm",
            {
                "GroupNorm": type(
                    "Wrong",
                    (stand_ins.ApexGroupNorm,),
                    {"forward": lambda self, x: x * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)},
                )
            },
            "result 0: error",
        ),
        (
            "adamw_ema_",
            "apex-fused-adam",
            "apex.optimizers",
            {"FusedAdam": type("Wrong", (stand_ins.FusedAdam,), {"step": lambda self: None})},
            "param: error",
        ),
    ],
)
def test_a_wrong_peer_is_found(op, name, module, wrong, mismatch, packages, monkeypatch):
    stand_ins.install(monkeypatch, {module: wrong})
    provider = next(c for c in BASELINES[op] if c.name == name)
    inputs = next(c for c in kernels.OPS[op].cases if c.id in ("odd", "late")).inputs(torch.float32)
    mismatches = Reference(kernels.OPS[op], inputs).mismatches(provider.load(), "forward")
    assert any(text.startswith(mismatch) for text in mismatches), mismatches


def test_compiled_baselines_take_part_beside_the_plain_ones():
    names = [c.name for c in providers_for(kernels.OPS["rope_attention"])]
    for name in ("sdpa-flash", "sdpa-cudnn"):
        assert names.index(f"{name}-compile") == names.index(name) + 1
    compiled = []
    found = {c.name: c for c in providers_for(kernels.OPS["rope_attention"], lambda f: compiled.append(f) or f)}
    found["sdpa-flash-compile"].load()
    found["compile"].load()
    assert len(compiled) == 2 and "torch.compile of" in found["sdpa-flash-compile"].includes


FORWARD_MODES = [op for op in kernels.OPS.values() if op.forward_mode_of]
forward_modes = pytest.mark.parametrize("op", FORWARD_MODES, ids=lambda op: op.name)
FLOATS = (torch.float32, torch.bfloat16)


def by_name(op, compiler=lambda function: function) -> dict:
    return {provider.name: provider for provider in providers_for(op, compiler)}


@forward_modes
def test_every_forward_mode_is_held_against_that_of_torch(op):
    """Of the op's reference, and of nothing else: in every small case, in 16 bits too."""
    names = list(by_name(op))
    assert names[names.index("func-jvp") :] == ["func-jvp", "func-jvp-compile"]
    provider = by_name(op)["func-jvp"]
    assert op.forward_mode_of in provider.includes
    for case in op.cases:
        for dtype in op.dtypes & case.dtypes & set(FLOATS):
            if not case.production:
                expected = Reference(op, case.inputs(dtype))
                for direction in ("forward", "backward"):
                    assert not expected.mismatches(provider.load(), direction), f"{case.id} {dtype} {direction}"


def test_ops_without_tangents_have_no_such_peer():
    assert {name for name in kernels.OPS if "func-jvp" in by_name(kernels.OPS[name])} == {o.name for o in FORWARD_MODES}


@forward_modes
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_forward_modes_of_torch_compile_as_one_graph(op, dtype):
    compiler = partial(torch.compile, backend="aot_eager", fullgraph=True, dynamic=False)
    for case in (case for case in op.cases if case.id in ("odd", "bias", "odd_no_shift")):
        torch._dynamo.reset()
        adapter, expected = by_name(op, compiler)["func-jvp-compile"].load(), Reference(op, case.inputs(dtype))
        for direction in ("forward", "backward"):
            assert not expected.mismatches(adapter, direction), f"{case.id} {direction}"


@forward_modes
def test_tangents_of_torch_are_constants_to_autograd(op):
    inputs = next(case for case in op.cases if case.id == "odd").inputs(torch.float32)
    asked = leaves(inputs, [name for name in op.differentiable if inputs[name] is not None])
    results = list(named(by_name(op)["func-jvp"].load().run(**inputs | asked)).values())
    assert [result.requires_grad for result in results] == [True, False] * (len(results) // 2)


def test_a_wrong_tangent_is_found():
    op = kernels.OPS["swiglu_jvp"]
    inputs = next(case for case in op.cases if case.id == "odd").inputs(torch.float32)
    run = by_name(op)["func-jvp"].load().run
    adapter = Adapter(lambda gate_up, gate_up_tangent, *, bias=None: run(gate_up=gate_up, gate_up_tangent=gate_up))
    (found,) = Reference(op, inputs).mismatches(adapter, "forward")
    assert found.startswith("result 1: error")
