"""What `kernels.compilation` adds to a compiler: an entry in Inductor's table for every operator, before any graph."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from kernels.compilation import compiled
from kernels.operators import operator

ROOT = Path(__file__).parents[1]


def registered() -> list[torch._ops.OpOverload]:
    """Every operator of our namespace that this process knows."""
    names = [name.removeprefix("ldit::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("ldit::")]
    return [getattr(torch.ops.ldit, name.partition(".")[0]).default for name in names]


def test_every_operator_has_a_lowering():
    """Of all backends, those of the models beside them, and those that take the place of nodes in a graph."""
    import lightningdit.model  # noqa: F401  has one of its own

    backends = [op.backend(name) for op in kernels.OPS.values() for name in op.backends]
    compiled(torch.nn.Identity(), "inductor")
    from torch._inductor.lowering import lowerings

    found = registered()
    assert {name for backend in backends for name in backend.torch_ops} < {o._schema.name for o in found}
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
from kernels.compilation import compiled
compiled(torch.nn.Identity(), {mode!r})
print("torch._inductor.lowering" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stdout + done.stderr[-2000:]
