"""The memory that a training step keeps, counted on tensors without memory: one saved [B, N, D] more fails here."""

from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels
from kernels.backends.device import triton_reasons
from lightningdit.config import ModelConfig
from lightningdit.cost import activation_bytes_per_image
from lightningdit.flow import Transport
from lightningdit.model import LightningDiT
from tests.live_memory import LiveMemory

SHAPE = {
    "input_size": 16,
    "patch_size": 1,
    "in_channels": 4,
    "hidden_size": 16,
    "num_heads": 2,
    "use_swiglu": True,
    "use_rope": True,
    "use_rmsnorm": True,
}
BATCH = 2
TENSOR = BATCH * 256 * 16 * 2  # bytes of one [B, N, D] in float16
#: Most that a step needs beside what the forward pass has kept: gradients on the way, in units of TENSOR.
ON_THE_WAY = {torch.float16: 2.3, torch.float32: 2.3}

pytestmark = pytest.mark.skipif(bool(triton_reasons()), reason="; ".join(triton_reasons()))


def network_config(depth: int, **changes) -> ModelConfig:
    return ModelConfig(**SHAPE | changes, depth=depth)


def memory(depth: int, residual: torch.dtype, ops=None, **changes) -> tuple[float, float]:
    """What a forward pass with its loss keeps, and the peak of the whole step, in units of TENSOR; weights aside."""
    with FakeTensorMode():
        network = LightningDiT(network_config(depth, **changes), ops or kernels.select("triton"), residual).train()
        for parameter in network.parameters():
            parameter.data = parameter.data.half() if parameter.requires_grad else parameter.data
        x, noise = torch.randn(2, BATCH, 4, 16, 16)
        t, y = torch.rand(BATCH), torch.zeros(BATCH, dtype=torch.int64)
        with LiveMemory() as live:
            losses = Transport(use_cosine_loss=True).training_losses(network, x, t=t, x0=noise, y=y)
            loss = losses["loss"].mean() + losses["cos_loss"].mean()
            del losses
            kept = live.now
            loss.backward()
    return kept / TENSOR, live.peak / TENSOR


measured = cache(memory)


def of_one_block(residual: torch.dtype, **changes) -> float:
    return measured(2, residual, **changes)[0] - measured(1, residual, **changes)[0]


def expected(residual: torch.dtype, **changes) -> float:
    """What a block more keeps by `lightningdit.cost`."""
    costs = [activation_bytes_per_image(network_config(d, **changes), residual_bytes=residual.itemsize) for d in (1, 2)]
    return BATCH * (costs[1] - costs[0]) / TENSOR


@pytest.mark.parametrize("residual", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    "changes",
    [{}, {"use_qknorm": True, "wo_shift": True}, {"use_checkpoint": True}],
    ids=["paper", "qknorm", "recompute"],
)
def test_a_block_keeps_what_its_cost_says(changes, residual):
    """And its modulation, and statistics in float32: two norms' and attention's by token, and the table of angles."""
    statistics = 0 if "use_checkpoint" in changes else (BATCH * 256 * (2 + 2) + 256 * 8) * 4 / TENSOR
    want = expected(residual, **changes) + BATCH * 6 * 16 * 2 / TENSOR
    kept = of_one_block(residual, **changes)
    assert want - 0.1 <= kept <= want + statistics + 0.1


@pytest.mark.parametrize("residual", [torch.float16, torch.float32])
def test_of_two_blocks_one_is_kept_where_every_second_is_checkpointed(residual):
    """Two blocks more keep what one does, and the branch between them: within 4 %, statistics and modulation aside."""
    kept = measured(4, residual, use_checkpoint=2)[0] - measured(2, residual, use_checkpoint=2)[0]
    want = (
        BATCH
        / TENSOR
        * (
            activation_bytes_per_image(network_config(4, use_checkpoint=2), residual_bytes=residual.itemsize)
            - activation_bytes_per_image(network_config(2, use_checkpoint=2), residual_bytes=residual.itemsize)
        )
    )
    beside = 2 * BATCH * 6 * 16 * 2 / TENSOR
    statistics = (BATCH * 256 * (2 + 2) + 256 * 8) * 4 / TENSOR
    assert 0.96 * (want + beside) <= kept <= want + beside + statistics + 0.1
    assert kept < 0.6 * (measured(4, residual)[0] - measured(2, residual)[0])


@pytest.mark.parametrize("residual", [torch.float16, torch.float32])
def test_peak_of_a_step(residual):
    kept, peak = measured(2, residual)
    assert 0 < peak - kept <= ON_THE_WAY[residual]


def test_what_is_kept_without_need_is_seen():
    """Planted: an activation after the activation, whose gradient keeps its input."""
    triton = kernels.select("triton")
    planted = SimpleNamespace(**{name: getattr(triton, name) for name in kernels.OPS})
    planted.swiglu = lambda gate_up, bias=None: triton.swiglu(gate_up, bias=bias).square()
    hidden = network_config(1).mlp_hidden / 16
    kept = memory(2, torch.float16, planted)[0] - measured(2, torch.float16)[0]
    assert kept == pytest.approx(2 * hidden, abs=0.05)  # in two blocks


def test_memory_is_counted_while_it_lives():
    with FakeTensorMode(), LiveMemory() as live:
        a = torch.empty(1000)
        view = a[10:].view(-1)
        assert (live.now, live.peak) == (4000, 4000)
        b = a + 1
        del a
        assert live.now == 8000  # the view keeps it
        del view
        b.mul_(2)
        assert (live.now, live.peak) == (4000, 8000)
