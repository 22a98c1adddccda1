"""Finds weight gradients in a compiled backward pass and lets `weight_gradients` compute those of a block in one call.

Autograd asks for the gradient of each weight as soon as it can, so no function that a model could call has several of
them at hand; the graph of the whole backward pass has them all. One is taken for a weight gradient if it is the product
of a transposed tensor of tokens with another one, and if nobody but the caller of the graph wants it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.pattern_matcher import stable_topological_sort

from kernels.registry import Backend, Ops

aten = torch.ops.aten
#: Layers taken together: in the order of a backward pass, those of a transformer block.
LAYERS = 4
#: Narrower weights are left out: they fill no tile.
NARROWEST = 128
#: What only names memory anew on the way to the graph's results.
VIEWS = (aten.t.default, aten.permute.default, aten.transpose.int, aten.view.default, aten.reshape.default)


class TakeTogether(CustomGraphPass):
    """Replaces weight gradients, `LAYERS` at a time, by a call of the backend's operator.

    The operands of the first stay in memory until those of the last are there.
    """

    def __init__(self, backend: Backend):
        self.backend = backend

    def __call__(self, graph: fx.Graph) -> None:
        for products in list(groups(graph, self.backend)):
            self._replace(graph, products)
        stable_topological_sort(graph)

    def uuid(self) -> Any:
        """Of this file and of the backend's, by which Inductor knows graphs it has compiled before."""
        return get_hash_for_files(tuple(map(str, sorted(Path(__file__).parent.glob("*.py"))))), self.backend.torch_ops

    def _replace(self, graph: fx.Graph, products: list[fx.Node]) -> None:
        d_outputs, inputs = zip(*map(factors, products), strict=True)
        (name,) = self.backend.torch_ops
        namespace, operator = name.split("::")
        target = getattr(getattr(torch.ops, namespace), operator).default
        with graph.inserting_before(products[-1]):
            shapes = [tuple(node.meta["val"].shape) for node in products]
            flat = graph.call_function(target, (list(d_outputs), list(inputs)))
            flat.meta["val"] = products[0].meta["val"].new_empty(sum(out * inner for out, inner in shapes))
            begin = 0
            for product, (out, inner) in zip(products, shapes, strict=True):
                piece = graph.call_function(aten.slice.Tensor, (flat, 0, begin, begin + out * inner))
                piece.meta["val"] = flat.meta["val"][begin : begin + out * inner]
                weight = graph.call_function(aten.view.default, (piece, [out, inner]))
                weight.meta = product.meta | {"val": piece.meta["val"].view(out, inner)}
                product.replace_all_uses_with(weight)
                begin += out * inner
        for product in products:
            graph.erase_node(product)


def groups(graph: fx.Graph, backend: Backend) -> Iterator[list[fx.Node]]:
    """The weight gradients of a backward pass that the backend takes, `LAYERS` at a time with as many tokens."""
    waiting: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        if not is_weight_gradient(node) or min(node.meta["val"].shape) < NARROWEST:
            continue
        d_output, x = (factor.meta["val"] for factor in factors(node))
        if d_output.dtype not in backend.dtypes or backend.unsupported([d_output], [x]):
            continue
        group = waiting.setdefault(len(x), [])
        group.append(node)
        if len(group) == LAYERS:
            yield waiting.pop(len(x))


def is_weight_gradient(node: fx.Node) -> bool:
    return node.target is aten.mm.default and transposed(node.args[0]) and leads_out(node)


def factors(product: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The gradient of a layer's result and its input, `[tokens, width]` each."""
    return product.args[0].args[0], product.args[1]


def transposed(node: fx.Node) -> bool:
    if node.target is aten.t.default:
        return True
    return node.target is aten.permute.default and list(node.args[1]) == [1, 0]


def leads_out(node: fx.Node) -> bool:
    """Whether nothing in the graph reads its values."""
    return all(user.op == "output" or (user.target in VIEWS and leads_out(user)) for user in node.users)


def inductor_options(ops: Ops) -> dict[str, Any]:
    """What `torch.compile` with Inductor is told: nothing where the bundle leaves these products to the library."""
    backend = ops.backend("weight_gradients")
    if backend is None or not backend.torch_ops:
        return {}
    return {"post_grad_custom_pre_pass": TakeTogether(backend)}
