"""What ops make of a compiled graph: some take the place of nodes that no function of a model has together.

Such an op's folder has a file `graph_pass.py`, whose `rewrite(graph, backend)` finds those nodes and puts calls of the
backend's operator in their place. It is asked once for the graph of each pass, forward and backward.
"""

from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.pattern_matcher import stable_topological_sort

from kernels import OPS
from kernels.registry import Backend, Ops

aten = torch.ops.aten
#: What only says how memory is read.
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
TURNS = (aten.t.default, aten.permute.default, aten.transpose.int)


class Rewriting(CustomGraphPass):
    """The pass that Inductor is given: `backends` by op, each of which registers one operator."""

    def __init__(self, backends: Mapping[str, Backend]):
        self.backends = dict(backends)

    def __call__(self, graph: fx.Graph) -> None:
        for name, backend in self.backends.items():
            import_module(f"kernels.{name}.graph_pass").rewrite(graph, backend)
        stable_topological_sort(graph)

    def uuid(self) -> Any:
        """Of the code that rewrites, by which Inductor knows graphs it has compiled before."""
        here = Path(__file__)
        files = [here, *(file for name in self.backends for file in sorted((here.parents[1] / name).glob("*.py")))]
        return get_hash_for_files(tuple(map(str, files))), tuple(self.backends)


def inductor_options(ops: Ops) -> dict[str, Any]:
    """What `torch.compile` with Inductor is told: nothing where the bundle has no kernels for such ops."""
    chosen = {name: ops.backend(name) for name, op in OPS.items() if op.graph_pass}
    backends = {name: backend for name, backend in chosen.items() if backend is not None and backend.torch_ops}
    return {"post_grad_custom_pre_pass": Rewriting(backends)} if backends else {}


def operator(name: str) -> torch._ops.OpOverload:
    """The operator that is registered as `namespace::name`."""
    namespace, name = name.split("::")
    return getattr(getattr(torch.ops, namespace), name).default


def call(graph: fx.Graph, target: Any, *args: Any, value: Any) -> fx.Node:
    """A node that calls `target`; `value` has shape, dtype and strides of its result."""
    node = graph.call_function(target, args)
    node.meta["val"] = value
    return node


def value(node: fx.Node) -> torch.Tensor:
    """A tensor without memory that tells what the node gives."""
    return node.meta["val"]


def reshaped(graph: fx.Graph, node: fx.Node, shape: tuple[int, ...]) -> fx.Node:
    return call(graph, aten.view.default, node, list(shape), value=value(node).view(shape))


def turned(node: fx.Node) -> fx.Node | None:
    """The matrix that this node is the transpose of; None if it is no transpose."""
    dims = node.args[1:]
    if node.target is aten.t.default or (node.target in TURNS and (dims == ([1, 0],) or sorted(dims) == [0, 1])):
        return node.args[0]
    return None


def before_views(node: fx.Node) -> Iterator[fx.Node]:
    """The node and, as far as it is a view that leaves the last dimension as it is, those it is a view of."""
    yield node
    while node.target in VIEWS and value(node.args[0]).shape[-1] == value(node).shape[-1]:
        node = node.args[0]
        yield node


def leads_out(node: fx.Node) -> bool:
    """Whether nothing in the graph reads its values."""
    return all(user.op == "output" or (user.target in VIEWS + TURNS and leads_out(user)) for user in node.users)
