"""Graph pass that replaces the gradient through a linear layer and `swiglu` by one `swiglu_linear_grad`."""

import operator as python

import torch
from torch import fx

import kernels.swiglu.triton_impl  # noqa: F401  registers the operator looked for
from kernels.compile.graph_passes import aten, call, operator, reshaped, through_views, value
from kernels.registry import Backend


def rewrite(graph: fx.Graph, backend: Backend) -> None:
    for d_gate_up in graph.find_nodes(op="call_function", target=torch.ops.ldit.swiglu_bwd.default):
        d_out, gate_up, bias, summed = d_gate_up.args
        chain = list(through_views(d_out))
        product = chain[-1]
        if product.target is not aten.mm.default or any(len(node.users) > 1 for node in chain):
            continue  # the product has another user
        if summed != (bias is not None):
            continue
        d_output, weight = product.args
        known = [value(node).flatten(0, -2) for node in (d_output, weight, gate_up)]
        vector = None if bias is None else value(bias)
        if backend.supports(*known, bias=vector):
            _replace(graph, d_gate_up, (d_output, weight, gate_up, bias), backend)
            for node in chain:
                graph.erase_node(node)


def _replace(graph: fx.Graph, d_gate_up: fx.Node, args: tuple, backend: Backend) -> None:
    d_output, weight, gate_up, bias = args
    shape = tuple(value(gate_up).shape)
    with graph.inserting_before(d_gate_up):
        flat = reshaped(graph, gate_up, (len(value(d_output)), shape[-1]))
        empty = value(flat).new_empty
        values = empty(tuple(value(flat).shape)), empty(0) if bias is None else value(bias).new_empty(shape[-1])
        both = call(graph, operator(*backend.torch_ops), d_output, weight, flat, bias, value=values)
        flat_d_gate_up, d_bias = (call(graph, python.getitem, both, i, value=values[i]) for i in range(2))
        results = reshaped(graph, flat_d_gate_up, shape), d_bias
    for user in list(d_gate_up.users):
        _, index = user.args
        assert isinstance(index, int)  # the operator has two results
        user.replace_all_uses_with(results[index])
        graph.erase_node(user)
    graph.erase_node(d_gate_up)
