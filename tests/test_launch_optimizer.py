"""The optimizer beside torch's own AdamW, clipping and an average made by hand."""

import pytest
import torch

import kernels
from launch.training.optimizer import AdamWEma

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.05}
SIZES = ((3,), (5, 7))


@pytest.mark.parametrize("most", [0.0, 0.5, 100.0])
def test_steps_are_those_of_torch_with_clipped_gradients_and_an_average(most):
    """Where the norm is never, always and sometimes above the most that is allowed."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(size, generator=generator) for size in SIZES]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    optimizer = AdamWEma(
        ours, kernels.select("reference"), **SETTINGS, ema_decay=0.9, max_grad_norm=most, partitioned=False
    )
    optimizer.init_states()
    torch_adamw, average = torch.optim.AdamW(theirs, **SETTINGS), [p.clone() for p in start]
    for step in range(1, 9):
        grads = [10 ** (step % 4) * torch.randn(size, generator=generator) for size in SIZES]
        for params in (ours, theirs):
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(theirs, most or torch.inf)
        optimizer.step()
        torch_adamw.step()
        assert optimizer.grad_norm.item() == pytest.approx(norm.item(), rel=1e-6), "as it was before it was clipped"
        average = [0.9 * e + 0.1 * p.detach() for e, p in zip(average, theirs, strict=True)]
        for mine, other, mean in zip(ours, theirs, average, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(optimizer.state[mine]["ema"], mean, rtol=1e-5, atol=1e-6)
    assert optimizer.read_counters()["applied"] == 8
