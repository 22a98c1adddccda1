"""Entries in Inductor's table for every operator of ours, made before any graph is compiled."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

import kernels
from kernels.backends.device import cuda_reasons
from kernels.backends.operators import operator
from kernels.compile import modes
from kernels.compile.modes import compiled
from lightningdit.config import ModelConfig
from lightningdit.model import LightningDiT

ROOT = Path(__file__).parents[1]


def registered() -> list[torch._ops.OpOverload]:
    """Every operator of our namespace that this process knows."""
    names = [name.removeprefix("ldit::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("ldit::")]
    return [getattr(torch.ops.ldit, name.partition(".")[0]).default for name in names]


def test_every_operator_has_a_lowering():
    """Of all backends, and of the graph passes."""
    backends = [op.backend(name) for op in kernels.OPS.values() for name in op.backends]
    compiled(torch.nn.Identity(), "inductor")
    from torch._inductor.lowering import lowerings

    found = registered()
    assert {name for backend in backends for name in backend.torch_ops} <= {o._schema.name for o in found}
    assert not [str(overload) for overload in found if overload not in lowerings]


def test_an_operator_that_is_registered_later_has_one_too():
    from torch._inductor.lowering import lowerings

    compiled(torch.nn.Identity(), "inductor")

    @operator("test_registered_later")
    def registered_later(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x)

    assert registered_later._opoverload in lowerings


def test_whoever_compiles_without_us_has_them():
    """`torch.compile` of a model by its user: the lowerings are there once the first operator was traced."""
    code = """
import torch, kernels, lightningdit.model
from torch._inductor.lowering import lowerings

def look(graph, inputs):
    print(all(getattr(torch.ops.ldit, n[6:].partition(".")[0]).default in lowerings
              for n in torch._C._dispatch_get_all_op_names() if n.startswith("ldit::")))
    return graph.forward

torch.compile(kernels.select("triton").swiglu, fullgraph=True, backend=look)(torch.ones(2, 16))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stdout + done.stderr[-2000:]


@pytest.mark.parametrize("mode", ["none", "aot_eager"])
def test_modes_without_inductor_do_not_import_it(mode):
    code = f"""
import sys, torch
from kernels.compile.modes import compiled
from kernels.backends.device import cuda_reasons
compiled(torch.nn.Identity(), {mode!r})
print("torch._inductor.lowering" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stdout + done.stderr[-2000:]


KEPT = """
import json, torch
import kernels, kernels.compile.modes
from torch._dynamo.utils import counters

kernels.compile.modes.source_hash = lambda: SOURCES
function = kernels.compile.modes.compiled(kernels.select("triton").swiglu, "inductor")
function(torch.ones(2, 16))
print(json.dumps({name: counters["inductor"][f"fxgraph_cache_{name}"] for name in ("hit", "miss", "bypass")}))
"""


def kept(source_hash: str, folder: Path) -> dict[str, int]:
    """Cache hits and misses of a new process for an op that was compiled before, with sources of that hash."""
    environment = {name: value for name, value in os.environ.items() if name != modes.DIRECTORY}
    environment |= {"XDG_CACHE_HOME": str(folder), "TRITON_INTERPRET": "1"}
    code = KEPT.replace("SOURCES", repr(source_hash))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_next_process_finds_what_was_compiled_unless_the_kernels_changed(tmp_path):
    assert kept("one", tmp_path) == {"hit": 0, "miss": 1, "bypass": 0}
    assert (tmp_path / "lightningdit" / "inductor").is_dir()
    assert kept("one", tmp_path) == {"hit": 1, "miss": 0, "bypass": 0}
    assert kept("two", tmp_path) == {"hit": 0, "miss": 1, "bypass": 0}


def test_whoever_names_a_cache_keeps_it(monkeypatch, tmp_path):
    monkeypatch.setenv(modes.DIRECTORY, str(tmp_path))
    assert modes.cache_directory() == tmp_path


@pytest.mark.parametrize("home", ["file", "read-only", "", "relative"])
def test_a_home_that_cannot_be_used_leaves_inductor_its_own_folder(monkeypatch, tmp_path, home):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(modes.DIRECTORY, default_cache_dir())
    monkeypatch.setenv("HOME", "")
    (tmp_path / "file").write_text("no folder")
    if home == "read-only":
        monkeypatch.setattr(os, "access", lambda *asked: False)  # root may write anywhere
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / home) if home in ("file", "read-only") else home)
    assert modes.cache_directory() == Path(default_cache_dir())
    assert not (tmp_path / "relative").exists()


def test_a_user_without_a_name_may_compile(monkeypatch):
    def nobody():
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr("getpass.getuser", nobody)
    monkeypatch.setenv(modes.DIRECTORY, "/named")
    assert modes.cache_directory() == Path("/named")


class Two(torch.nn.Module):
    """Three regions of two kinds."""

    def __init__(self):
        super().__init__()
        self.regions = [torch.nn.Linear(3, 3), torch.nn.ReLU(), torch.nn.Linear(3, 3)]

    def forward(self, x):
        for region in self.regions:
            x = region(x)
        return x


def test_regions_of_one_kind_are_compiled_once():
    torch._dynamo.reset()
    module = Two()
    x = torch.randn(4, 3, requires_grad=True)
    want = module(x)
    counters.clear()
    modes.compile_module(module, "regional")
    assert torch.allclose(module(x), want, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 2


def test_only_modules_with_regions_are_compiled_by_region():
    with pytest.raises(ValueError, match="'regional', but Linear names no regions"):
        modes.compile_module(torch.nn.Linear(2, 2), "regional")
    with pytest.raises(ValueError, match="compile mode is 'regional'; allowed: none, inductor, cudagraphs"):
        compiled(print, "regional")


SMALL = ModelConfig(
    input_size=4,
    patch_size=1,
    in_channels=4,
    hidden_size=32,
    num_heads=2,
    depth=2,
    use_swiglu=True,
    use_rope=True,
    use_rmsnorm=True,
)


def gradients(mode: str, device: str = "cpu", dtype: torch.dtype = torch.float32, **changes) -> list[torch.Tensor]:
    """Those of a small network, compiled anew; the null label comes three times."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    ops = kernels.select("auto" if device == "cuda" else "reference")
    network = LightningDiT(SMALL.model_copy(update=changes), ops).train()
    torch.nn.init.normal_(network.final_layer.linear.weight)
    network = network.to(device, dtype)
    x, t, y = torch.randn(4, 4, 4, 4), torch.rand(4), torch.tensor([1000, 2, 1000, 1000])
    modes.compile_module(network, mode, ops)
    network(x.to(device), t.to(device), y.to(device)).square().mean().backward()
    return [p.grad for p in network.parameters() if p.requires_grad]


@pytest.mark.parametrize("recompute", [False, True])
def test_a_network_by_regions_gives_the_gradients_of_the_whole(recompute):
    whole, regional = (gradients(mode, use_checkpoint=recompute) for mode in ("none", "regional"))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(whole, regional, strict=True))


@pytest.mark.parametrize("mode", ["inductor", "regional"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_is_compiled_anew_gives_the_same_bits(device, mode):
    if device == "cuda" and (reasons := cuda_reasons()):
        pytest.skip("; ".join(reasons))
    dtype, changes = (torch.bfloat16, {}) if device == "cuda" else (torch.float32, {"depth": 1})  # g++ takes seconds
    first = gradients(mode, device, dtype, **changes)
    with torch._inductor.config.patch(force_disable_caches=True):
        second = gradients(mode, device, dtype, **changes)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kind", [True, 2, "pointwise"])
def test_checkpointing_in_a_compiled_graph_changes_no_gradient(kind):
    plain, recomputed = gradients("none"), gradients("inductor", use_checkpoint=kind)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(plain, recomputed, strict=True))
