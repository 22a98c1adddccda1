"""Graph pass that replaces a linear layer and the `swiglu` behind it by one `linear_swiglu`."""

import operator as python

import torch
from torch import fx

import kernels.swiglu.triton_impl  # noqa: F401  registers the operator looked for
from kernels.compile.graph_passes import aten, call, operator, reshaped, through_views, transpose_input, value
from kernels.registry import Backend


def rewrite(graph: fx.Graph, backend: Backend) -> None:
    for activation in graph.find_nodes(op="call_function", target=torch.ops.ldit.swiglu_fwd.default):
        *_, product = through_views(activation.args[0])
        if product.target is aten.mm.default and (weight := transpose_input(product.args[1])) is not None:
            x, bias = product.args[0], activation.args[1]
            vector = None if bias is None else value(bias)
            if backend.supports(value(x), value(weight), bias=vector):
                _replace(graph, product, activation, (x, weight, bias), backend)


def _replace(graph: fx.Graph, product: fx.Node, activation: fx.Node, args: tuple, backend: Backend) -> None:
    rows, hidden = len(value(product)), value(activation).shape[-1]
    with graph.inserting_before(activation):
        values = tuple(value(product).new_empty(rows, width) for width in (2 * hidden, hidden))
        both = call(graph, operator(*backend.torch_ops), *args, value=values)
        gate_up, activated = (call(graph, python.getitem, both, i, value=values[i]) for i in range(2))
        activated = reshaped(graph, activated, tuple(value(activation).shape))
    product.replace_all_uses_with(gate_up)
    activation.replace_all_uses_with(activated)
    graph.erase_node(activation)
    graph.erase_node(product)
