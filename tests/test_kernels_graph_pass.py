"""Graph passes of ops: the nodes that they replace, and that the graph computes the same."""

import operator
import pickle
from collections import Counter

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd

import kernels
from kernels.compile.modes import compiled
from lightningdit.config import ModelConfig
from lightningdit.model import LightningDiT, SwiGLUMLP

graph_passes = pytest.importorskip("kernels.compile.graph_passes")
graph_pass = pytest.importorskip("kernels.weight_gradients.graph_pass")
GRAPH_PASS_OPS = [name for name, op in kernels.OPS.items() if op.graph_pass]
for op in ("swiglu", *GRAPH_PASS_OPS):
    pytest.importorskip(f"kernels.{op}.triton_impl")  # registers the operators
TOGETHER, PRODUCT = torch.ops.ldit.weight_gradients.default, torch.ops.aten.mm.default
FORWARD, BACKWARD = torch.ops.ldit.linear_swiglu.default, torch.ops.ldit.swiglu_linear_grad.default
SWIGLU, D_GATE_UP = torch.ops.ldit.swiglu_fwd.default, torch.ops.ldit.swiglu_bwd.default


def on_triton(*names: str) -> kernels.Ops:
    """A bundle in which these ops are Triton's, the others the reference."""
    return kernels.select("reference", **dict.fromkeys(names, "triton"))


def network(device: str, depth: int, width: int = 192, ops: kernels.Ops | None = None, **changes) -> LightningDiT:
    """A float16 one, none of whose weights is zero."""
    config = ModelConfig(
        input_size=4,
        patch_size=1,
        in_channels=4,
        hidden_size=width,
        depth=depth,
        num_classes=5,
        **{"num_heads": 3, "use_swiglu": True, "use_rope": True, "use_rmsnorm": True} | changes,
    )
    torch.manual_seed(0)
    found = LightningDiT(config, ops or kernels.select("reference"), torch.float16)
    for parameter in found.parameters():
        if parameter.requires_grad and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return found.to(device, torch.float16).train()


INPUTS = torch.linspace(-1, 1, 128).view(2, 4, 4, 4), torch.tensor([0.2, 0.7]), torch.tensor([1, 2])


def gradients(module: nn.Module, function, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    module.zero_grad()
    device = next(module.parameters()).device
    function(*(value.to(device) for value in inputs)).square().sum().backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def passed(module: nn.Module, ops: kernels.Ops, inputs=INPUTS) -> tuple[dict[str, torch.Tensor], Counter]:
    """Gradients by graphs that were rewritten, and how often each operator is in them, forward and backward."""
    found = Counter()

    def compiler(graph: fx.GraphModule, example_inputs):
        for option in graph_passes.inductor_options(ops).values():
            option(graph.graph)
        graph.graph.lint()
        graph.recompile()
        found.update(node.target for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=compiler, bw_compiler=compiler)
    function = torch.compile(module, fullgraph=True, dynamic=False, backend=backend)
    return gradients(module, function, *inputs), found


def assert_near(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    """Sums of 32 products, in another order, and what follows from their rounding."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert value.abs().max() > 1e-3, f"{name}: too small for float16 to tell anything"
        torch.testing.assert_close(got[name], value, rtol=0, atol=8e-3 * float(value.abs().max()), msg=name)


@pytest.mark.parametrize("changes", [{}, {"use_checkpoint": True}, {"use_swiglu": False}], ids=str)
def test_each_block_has_one_call(hopper, changes):
    module, ops = network(hopper, 2, **changes), on_triton("weight_gradients")
    without, before = passed(module, kernels.select("reference"))
    together, after = passed(module, ops)
    assert before[TOGETHER] == 0 and after[TOGETHER] == 2
    assert before[PRODUCT] - after[PRODUCT] == 4 * 2, "each call takes the place of four products"
    assert_near(together, without)


def test_widths_without_a_tile_are_left_to_the_library(hopper):
    """96 is narrower than one; 208·8/3 = 554 is no multiple of 8, which leaves qkv and proj of two blocks."""
    ops = on_triton("weight_gradients")
    assert passed(network(hopper, 2, width=96), ops)[1][TOGETHER] == 0
    module = network(hopper, 2, width=208, num_heads=2)
    assert module.config.mlp_hidden == 554 and passed(module, ops)[1][TOGETHER] == 1


def feed_forward(device: str, ops: kernels.Ops, kind: type = SwiGLUMLP, **changes) -> SwiGLUMLP:
    """Such a network by itself, in float16, whose results are as large as what it is given."""
    found = kind(network(device, 1, **changes).config, ops)
    for parameter in found.parameters():
        nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5)
    return found.to(device, torch.float16)


class Layers(nn.Module):
    """Linear layers one after the other, 136 wide."""

    def __init__(self, count: int):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(136, 136, bias=False) for _ in range(count))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


ROWS = torch.linspace(-40, 40, 24 * 192, dtype=torch.float16).view(1, 24, 192).sin()
TOKENS = torch.linspace(-1, 1, 24 * 136, dtype=torch.float16).view(24, 136).sin()


@pytest.mark.parametrize(("count", "calls"), [(3, 0), (4, 1), (7, 1), (8, 2)])
def test_layers_are_taken_four_at_a_time(hopper, count, calls):
    module = Layers(count).to(hopper, torch.float16)
    want = gradients(module, module, TOKENS)
    got, found = passed(module, on_triton("weight_gradients"), (TOKENS,))
    assert found[TOGETHER] == calls
    assert_near(got, want)


def test_a_product_that_the_graph_reads_stays_where_it_is():
    graph = fx.Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    transposed = graph.call_function(torch.ops.aten.permute.default, (a, [1, 0]))
    product = graph.call_function(PRODUCT, (transposed, b))
    viewed = graph.call_function(torch.ops.aten.view.default, (product, [-1]))
    graph.output((viewed,))
    assert graph_pass.is_weight_gradient(product) and graph_pass.factors(product) == (a, b)
    with graph.inserting_after(viewed):
        graph.call_function(torch.ops.aten.neg.default, (viewed,))
    assert not graph_pass.is_weight_gradient(product)
    assert not graph_pass.is_weight_gradient(transposed)


def backward_graph() -> tuple[fx.Graph, dict[str, fx.Node]]:
    """A product of [24, 16] and [16, 32], and the gradient of SwiGLU behind it, on `[2, 12, …]`."""
    graph, nodes = fx.Graph(), {}
    for name, shape in (("d_output", (24, 16)), ("weight", (16, 32)), ("gate_up", (2, 12, 64)), ("bias", (64,))):
        nodes[name] = graph.placeholder(name)
        nodes[name].meta["val"] = torch.empty(shape, dtype=torch.float16, device="meta")
    empty = nodes["bias"].meta["val"].new_empty
    nodes["product"] = graph_passes.call(graph, PRODUCT, nodes["d_output"], nodes["weight"], value=empty(24, 32))
    viewed = graph_passes.reshaped(graph, nodes["product"], (2, 12, 32))
    values = empty(2, 12, 64), empty(64)
    d_gate_up = graph_passes.call(graph, D_GATE_UP, viewed, nodes["gate_up"], nodes["bias"], True, value=values)
    nodes["d_gate_up"] = d_gate_up
    nodes["results"] = [graph_passes.call(graph, operator.getitem, d_gate_up, i, value=values[i]) for i in range(2)]
    return graph, nodes


@pytest.mark.parametrize("wanted", [False, True])
def test_a_product_that_somebody_else_wants_is_not_folded(wanted):
    graph, nodes = backward_graph()
    graph.output((*nodes["results"], *([nodes["product"]] if wanted else [])))
    graph_passes.GraphPasses({"swiglu_linear_grad": kernels.OPS["swiglu_linear_grad"].backend("triton")})(graph)
    found = Counter(node.target for node in graph.nodes if node.op == "call_function")
    assert (found[BACKWARD], found[D_GATE_UP], found[PRODUCT]) == ((0, 1, 1) if wanted else (1, 0, 0))
    (results,) = graph.output_node().args
    assert [graph_passes.value(node).shape for node in results[:2]] == [(2, 12, 64), (64,)]
    graph.lint()


def test_a_bias_whose_gradient_nobody_asks_for_is_left_alone():
    graph, nodes = backward_graph()
    nodes["d_gate_up"].update_arg(3, False)
    graph.output(tuple(nodes["results"]))
    graph_passes.GraphPasses({"swiglu_linear_grad": kernels.OPS["swiglu_linear_grad"].backend("triton")})(graph)
    assert D_GATE_UP in {node.target for node in graph.nodes}


def test_what_is_a_transpose():
    graph, aten = fx.Graph(), torch.ops.aten
    a = graph.placeholder("a")
    for target, dims in ((aten.t.default, ()), (aten.permute.default, ([1, 0],)), (aten.transpose.int, (1, 0))):
        assert graph_passes.transpose_input(graph.call_function(target, (a, *dims))) is a
    for target, dims in ((aten.permute.default, ([0, 1],)), (aten.transpose.int, (0, 2)), (aten.neg.default, ())):
        assert graph_passes.transpose_input(graph.call_function(target, (a, *dims))) is None


@pytest.mark.parametrize("changes", [{}, {"use_checkpoint": True}, {"use_checkpoint": "pointwise"}], ids=str)
def test_a_feed_forward_network_is_two_calls(hopper, changes):
    """One for up-projection and activation, one for both gradients; each takes the place of a product and a pass."""
    folded = on_triton("swiglu", "linear_swiglu", "swiglu_linear_grad")
    module = network(hopper, 2, ops=folded, **changes)
    apart, before = passed(module, on_triton("swiglu"))
    got, after = passed(module, folded)
    again = 2 * (changes.get("use_checkpoint") is True)  # forward once more
    assert after[FORWARD] == 2 + again and after[SWIGLU] == before[SWIGLU] - after[FORWARD]
    assert after[BACKWARD] == 2 and after[D_GATE_UP] == 0 and before[D_GATE_UP] == 2
    assert before[PRODUCT] - after[PRODUCT] == 4 + again
    assert_near(got, apart)


def test_all_of_them_together(hopper):
    every = on_triton("swiglu", *GRAPH_PASS_OPS)
    module = network(hopper, 2, ops=every)
    got, after = passed(module, every)
    assert (after[FORWARD], after[BACKWARD], after[TOGETHER]) == (2, 2, 2)
    assert_near(got, passed(module, on_triton("swiglu"))[0])


def test_what_a_graph_pass_must_not_take(hopper):
    """A product that is wanted elsewhere, a layer that adds its own bias, rows that begin anywhere."""
    folded = on_triton("swiglu", "linear_swiglu", "swiglu_linear_grad")

    class Watched(SwiGLUMLP):
        def forward(self, x):
            gate_up = self.w12(x)
            activated = self.ops.swiglu(gate_up, bias=self.w12.deferred_bias)
            return self.w3(activated) + activated[..., : x.shape[-1]]

    module, x = feed_forward(hopper, folded, Watched), ROWS
    got, found = passed(module, folded, (x,))
    assert (found[FORWARD], found[BACKWARD], found[D_GATE_UP]) == (1, 0, 1)
    assert_near(got, gradients(module, module, x))
    module.w12.defer_bias = False
    assert passed(module, folded, (x,))[1][FORWARD] == 0
    odd = feed_forward(hopper, folded, width=208, num_heads=2)
    found = passed(odd, folded, (torch.ones(1, 24, 208, dtype=torch.float16),))[1]
    assert (found[FORWARD], found[BACKWARD], found[SWIGLU], found[D_GATE_UP]) == (0, 0, 1, 1)


def test_with_inductor(hopper):
    """Its decompositions, its own passes and its cache's key."""
    every = on_triton("swiglu", *GRAPH_PASS_OPS)
    two = nn.Sequential(feed_forward(hopper, every), feed_forward(hopper, every))
    calls, rewrite = Counter(), graph_passes.GraphPasses.__call__

    def counted(self, graph):
        rewrite(self, graph)
        calls.update(node.target for node in graph.nodes if node.target in (TOGETHER, FORWARD, BACKWARD))

    with pytest.MonkeyPatch.context() as patch, torch._inductor.config.patch(force_disable_caches=True):
        patch.setattr(graph_passes.GraphPasses, "__call__", counted)
        torch._dynamo.reset()
        got = gradients(two, compiled(two, "inductor", every), ROWS)
    assert calls == {TOGETHER: 1, FORWARD: 2, BACKWARD: 2}
    assert_near(got, gradients(two, two, ROWS))


def test_who_is_asked(hopper):
    """Only a bundle whose backends can serve changes what Inductor does; the pass names the code it stands for."""
    for choice in ("auto", "reference", "cuda"):
        assert graph_passes.inductor_options(kernels.select(choice)) == {}, choice
    one, three = (graph_passes.inductor_options(on_triton(*names)) for names in (("weight_gradients",), GRAPH_PASS_OPS))
    (one,), (three,) = one.values(), three.values()
    assert list(one.backends) == ["weight_gradients"] and list(three.backends) == GRAPH_PASS_OPS
    assert pickle.loads(pickle.dumps(one.uuid())) == one.uuid() != three.uuid()


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="compile mode is 'fast'; allowed: none, inductor"):
        compiled(print, "fast")
    assert compiled(print, "none") is print
