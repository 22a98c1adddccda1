"""The cost of a training step, read off its graph without a GPU: a pass over the tokens more than before fails here."""

from collections import Counter
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels
from kernels.backends.device import triton_reasons
from kernels.backends.triton_launch import INTERPRETED
from kernels.forward_mode import Dual
from lightningdit.config import ModelConfig
from lightningdit.flow import Transport
from lightningdit.model import LightningDiT
from tests.kernel_launches import launches
from tests.step_graph import moved_bytes, passes, trace

# Wide enough in tokens that no weight is as large as a tensor of them.
SHAPE = {"input_size": 16, "patch_size": 1, "in_channels": 4, "hidden_size": 16, "num_heads": 2}
PAPER = {"use_swiglu": True, "use_rope": True, "use_rmsnorm": True}
BATCH, TOKENS, WIDTH = 2, 2 * 256, 16
TENSOR = TOKENS * WIDTH

#: Passes over the tokens that one more block adds: four products and the operators between them; backward two products
#: for each.
FORWARD = {
    "aten.mm.default": 4,
    "ldit.gated_residual_adaln_rms_norm_fwd.default": 2,
    "ldit.rope_attention_fwd.default": 1,
    "ldit.swiglu_fwd.default": 1,
}
BACKWARD = {
    "aten.mm.default": 8,
    "ldit.gated_residual_adaln_rms_norm_bwd.default": 2,
    "ldit.rope_attention_bwd.default": 1,
    "ldit.swiglu_bwd.default": 1,
}


def graphs(depth: int, residual: torch.dtype, ops=None, **changes):
    """Those of a float16 network on Triton ops."""
    if reasons := triton_reasons():
        pytest.skip("; ".join(reasons))
    device = "cpu" if INTERPRETED else "cuda"
    config = ModelConfig(**SHAPE, **PAPER | changes, depth=depth)
    network = LightningDiT(config, ops or kernels.select("triton"), residual).to(device, torch.float16)
    inputs = torch.randn(BATCH, 4, 16, 16), torch.rand(BATCH), torch.tensor([1, 2])
    return trace(network, *(value.to(device) for value in inputs))


standard = cache(graphs)


def of_one_block(residual: torch.dtype, **changes) -> tuple[Counter, Counter]:
    """What the second of two blocks adds, forward and backward."""
    one, two = standard(1, residual, **changes), standard(2, residual, **changes)
    return tuple(
        Counter(passes(getattr(two, name), TENSOR)) - Counter(passes(getattr(one, name), TENSOR))
        for name in ("forward", "backward")
    )


def test_a_block_makes_nothing_of_the_condition_by_itself():
    """Whatever its size: no product, activation or cast of its own; backward, its vectors' gradients put together."""
    one, two = standard(1, torch.float16), standard(2, torch.float16)
    found = []
    for name in ("forward", "backward"):
        small = [Counter(passes(getattr(g, name), 0)) - Counter(passes(getattr(g, name), TENSOR)) for g in (one, two)]
        found.append(small[1] - small[0])
    assert not set(found[0]) - {"aten.stack.default"}  # the rotation's tables
    assert found[1] == {"aten.cat.default": 1}


@pytest.mark.parametrize("residual", [torch.float16, torch.float32])
@pytest.mark.parametrize("changes", [{}, {"use_qknorm": True, "wo_shift": True}], ids=["paper", "qknorm"])
def test_passes_over_the_tokens_in_a_block(changes, residual):
    forward, backward = of_one_block(residual, **changes)
    assert forward == FORWARD, f"forward: {forward - Counter(FORWARD)} more, {Counter(FORWARD) - forward} fewer"
    assert backward == BACKWARD, f"backward: {backward - Counter(BACKWARD)} more, {Counter(BACKWARD) - backward} fewer"


def test_a_pass_more_is_seen():
    """Planted: a residual added outside of the op, as an innocent change might do."""

    def outside(x, branch, gate, weight, shift, scale, eps, *, branch_bias=None):
        stream = x + gate[:, None] * (branch + branch_bias)
        return stream, triton.adaln_rms_norm(stream, weight, shift, scale, eps, out_dtype=branch.dtype)

    triton = kernels.select("triton")
    planted = SimpleNamespace(**{name: getattr(triton, name) for name in kernels.OPS})
    planted.gated_residual_adaln_rms_norm = outside
    changed = graphs(2, torch.float16, planted)
    more = Counter(passes(changed.forward, TENSOR)) - Counter(passes(standard(2, torch.float16).forward, TENSOR))
    assert "aten.mul.Tensor" in more and "aten.add.Tensor" in more


def test_bytes_that_a_block_moves_forward():
    """In units of one [tokens, width] tensor: the ops of PERF's arithmetic, and products that read and write each side.

    Norms 4D each (stream and branch in, stream and output out), attention 3D in and D out, SwiGLU 3F, products
    (1 + 3) + (1 + 1) D and D + 2F, F + D.
    """
    one, two = standard(1, torch.float16), standard(2, torch.float16)
    hidden = ModelConfig(**SHAPE, **PAPER, depth=1).mlp_hidden / WIDTH
    want = 2 * 4 + (3 + 1) + 3 * hidden + (1 + 3) + (1 + 1) + (1 + 2 * hidden) + (hidden + 1)
    got = (moved_bytes(two.forward, TENSOR) - moved_bytes(one.forward, TENSOR)) / (TENSOR * 2)
    assert got == pytest.approx(want, rel=0.15)  # weights, tables and statistics come on top


class Average(torch.nn.Module):
    """What MeanFlow makes of the network for samples with two times: u less (r - t)·du/dt, one pass with tangents."""

    def __init__(self, network: LightningDiT):
        super().__init__()
        self.network = network

    def forward(self, x, t, y, r, tangent):
        u = self.network(Dual(x, tangent), Dual(t, torch.ones_like(t)), y, r)
        return u.value - ((r - t).view(-1, 1, 1, 1) * u.tangent).detach()


@cache
def graphs_with_tangents(depth: int):
    if reasons := triton_reasons():
        pytest.skip("; ".join(reasons))
    device = "cpu" if INTERPRETED else "cuda"
    config = ModelConfig(**SHAPE, **PAPER, depth=depth, time_pairs=True)
    network = LightningDiT(config, kernels.select("triton", **TANGENT_OPS), torch.float32).to(device, torch.float16)
    latents = torch.randn(2, BATCH, 4, 16, 16)
    inputs = latents[0], torch.rand(BATCH), torch.tensor([1, 2]), torch.rand(BATCH), latents[1]
    return trace(Average(network), *(value.to(device) for value in inputs))


#: `select("triton")` names them so too; said, because the passes below are theirs.
TANGENT_OPS = {op.name: "triton" for op in kernels.OPS.values() if op.forward_mode_of and "triton" in op.backends}
FORWARD_WITH_TANGENTS = {
    "aten.mm.default": 8,
    "ldit.gated_residual_adaln_rms_norm_jvp_fwd.default": 2,
    "ldit.rope_attention_jvp_fwd.default": 1,
    "ldit.swiglu_jvp_fwd.default": 1,
}


def test_passes_over_the_tokens_in_a_block_with_tangents():
    """Forward twice the products, and as many ops as without; the gradients are those of a pass without tangents."""
    one, two = graphs_with_tangents(1), graphs_with_tangents(2)
    found = [
        Counter(passes(getattr(two, n), TENSOR)) - Counter(passes(getattr(one, n), TENSOR))
        for n in ("forward", "backward")
    ]
    assert found[0] == FORWARD_WITH_TANGENTS, f"forward: {found[0]}"
    assert found[1] == BACKWARD, f"backward: {found[1]}"


def test_bytes_of_a_step_with_tangents():
    """Of a block, all samples with two times: at most twice those of flow matching forward, and as many backward. With
    the most evaluations without gradients that there are, two of each sample, at most 2.2 times as many in a step."""
    bytes_of = {
        name: [
            moved_bytes(getattr(g(2), part), TENSOR) - moved_bytes(getattr(g(1), part), TENSOR)
            for part in ("forward", "backward")
        ]
        for name, g in (("flow", lambda depth: standard(depth, torch.float32)), ("tangents", graphs_with_tangents))
    }
    (forward, backward), (both, gradients) = bytes_of["flow"], bytes_of["tangents"]
    assert forward * 1.8 < both <= 2.0 * forward and gradients == backward
    assert both + gradients <= 1.4 * (forward + backward)
    assert both + gradients + 2 * forward <= 2.2 * (forward + backward)


def test_nothing_is_made_on_the_host():
    """On a GPU, network and loss leave nothing to the CPU: no copy between the two, nothing that no graph can hold."""
    config = ModelConfig(**SHAPE, **PAPER, depth=2)
    if reasons := triton_reasons():
        pytest.skip("; ".join(reasons))
    network = LightningDiT(config, kernels.select("triton")).half()
    kept = network.state_dict()
    transport = Transport(use_cosine_loss=True, use_lognorm=True)

    def model(x, t, y):
        return torch.func.functional_call(network, state, (x, t, y))

    class Elsewhere(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **kwargs or {})
            found.extend(str(func) for t in tree_leaves(result) if isinstance(t, torch.Tensor) and not t.is_cuda)
            return result

    found = []
    with FakeTensorMode():  # tensors without memory, so that they may be on any device
        state = {k: torch.empty(t.shape, dtype=t.dtype, device="cuda") for k, t in kept.items()}
        x, noise = torch.empty(2, BATCH, 4, 16, 16, device="cuda")
        t, y = torch.empty(BATCH, device="cuda"), torch.empty(BATCH, dtype=torch.int64, device="cuda")
        with Elsewhere():
            transport.training_losses(model, x, t=t, x0=noise, y=y)
            assert not found
            torch.arange(3).to("cuda")
    assert found == ["aten.arange.default"]


def test_no_graph_break():
    config = ModelConfig(**SHAPE | {"input_size": 2}, **PAPER, depth=2)  # small: this one computes
    if reasons := triton_reasons():
        pytest.skip("; ".join(reasons))
    network = LightningDiT(config, kernels.select("triton"))
    found = torch._dynamo.explain(network)(torch.randn(1, 4, 2, 2), torch.rand(1), torch.tensor([1]))
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


@pytest.mark.parametrize("name", [name for name, op in kernels.OPS.items() if "triton" in op.backends])
def test_kernels_launched_by_an_op(name):
    op, backend = kernels.OPS[name], kernels.OPS[name].backend("triton")
    dtype = torch.float32 if torch.float32 in backend.dtypes else torch.float16
    cases = [case for case in op.cases if case.production and not backend.unsupported(**case.inputs(dtype, "meta"))]
    counts = [tuple(map(len, launches(op, case, dtype))) for case in cases]
    assert max(counts) == op.expectations.triton_launches
