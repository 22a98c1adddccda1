"""The graph pass that puts ops in the place of nodes of a compiled graph that no function of a model has together.

Such an op's folder has a file `graph_pass.py`, whose `rewrite(graph, backend)` finds those nodes and replaces them by
calls of the backend's operator. It is called once for the graph of each pass, forward and backward.
"""

from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.pattern_matcher import stable_topological_sort
from torch.fx.node import Argument

from kernels import OPS
from kernels.registry import Backend, Ops

aten = torch.ops.aten
#: Operators that return a view of the same elements in the same order.
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
TRANSPOSES = (aten.t.default, aten.permute.default, aten.transpose.int)


class GraphPasses(CustomGraphPass):
    """The pass given to Inductor: the `graph_pass.py` of every op in `backends`, each registering one operator."""

    def __init__(self, backends: Mapping[str, Backend]):
        self.backends = dict(backends)

    def __call__(self, graph: fx.Graph) -> None:
        for name, backend in self.backends.items():
            import_module(f"kernels.{name}.graph_pass").rewrite(graph, backend)
        stable_topological_sort(graph)

    def uuid(self) -> Any:
        """A hash of the code of the passes, by which Inductor finds graphs that it has compiled before."""
        here = Path(__file__)
        files = [here, *(file for name in self.backends for file in sorted((here.parents[1] / name).glob("*.py")))]
        return get_hash_for_files(tuple(map(str, files))), tuple(self.backends)


def inductor_options(ops: Ops) -> dict[str, Any]:
    """Options for `torch.compile` with Inductor; none where the bundle has no kernels for such ops."""
    chosen = {name: ops.backend(name) for name, op in OPS.items() if op.graph_pass}
    backends = {name: backend for name, backend in chosen.items() if backend is not None and backend.torch_ops}
    return {"post_grad_custom_pre_pass": GraphPasses(backends)} if backends else {}


def operator(name: str) -> torch._ops.OpOverload:
    """The operator that is registered as `namespace::name`."""
    namespace, name = name.split("::")
    return getattr(getattr(torch.ops, namespace), name).default


def call(graph: fx.Graph, target: Any, *args: Any, value: Any) -> fx.Node:
    """A node that calls `target`; `value` has shape, dtype and strides of its result."""
    node = graph.call_function(target, args)
    node.meta["val"] = value
    return node


def value(node: Argument) -> torch.Tensor:
    """The node's result as a tensor without memory: its shape, dtype and strides."""
    assert isinstance(node, fx.Node)
    return node.meta["val"]


def reshaped(graph: fx.Graph, node: fx.Node, shape: tuple[int, ...]) -> fx.Node:
    return call(graph, aten.view.default, node, list(shape), value=value(node).view(shape))


def transpose_input(node: Argument) -> fx.Node | None:
    """The matrix that this node transposes; None if it is no transpose."""
    assert isinstance(node, fx.Node)
    source, *dims = node.args or [None]
    if node.target is aten.t.default or (node.target in TRANSPOSES and dims in ([[1, 0]], [0, 1], [1, 0])):
        assert isinstance(source, fx.Node)
        return source
    return None


def through_views(node: Argument) -> Iterator[fx.Node]:
    """The node and, while it is a view that keeps the last dimension, the nodes it is a view of."""
    assert isinstance(node, fx.Node)
    yield node
    if node.target in VIEWS and value(node.args[0]).shape[-1] == value(node).shape[-1]:
        yield from through_views(node.args[0])


def only_returned(node: fx.Node) -> bool:
    """Whether the graph returns the node, through views at most, and no node of it reads its values."""
    return all(
        user.op == "output" or (user.target in VIEWS + TRANSPOSES and only_returned(user)) for user in node.users
    )
