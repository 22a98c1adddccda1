"""Graph pass that replaces the weight gradients of a block, in a compiled backward pass, by one `weight_gradients`.

Autograd computes the gradient of each weight as soon as it can, so no function that a model could call has several of
them at hand. A product counts as a weight gradient if its first factor is the transpose of a tensor of tokens, and if
the graph only returns it.
"""

from collections.abc import Iterator

from torch import fx

from kernels.compile.graph_passes import aten, call, only_returned, operator, reshaped, transpose_input, value
from kernels.registry import Backend

#: Layers taken together: in the order of a backward pass, those of a transformer block.
LAYERS = 4
#: Narrower weights are left out: they fill no tile.
NARROWEST = 128


def rewrite(graph: fx.Graph, backend: Backend) -> None:
    """The operands of the first of `LAYERS` products stay in memory until those of the last are there."""
    for products in list(groups(graph, backend)):
        _replace(graph, products, backend)


def groups(graph: fx.Graph, backend: Backend) -> Iterator[list[fx.Node]]:
    """The weight gradients of a backward pass that the backend takes, `LAYERS` at a time with as many tokens."""
    waiting: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        if not is_weight_gradient(node) or min(value(node).shape) < NARROWEST:
            continue
        d_output, x = map(value, factors(node))
        if not backend.supports([d_output], [x]):
            continue
        group = waiting.setdefault(len(x), [])
        group.append(node)
        if len(group) == LAYERS:
            yield waiting.pop(len(x))


def is_weight_gradient(node: fx.Node) -> bool:
    return node.target is aten.mm.default and transpose_input(node.args[0]) is not None and only_returned(node)


def factors(product: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The gradient of a layer's result and its input, `[tokens, width]` each."""
    d_output, x = transpose_input(product.args[0]), product.args[1]
    assert d_output is not None and isinstance(x, fx.Node)  # see is_weight_gradient
    return d_output, x


def _replace(graph: fx.Graph, products: list[fx.Node], backend: Backend) -> None:
    d_outputs, inputs = zip(*map(factors, products), strict=True)
    shapes = [tuple(value(product).shape) for product in products]
    with graph.inserting_before(products[-1]):
        numbers = value(products[0]).new_empty(sum(out * inner for out, inner in shapes))
        flat = call(graph, operator(*backend.torch_ops), list(d_outputs), list(inputs), value=numbers)
        begin = 0
        for product, (out, inner) in zip(products, shapes, strict=True):
            end = begin + out * inner
            piece = call(graph, aten.slice.Tensor, flat, 0, begin, end, value=numbers[begin:end])
            product.replace_all_uses_with(reshaped(graph, piece, (out, inner)))
            begin = end
    for product in products:
        graph.erase_node(product)
