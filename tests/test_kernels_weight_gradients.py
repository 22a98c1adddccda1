"""Weight gradients of several layers at once: tiles, launches, and which products of a graph they are."""

import pickle
from collections import Counter

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd

import kernels
from kernels.compilation import compiled
from kernels.device import triton_reasons
from kernels.triton_launch import INTERPRETED
from kernels.weight_gradients import graph_pass
from lightningdit.config import ModelConfig
from lightningdit.model import LightningDiT
from tests.kernel_launches import launches

impl = pytest.importorskip("kernels.weight_gradients.triton_impl")
OP = kernels.OPS["weight_gradients"]
DEVICE = "cpu" if INTERPRETED else "cuda"
XL = [(3456, 1152), (1152, 1152), (6144, 1152), (1152, 3072)]
B = [(2304, 768), (768, 768), (4096, 768), (768, 2048)]
CALL, PRODUCT = torch.ops.ldit.weight_gradients.default, torch.ops.aten.mm.default


# Tiles and launches


def test_tiles_of_the_largest_model_fill_their_waves():
    """648 tiles of 128 × 192 in five waves of 132: 98 % of what the processors could do."""
    tiles = sum(impl.TILE.count(*pair) for pair in XL)
    assert tiles == 648 and all(out % impl.TILE.rows == 0 == inner % impl.TILE.width for out, inner in XL)
    assert tiles / (-(-tiles // 132) * 132) == pytest.approx(0.98, abs=2e-3)


@pytest.mark.parametrize(("widths", "tokens"), [(XL, 32_768), (B, 32_768), (B, 65_536), ([(128, 192)], 32_768)])
@pytest.mark.parametrize("arch", [90, 100])
def test_parts_keep_processors_busy(widths, tokens, arch):
    """No other number of parts would end sooner, by waves alone, by more than its sums in parts cost."""
    tiles, processors = sum(impl.TILE.count(*pair) for pair in widths), impl.PROCESSORS[arch]
    numbers = sum(out * inner for out, inner in widths)

    def waves(parts: int) -> float:
        return -(-tiles * parts // processors) / parts

    chosen = impl.parts(widths, tokens, arch)
    wave = 2 * 128 * 192 * tokens * processors / impl.PRODUCTS
    for other in range(1, impl.MOST_PARTS + 1):
        gain = (waves(chosen) - waves(other)) * wave
        assert gain <= (other > 1) * numbers * (8 * other + 2) / impl.TRAFFIC + 1e-12, other


def test_parts_of_known_shapes():
    assert impl.parts(XL, 32_768, 90) == 1, "five full waves"
    assert impl.parts(B, 32_768, 90) > 1, "2.2 waves would take the time of three"
    assert impl.parts([(128, 192)], 32_768, 90) == impl.MOST_PARTS, "one tile for all processors"
    assert impl.parts([(128, 192)], 1500, 90) == 1, "a part has at least 1024 tokens"


@pytest.mark.parametrize(
    ("case", "names"),
    [("XL", ["weight_gradients_kernel"]), ("B", ["weight_gradients_kernel", "weight_gradients_sum_kernel"])],
)
def test_one_launch_for_all_layers(case, names):
    found, _ = launches(OP, next(c for c in OP.cases if c.id == case), torch.bfloat16)
    assert [launch.kernel.__name__ for launch in found] == names
    tiles, parts = found[0].grid
    widths = {"XL": XL, "B": B}[case]
    assert tiles == sum(impl.TILE.count(*pair) for pair in widths) and parts == impl.parts(widths, 32_768, 90)
    each = found[0].args[-2]
    assert each % impl.TILE.depth == 0 and (parts - 1) * each < 32_768 <= parts * each


def test_what_the_accelerator_cannot_read_is_refused():
    rows = torch.zeros(4, 8, dtype=torch.float16, device=DEVICE)
    assert impl.unsupported([rows], [rows]) == []
    assert "width 6 is no multiple of 8" in impl.unsupported([rows], [rows[:, :6]])[0]
    assert "5 layers are more than 4" in impl.unsupported([rows] * 5, [rows] * 5)[0]
    assert "torch.float32" in impl.unsupported([rows.float()], [rows.float()])[0]


def test_tensors_may_begin_anywhere():
    """Descriptors take addresses that are multiples of 16 bytes: others are copied."""
    ops = usable()
    memory = torch.randn(16 * 8 + 1, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.float16)
    d_output, x = memory[1:].view(16, 8), memory[:-1].view(16, 8)
    (got,) = ops.weight_gradients([d_output], [x])
    torch.testing.assert_close(got, d_output.t() @ x, rtol=2e-3, atol=2e-3)


# In a compiled backward pass


def usable() -> kernels.Ops:
    if reasons := triton_reasons(impl.BACKEND.minimum):
        pytest.skip("; ".join(reasons))
    return kernels.select("reference", weight_gradients="triton")


def network(depth: int, width: int = 192, **changes) -> LightningDiT:
    """A float16 one, none of whose weights is zero."""
    config = ModelConfig(input_size=4, patch_size=1, in_channels=4, hidden_size=width, depth=depth, num_classes=5,
                         **{"num_heads": 3, "use_swiglu": True, "use_rope": True, "use_rmsnorm": True} | changes)
    torch.manual_seed(0)
    found = LightningDiT(config, usable(), torch.float16)
    for parameter in found.parameters():
        if parameter.requires_grad and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return found.to(DEVICE, torch.float16).train()


INPUTS = torch.linspace(-1, 1, 128).view(2, 4, 4, 4), torch.tensor([0.2, 0.7]), torch.tensor([1, 2])


def gradients(module: nn.Module, function, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    module.zero_grad()
    function(*(value.to(DEVICE) for value in inputs)).square().mean().backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def passed(module: nn.Module, ops: kernels.Ops, inputs=INPUTS) -> tuple[dict[str, torch.Tensor], Counter]:
    """Gradients by a graph to which the pass was applied, and how often each operator is in it."""
    found = Counter()

    def compiler(graph: fx.GraphModule, example_inputs):
        for option in graph_pass.inductor_options(ops).values():
            option(graph.graph)
        graph.graph.lint()
        graph.recompile()
        found.update(node.target for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph.forward), bw_compiler=compiler)
    function = torch.compile(module, fullgraph=True, dynamic=False, backend=backend)
    return gradients(module, function, *inputs), found


def assert_near(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    """Sums of 32 products, in another order, and what follows from their rounding."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=8e-3 * float(value.abs().max()), msg=name)


@pytest.mark.parametrize("changes", [{}, {"use_checkpoint": True}, {"use_swiglu": False}], ids=str)
def test_each_block_has_one_call(changes):
    module, ops = network(2, **changes), usable()
    without, before = passed(module, kernels.select("reference"))
    together, after = passed(module, ops)
    assert before[CALL] == 0 and after[CALL] == 2
    assert before[PRODUCT] - after[PRODUCT] == 4 * 2, "each call takes the place of four products"
    assert_near(together, without)


def test_widths_without_a_tile_are_left_to_the_library():
    """96 is narrower than one; 208·8/3 = 554 is no multiple of 8, which leaves qkv and proj of two blocks."""
    ops = usable()
    assert passed(network(2, width=96), ops)[1][CALL] == 0
    module = network(2, width=208, num_heads=2)
    assert module.config.mlp_hidden == 554 and passed(module, ops)[1][CALL] == 1


class Layers(nn.Module):
    """Linear layers one after the other, 136 wide; the last one's weight is used a second time."""

    def __init__(self, count: int):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(136, 136, bias=False) for _ in range(count))
        self.to(DEVICE, torch.float16)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


TOKENS = torch.linspace(-1, 1, 24 * 136, dtype=torch.float16).view(24, 136).sin()


@pytest.mark.parametrize(("count", "calls"), [(3, 0), (4, 1), (7, 1), (8, 2)])
def test_layers_are_taken_four_at_a_time(count, calls):
    module = Layers(count)
    want = gradients(module, module, TOKENS)
    got, found = passed(module, usable(), (TOKENS,))
    assert found[CALL] == calls
    assert_near(got, want)


def test_a_product_that_the_graph_reads_stays_where_it_is():
    graph = fx.Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    turned = graph.call_function(torch.ops.aten.permute.default, (a, [1, 0]))
    product = graph.call_function(PRODUCT, (turned, b))
    viewed = graph.call_function(torch.ops.aten.view.default, (product, [-1]))
    graph.output((viewed,))
    assert graph_pass.is_weight_gradient(product) and graph_pass.factors(product) == (a, b)
    with graph.inserting_after(viewed):
        graph.call_function(torch.ops.aten.neg.default, (viewed,))
    assert not graph_pass.is_weight_gradient(product)
    assert not graph_pass.is_weight_gradient(turned)
    assert not graph_pass.transposed(graph.call_function(torch.ops.aten.permute.default, (a, [0, 1])))


def test_with_inductor():
    module, ops = Layers(4), usable()
    calls = Counter()
    options = graph_pass.inductor_options(ops)["post_grad_custom_pre_pass"]
    with pytest.MonkeyPatch.context() as patch, torch._inductor.config.patch(force_disable_caches=True):
        replace = graph_pass.TakeTogether._replace
        patch.setattr(graph_pass.TakeTogether, "_replace", lambda *a: calls.update(["call"]) or replace(*a))
        torch._dynamo.reset()
        got = gradients(module, compiled(module, "inductor", ops), TOKENS)
    assert calls == {"call": 1} and options.backend is impl.BACKEND
    assert_near(got, gradients(module, module, TOKENS))


def test_who_is_asked():
    """Only a bundle whose backend can serve changes what Inductor does; its pass names the code it stands for."""
    for choice in ("auto", "reference", "cuda"):
        assert graph_pass.inductor_options(kernels.select(choice)) == {}, choice
    (option,) = graph_pass.inductor_options(usable()).values()
    assert pickle.loads(pickle.dumps(option.uuid())) == option.uuid()
    other = graph_pass.TakeTogether(kernels.OPS["swiglu"].backend("triton"))
    assert other.uuid() != option.uuid()


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="compile mode is 'fast'; allowed: none, inductor"):
        compiled(print, "fast")
    assert compiled(print, "none") is print
