"""Selecting backends: what is served, what is refused and in which words."""

import copy
import importlib.metadata
import inspect
import logging
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import kernels
from kernels import BackendUnavailable, registry
from kernels.backends import device
from kernels.registry import Backend, Op
from kernels.testing.tolerance import outputs

FOLDER = Path(__file__).parents[1] / "kernels"


def check(x: torch.Tensor, *, power: int = 1) -> None:
    if power < 0:
        raise ValueError(f"scale: power is {power}")


def plant(folder: Path, name: str, **files: str) -> Op:
    """An op of its own package in `folder`, with these files in it."""
    (folder / name).mkdir()
    for file, text in ({"__init__": '"""Planted."""'} | files).items():
        (folder / name / f"{file}.py").write_text(text)
    return Op("scale", check, order=("cuda", "triton", "reference"), package=name)


def backend_file(name: str, factor: int, more: str = "") -> str:
    return (
        "from kernels.registry import Backend\n"
        f"def scale(x, *, power=1): return x * {factor} ** power\n"
        f"BACKEND = Backend({name!r}, scale{more})\n"
    )


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_the_package_imported_is_this_one():
    """Another public package is called `kernels` too."""
    assert Path(kernels.__file__).parent == FOLDER
    assert set(importlib.metadata.packages_distributions().get("kernels", ["lightningdit"])) == {"lightningdit"}


def test_every_folder_is_an_op_with_the_same_files():
    folders = {path.parent.name for path in FOLDER.glob("*/reference.py")}
    assert folders == set(kernels.OPS)
    for name, op in kernels.OPS.items():
        assert (op.name, op.order[-1]) == (name, "reference") and "reference" in op.backends
        assert len({case.id for case in op.cases}) == len(op.cases)
        assert {case.production for case in op.cases} == {True, False}
        for backend in ("triton", "cuda"):
            assert bool(getattr(op.expectations, backend)) == (backend in op.backends), f"limits of {name} on {backend}"
        parameters = inspect.signature(op.check).parameters
        assert set(op.differentiable + op.mutates) <= set(parameters)


def test_reference_bundle_has_one_callable_for_each_op():
    ops = kernels.select("reference")
    table = ops.table()
    assert list(table) == list(kernels.OPS)
    for name, op in kernels.OPS.items():
        assert table[name] == {"backend": "reference", "reason": "asked for by name"}
        function = getattr(ops, name)
        assert function.__name__ == name and function.__doc__ == op.doc
        assert list(inspect.signature(function).parameters) == list(inspect.signature(op.check).parameters)
    assert "swiglu='reference'" in repr(ops)


def test_a_bundle_is_immutable_and_its_table_a_copy():
    ops = kernels.select("reference")
    with pytest.raises(AttributeError, match="immutable"):
        ops.swiglu = None
    with pytest.raises(AttributeError, match="immutable"):
        del ops.swiglu
    ops.table()["swiglu"]["backend"] = "other"
    assert ops.table()["swiglu"]["backend"] == "reference"


def test_copies_and_pickles_compute_the_same():
    ops = kernels.select("auto", swiglu="reference")
    module = torch.nn.Module()
    module.ops = ops
    x = torch.linspace(-1, 1, 6)
    for other in (copy.copy(ops), copy.deepcopy(module).ops, pickle.loads(pickle.dumps(ops))):
        assert [row["backend"] for row in other.table().values()] == [row["backend"] for row in ops.table().values()]
        assert torch.equal(other.swiglu(x), ops.swiglu(x))


@pytest.mark.parametrize(
    ("backend", "per_op", "words"),
    [
        ("trition", {}, ["'trition'", "did you mean 'triton'?", "auto, reference, triton, cuda"]),
        ("reference", {"swiglu": "cudda"}, ["'cudda'", "did you mean 'cuda'?"]),
        ("reference", {"swigl": "reference"}, ["'swigl'", "did you mean 'swiglu'?", "rope_attention"]),
        (None, {}, ["None"]),
    ],
)
def test_unknown_names_are_refused_with_the_nearest_known(backend, per_op, words):
    with pytest.raises(ValueError) as error:
        kernels.select(backend, **per_op)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_unknown_op_of_a_bundle():
    with pytest.raises(AttributeError, match="did you mean 'vf_loss'"):
        _ = kernels.select("reference").vf_los


def test_a_missing_backend_raises_at_first_use_and_not_before(folder):
    op = plant(folder, "planted_missing", reference=backend_file("reference", 1))
    ops = registry.choose({"scale": op}, "triton", {})
    assert ops.table() == {
        "scale": {"backend": "triton", "reason": "cannot serve: this op has no triton backend (triton_impl.py)"}
    }
    with pytest.raises(BackendUnavailable, match="scale: backend 'triton' cannot serve: this op") as error:
        ops.scale(torch.ones(2))
    assert (error.value.op, error.value.backend) == ("scale", "triton")
    assert pickle.loads(pickle.dumps(error.value)).reasons == error.value.reasons


def test_an_op_that_nobody_calls_is_refused_at_once_where_it_is_named(folder):
    """As a whole bundle's backend it may be missing: then it takes part in nothing."""
    op = replace(plant(folder, "planted_graph_pass", reference=backend_file("reference", 1)), graph_pass=True)
    assert registry.choose({"scale": op}, "triton", {}).backend("scale") is None
    assert registry.choose({"scale": op}, "triton", {"scale": "auto"}).backend("scale").name == "reference"
    with pytest.raises(BackendUnavailable, match="scale: backend 'triton' cannot serve: this op"):
        registry.choose({"scale": op}, "reference", {"scale": "triton"})


@pytest.mark.parametrize("op", [op for op in kernels.OPS.values()], ids=lambda op: op.name)
@pytest.mark.parametrize("name", list(registry.FILES))
def test_a_named_backend_serves_or_says_why_not(op, name):
    ops = kernels.select(name)
    row = ops.table()[op.name]
    if name not in op.backends and registry.LIBRARY in op.backends:
        assert row == {"backend": "library", "reason": f"this op has no {name} backend"}
        return
    assert row["backend"] == name
    if reasons := op.reasons(name):
        assert all(reason in row["reason"] for reason in reasons)
        with pytest.raises(BackendUnavailable) as error:
            getattr(ops, op.name)()
        assert error.value.reasons == reasons
    else:
        assert row["reason"] == "asked for by name"


def test_a_failing_import_is_a_reason(folder):
    library = "raise OSError('no lib.so')"
    op = plant(folder, "planted_import", triton_impl="import nowhere_to_be_found", cuda_impl=library)
    assert op.reasons("triton") == ["import failed: No module named 'nowhere_to_be_found'"]
    assert op.reasons("cuda") == ["import failed: no lib.so"]


def test_any_other_failure_of_a_backend_file_is_not_hidden(folder):
    op = plant(folder, "planted_broken", reference=backend_file("reference", 1), cuda_impl="1 / 0")
    with pytest.raises(ZeroDivisionError):
        registry.choose({"scale": op}, "auto", {})


def test_auto_takes_the_first_that_can_serve_and_says_why(folder, caplog):
    op = plant(
        folder,
        "planted_auto",
        reference=backend_file("reference", 1),
        triton_impl=backend_file("triton", 2),
        cuda_impl=backend_file("cuda", 3, ", unavailable=lambda: ['no device', 'no driver']"),
    )
    with caplog.at_level(logging.INFO, "kernels.registry"):
        for _ in range(2):
            ops = registry.choose({"scale": op}, "auto", {})
    assert ops.table() == {"scale": {"backend": "triton", "reason": "not cuda: no device, no driver"}}
    assert ops.scale(torch.ones(1)) == 2
    (record,) = caplog.records
    assert "scale: triton (not cuda: no device, no driver)" in record.getMessage(), "logged once for each outcome"


def test_an_op_of_the_library_serves_in_place_of_kernels_unless_they_are_asked_of_it(folder):
    files = {"reference": backend_file("reference", 1), "library_impl": backend_file("library", 2)}
    op = plant(folder, "planted_library", **files)
    ops = registry.choose({"scale": op}, "cuda", {})
    assert ops.scale(torch.ones(1)) == 2 and pickle.loads(pickle.dumps(ops)).scale(torch.ones(1)) == 2
    assert registry.choose({"scale": op}, "reference", {}).scale(torch.ones(1)) == 1
    with pytest.raises(BackendUnavailable, match="scale: backend 'cuda' cannot serve: this op has no cuda backend"):
        registry.choose({"scale": op}, "reference", {"scale": "cuda"}).scale(torch.ones(1))


def test_operators_that_checkpointing_saves_are_those_of_the_chosen_backends():
    expected = {"reference": set(), "triton": {"rope_attention_fwd", "rope_attention_bwd", "rope_attention_jvp_fwd"}}
    for backend, names in expected.items():
        found = {op._schema.name for op in kernels.select(backend).saved_operators()}
        assert found == {f"ldit::{name}" for name in names if not kernels.OPS["rope_attention"].reasons(backend)}


def test_auto_never_picks_an_emulator(folder):
    files = {"reference": backend_file("reference", 1), "triton_impl": backend_file("triton", 2, ", emulated=True")}
    op = plant(folder, "planted_emulated", **files)
    assert registry.choose({"scale": op}, "auto", {}).table()["scale"]["backend"] == "reference"
    assert registry.choose({"scale": op}, "triton", {}).scale(torch.ones(1)) == 2, "by name it may"
    assert registry.choose({"scale": op}, "auto", {"scale": "triton"}).scale(torch.ones(1)) == 2


def test_auto_with_nothing_that_can_serve(folder):
    op = plant(folder, "planted_nothing", reference=backend_file("reference", 1, ", unavailable=lambda: ['why']"))
    with pytest.raises(BackendUnavailable, match=r"not triton: this op has no triton backend.*not reference: why"):
        registry.choose({"scale": op}, "auto", {})


def test_a_call_that_a_backend_cannot_serve_raises_its_reasons_after_the_check(folder):
    more = ", unsupported=lambda x, *, power=1: ['power above 3'] if power > 3 else []"
    op = plant(folder, "planted_limits", cuda_impl=backend_file("cuda", 3, more))
    ops = registry.choose({"scale": op}, "cuda", {})
    assert ops.scale(torch.ones(1), power=2) == 9
    with pytest.raises(BackendUnavailable, match="scale: backend 'cuda' cannot serve: power above 3"):
        ops.scale(torch.ones(1), power=4)
    with pytest.raises(ValueError, match="power is -1"):
        ops.scale(torch.ones(1), power=-1)


def test_auto_gives_calls_that_its_choice_cannot_serve_to_other_kernels_and_never_to_the_reference(folder):
    def limit(power: int) -> str:
        return f", unsupported=lambda x, *, power=1: ['power above {power}'] if power > {power} else []"

    saved = ", torch_ops=('aten::{}',)"
    files = {
        "reference": backend_file("reference", 1),
        "triton_impl": backend_file("triton", 2, limit(5) + saved.format("mul")),
        "cuda_impl": backend_file("cuda", 3, limit(3) + saved.format("add")),
    }
    op = replace(plant(folder, "planted_others", **files), save_when_checkpointing=True)
    ops = registry.choose({"scale": op}, "auto", {})
    reason = "first choice; triton for calls that it cannot serve"
    assert ops.table() == {"scale": {"backend": "cuda", "reason": reason}}
    for bundle in (ops, pickle.loads(pickle.dumps(ops))):
        compiled = torch.compile(bundle.scale, fullgraph=True, backend="eager")
        for function in (bundle.scale, compiled):
            assert [float(function(torch.ones(1), power=power)) for power in (3, 4)] == [3**3, 2**4]
        with pytest.raises(BackendUnavailable, match="'cuda' cannot serve: power above 3; nor triton: power above 5"):
            bundle.scale(torch.ones(1), power=6)
        assert [operator.name() for operator in bundle.saved_operators()] == ["aten::add", "aten::mul"]
    with pytest.raises(BackendUnavailable, match="power above 3"):
        registry.choose({"scale": op}, "cuda", {}).scale(torch.ones(1), power=4)
    for name, more in (("emulated", ", emulated=True"), ("absent", ", unavailable=lambda: ['no device']")):
        other = plant(folder, f"planted_others_{name}", **files | {"triton_impl": backend_file("triton", 2, more)})
        assert registry.choose({"scale": other}, "auto", {}).table()["scale"]["reason"] == "first choice"


def test_a_backend_is_frozen():
    with pytest.raises(AttributeError):
        Backend("reference", check).name = "other"


def test_machine_reasons(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in device.cuda_reasons()[0]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.cuda_reasons() == ["no CUDA device is visible"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a T4")
    assert device.cuda_reasons() == ["compute capability 7.5 of a T4 is below 8.0"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert device.cuda_reasons() == [] and "below 10.0" in device.cuda_reasons((10, 0))[0]


def test_triton_reasons(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for value, interpreted in (("0", False), ("1", True), ("", False)):
        monkeypatch.setenv("TRITON_INTERPRET", value)
        assert device.triton_interpreted() is interpreted
        assert bool(device.triton_reasons()) is not interpreted


class Layer(torch.nn.Module):
    """A module that was given its ops, as the models are."""

    def __init__(self, ops: kernels.Ops):
        super().__init__()
        self.ops = ops
        self.weight = torch.nn.Parameter(torch.linspace(0.5, 1.5, 8))

    def forward(self, x: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
        y = self.ops.adaln_rms_norm(x, self.weight, None, modulation, 1e-6)
        x, y = self.ops.gated_residual_adaln_rms_norm(x, y, modulation, self.weight, modulation, modulation, 1e-6)
        return x[..., :4] + self.ops.swiglu(y)


def test_a_model_with_its_ops_is_one_graph_and_follows_its_bundle():
    x, modulation = torch.linspace(-1, 1, 48).view(2, 3, 8), torch.linspace(0, 1, 16).view(2, 8)
    layer = Layer(kernels.select("auto"))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, modulation), layer(x, modulation))
    compiled(x, modulation).sum().backward()
    assert layer.weight.grad.isfinite().all() and list(layer.state_dict()) == ["weight"]


@torch._dynamo.config.patch(recompile_limit=8)  # its own: compiling a network raises it
def test_compiled_ops_do_not_share_a_limit_on_recompilations():
    """More graphs in all than torch makes of one function, and all of them compute what the ops do."""
    torch._dynamo.reset()
    ops, graphs = kernels.select("reference"), []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for name, op in kernels.OPS.items():
        function = getattr(ops, name)
        compiled = torch.compile(function, fullgraph=True, backend=counting)
        for case in [case for case in op.cases if not case.production][1:3]:
            inputs = case.inputs(torch.float32)
            got, want = outputs(op, compiled, inputs), outputs(op, function, inputs)
            assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want), name
    assert len(graphs) > torch._dynamo.config.recompile_limit
