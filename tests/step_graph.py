"""The traced graphs of a network's forward and backward pass, and what in them passes over all tokens."""

from collections import Counter
from dataclasses import dataclass

import torch
from functorch.compile import make_boxed_func
from torch import fx
from torch._dynamo.backends.common import aot_autograd

# Nodes that only rename memory; `_unsafe_view` follows a product or a copy, which is counted.
VIEWS = frozenset({torch.ops.aten._unsafe_view.default, torch.ops.aten.detach.default, torch.ops.aten.alias.default})


@dataclass(frozen=True)
class StepGraphs:
    """The graph of each pass, as `torch.compile` hands it to a compiler."""

    forward: fx.GraphModule
    backward: fx.GraphModule


def trace(network: torch.nn.Module, *inputs: torch.Tensor) -> StepGraphs:
    """Trace the network and its backward pass, computing neither; raises where the graph would break."""
    graphs = {}

    def keep(name: str):
        def compiler(graph: fx.GraphModule, example_inputs):
            graphs[name] = graph
            return make_boxed_func(lambda *_: _zeros_of_results(graph))

        return compiler

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=keep("forward"), bw_compiler=keep("backward"))
    torch.compile(network, fullgraph=True, dynamic=False, backend=backend)(*inputs).square().mean().backward()
    return StepGraphs(**graphs)


def _zeros_of_results(graph: fx.GraphModule) -> list:
    """What stands for the graph's results, so that the caller goes on to the next pass."""
    (results,) = graph.graph.output_node().args
    metas = [result.meta["val"] if isinstance(result, fx.Node) else result for result in results]
    return [torch.zeros(m.shape, dtype=m.dtype, device=m.device) if isinstance(m, torch.Tensor) else m for m in metas]


def passes(graph: fx.GraphModule, tokens: int) -> Counter[str]:
    """Operator name → how many of its nodes read or write a tensor with a number or more for each of the tokens."""
    return Counter(str(node.target) for node in graph.graph.nodes if _works(node) and _largest(node) >= tokens)


def moved_bytes(graph: fx.GraphModule, tokens: int) -> int:
    """Bytes that those nodes read and write if each reads its inputs once and writes its outputs once."""
    nodes = [node for node in graph.graph.nodes if _works(node) and _largest(node) >= tokens]
    return sum(t.numel() * t.element_size() for node in nodes for t in _tensors(node))


def _works(node: fx.Node) -> bool:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    return not node.target.is_view and node.target not in VIEWS


def _tensors(node: fx.Node) -> list[torch.Tensor]:
    values = [argument.meta.get("val") for argument in node.all_input_nodes]
    result = node.meta.get("val")
    values += result if isinstance(result, tuple | list) else [result]
    return [value for value in values if isinstance(value, torch.Tensor)]


def _largest(node: fx.Node) -> int:
    return max((tensor.numel() for tensor in _tensors(node)), default=0)
