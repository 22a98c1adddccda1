"""The CUDA kernel of `adamw_ema_` beyond its cases: scalars of any dtype, unaligned addresses, digits."""

import math

import pytest
import torch

import kernels
from kernels.testing import emulation

pytestmark = pytest.mark.skipif(bool(emulation.reasons()), reason="; ".join(emulation.reasons()))
NUMBERS = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "ema_decay": 0.99}


def states(count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    param, grad, exp_avg, exp_avg_sq, ema = torch.randn(5, count, generator=generator).unbind()
    return {"param": param, "grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq.square(), "ema": ema}


def update(backend: str, tensors: dict, *, step, lr, grad_scale, skip, **numbers) -> dict[str, torch.Tensor]:
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    ops = kernels.select("reference", adamw_ema_=backend)
    ops.adamw_ema_(**tensors, **(NUMBERS | numbers), step=step, lr=lr, grad_scale=grad_scale, skip=skip)
    return tensors


@pytest.mark.parametrize(
    "number",
    [
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
    ],
    ids=str,
)
def test_scalars_of_every_dtype(number):
    scalars = {"step": torch.tensor(7, dtype=number), "lr": torch.tensor(1, dtype=number)}
    scalars |= {"grad_scale": torch.tensor([2], dtype=number), "skip": torch.tensor(0, dtype=number)}
    got, want = (update(backend, states(70), **scalars) for backend in ("emulated", "reference"))
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=2e-6, atol=2e-6)
    stay = update("emulated", states(70), **scalars | {"skip": torch.tensor(3, dtype=number)})
    assert all(torch.equal(stay[name], before) for name, before in states(70).items())


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9, 0.9999, 1.0])
def test_an_average_stays_at_what_it_averages(decay):
    """Its weights add up to exactly 1: with each rounded for itself, 0.9999 and 0.0001 add up to 1 + 2⁻²⁵ or so."""
    tensors = states(4096)
    tensors["ema"] = tensors["param"].clone()
    one, nothing = torch.ones(()), torch.zeros(())
    got = update("emulated", tensors, step=one, lr=nothing, grad_scale=one, skip=nothing, ema_decay=decay)
    assert torch.equal(got["ema"], tensors["param"]) and torch.equal(got["param"], tensors["param"])


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999, 0.999999])
def test_bias_correction_has_all_digits_at_every_step(beta):
    """A gradient of 1 on empty states moves a parameter by (1 − β)/(1 − β^step), with β₂ = 0 and lr = 1."""
    one, nothing = torch.ones(()), torch.zeros(())
    for step in (1, 2, 3, 100, 1000, 50_000):
        tensors = {name: torch.zeros(4) for name in states(4)} | {"grad": torch.ones(4)}
        changed = {"betas": (beta, 0.0), "eps": 0.0, "weight_decay": 0.0}
        got = update("emulated", tensors, step=one * step, lr=one, grad_scale=one, skip=nothing, **changed)["param"]
        exact = (1 - beta) / -math.expm1(step * math.log(beta)) if beta else 1.0
        torch.testing.assert_close(got, torch.full((4,), -exact), rtol=6e-7, atol=0)


@pytest.mark.parametrize("shifted", ["param", "grad", "exp_avg", "exp_avg_sq", "ema", "bf16_param"])
def test_one_array_that_is_not_aligned(shifted):
    """Each array decides whether vectors of 16 bytes are possible; an error would name a misaligned address."""
    one, nothing = torch.ones(()), torch.zeros(())
    results = []
    for backend in ("emulated", "reference"):
        tensors = states(1030) | {"bf16_param": torch.zeros(1030, dtype=torch.bfloat16)}
        tensors["grad"] = tensors["grad"].bfloat16()
        buffer = torch.zeros(1031, dtype=tensors[shifted].dtype)
        tensors[shifted] = buffer[1:].copy_(tensors[shifted])
        ops = kernels.select("reference", adamw_ema_=backend)
        ops.adamw_ema_(**tensors, **NUMBERS, step=one, lr=one * 1e-2, grad_scale=one, skip=nothing)
        assert buffer[0] == 0
        results.append(tensors)
    for name in results[0]:
        near = 2e-2 if name == "bf16_param" else 2e-6
        torch.testing.assert_close(results[0][name], results[1][name], rtol=near, atol=2e-6)


def test_arguments_are_refused_by_name():
    launch = emulation.module().adamw_ema_
    tensors, one = states(8), torch.ones(())
    arrays = [tensors[name] for name in ("param", "grad", "exp_avg", "exp_avg_sq", "ema")]
    numbers = (0.9, 0.99, 1e-8, 0.1, 0.99, 4096)
    wrong = {
        1: (arrays[1].half(), "grad is float16"),
        2: (arrays[2][1:], "exp_avg has the shape"),
        4: (arrays[4].double(), "ema has a dtype"),
        5: (arrays[0], "bf16_param has the dtype float32"),
        6: (torch.ones(2), "step has the shape"),
        9: (one.to(torch.complex64), "skip has a dtype"),
    }
    for place, (tensor, message) in wrong.items():
        arguments = [*arrays, None, one, one, one, one]
        arguments[place] = tensor
        with pytest.raises(ValueError, match=f"adamw_ema_: {message}"):
            launch(*arguments, *numbers)
