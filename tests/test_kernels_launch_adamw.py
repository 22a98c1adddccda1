"""The Triton backend of `adamw_ema_`: its launches, its bias correction, and the optimizer that uses it."""

import math

import pytest
import torch

import kernels
from kernels.backends.triton_launch import INTERPRETED, recorded
from kernels.testing.checks import same_bits
from launch.training.optimizer import STATE_KEYS, AdamWEma

adamw = pytest.importorskip("kernels.adamw_ema_.triton_impl")
triton = pytest.importorskip("triton")
tl = triton.language
OP = kernels.OPS["adamw_ema_"]
DEVICE = "cpu" if INTERPRETED else "cuda"


@pytest.mark.parametrize("numbers", [1, 37, 128, 129, 1000, 1024, 1025, 84_407_092, 2**33])
def test_blocks(numbers):
    config = adamw.launch_config(numbers)
    assert config.elements == 4 * 32 * config.warps, "one 128-bit access of each thread to each float32 tensor"
    assert config.warps in (1, 2, 4, 8)
    assert config.elements < max(2 * numbers, 129), "no more threads than numbers"
    assert -(-numbers // config.elements) < 2**31, "the limit of a grid"


@pytest.mark.parametrize("numbers", [1000, 2**32 + 3])
@pytest.mark.parametrize("grad", [torch.float32, torch.bfloat16])
def test_one_launch_whatever_the_size(numbers, grad):
    case = next(case for case in OP.cases if case.id == "XL_eighth")
    inputs = case.inputs(grad, "meta")
    sized = {
        name: torch.empty(numbers, dtype=value.dtype, device="meta")
        for name, value in inputs.items()
        if torch.is_tensor(value) and value.ndim == 1
    }
    with recorded(90) as launches:
        adamw.adamw_ema_(**inputs | sized)
    assert len(launches) == 1
    assert launches[0].grid == (-(-numbers // launches[0].options["BLOCK"]),)


@triton.jit
def one_minus_power_kernel(out, log_beta, step):
    tl.store(out, adamw.one_minus_power(log_beta, tl.load(step)))


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.95, 0.99, 0.999, 0.9999, 0.999999])
def test_bias_correction_has_all_digits_at_every_step(beta):
    """1 − β^step, which cancels in float32 to 4 digits at the first step of β = 0.999, against float64."""
    for step in (1, 2, 3, 10, 99, 100, 101, 693, 694, 1000, 9999, 10_000, 10_001, 50_000, 80_000):
        out = torch.empty((), device=DEVICE)
        log_beta = math.log(beta) if beta else -math.inf
        one_minus_power_kernel[(1,)](out, log_beta, torch.tensor(float(step), device=DEVICE))
        exact = -math.expm1(step * log_beta) if beta else 1.0
        assert abs(float(out) - exact) <= 4e-7 * exact, f"step {step}: {float(out)} for {exact}"


@pytest.mark.parametrize("decay", [0.0, 0.25, 0.5, 0.9999, 0.999999, 1.0])
def test_an_average_settles_at_what_it_averages(decay):
    """The weights of the two sides add up to 1: weights that stay where they are keep their average in place."""
    values = torch.linspace(-3, 3, 1000, device=DEVICE)
    states = {name: torch.zeros_like(values) for name in ("grad", "exp_avg", "exp_avg_sq")}
    param, ema = values.clone(), values.clone()
    one, still = torch.ones((), device=DEVICE), torch.zeros((), device=DEVICE)
    adamw.adamw_ema_(
        param=param,
        ema=ema,
        **states,
        step=one,
        lr=one,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.0,
        ema_decay=decay,
        grad_scale=one,
        skip=still,
    )
    assert same_bits(param, values) and same_bits(ema, values)


def test_states_with_gaps_are_refused():
    case = next(case for case in OP.cases if case.id == "late")
    inputs = case.inputs(torch.float32)
    inputs["ema"] = torch.stack((inputs["ema"], inputs["ema"]), dim=1)[:, 0]
    assert "ema is not contiguous" in adamw.unsupported(**inputs)


def trained(ops: kernels.Ops, steps: list[list[torch.Tensor]]) -> tuple[AdamWEma, list[torch.nn.Parameter]]:
    """An optimizer that has seen these gradients, with a learning rate that changes and a norm that clips."""
    params = [torch.nn.Parameter(torch.linspace(-1, 1, n, device=DEVICE).view(-1, 3)) for n in (3, 1200, 3000)]
    optimizer = AdamWEma(
        params,
        ops,
        lr=1e-2,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.05,
        ema_decay=0.9,
        max_grad_norm=30.0,
        partitioned=False,
    )
    optimizer.init_states()
    for number, grads in enumerate(steps, start=1):
        optimizer.set_lr(1e-2 / number)
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.to(DEVICE).view_as(param).clone()
        optimizer.step()
    return optimizer, params


def test_the_optimizer_trains_as_with_the_reference():
    """Over several steps, one of them not finite: that one is skipped and counted, the others count as steps."""
    generator = torch.Generator().manual_seed(0)
    steps = [[torch.randn(n, generator=generator) for n in (3, 1200, 3000)] for _ in range(6)]
    steps[3][1][7] = torch.inf
    steps[4][2] *= 1e-4
    ours, our_params = trained(kernels.select("reference", adamw_ema_="triton"), steps)
    theirs, their_params = trained(kernels.select("reference"), steps)
    counters = {"applied": 5.0, "skipped": 1.0, "skipped_in_a_row": 0.0, "most_skipped_in_a_row": 1.0}
    assert ours.read_counters() == theirs.read_counters() == counters
    for got, want in zip(our_params, their_params, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=5e-7)
        for key in STATE_KEYS:
            torch.testing.assert_close(ours.state[got][key], theirs.state[want][key], rtol=2e-6, atol=1e-7)
    assert not torch.equal(ours.state[our_params[1]]["ema"], our_params[1])
