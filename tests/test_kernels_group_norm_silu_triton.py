"""The Triton backend of `group_norm_silu`: launch configurations, launches, and divisions that no small case has."""

from itertools import product

import pytest
import torch

import kernels
from kernels.backends.triton_launch import recorded
from kernels.group_norm_silu import triton_impl
from kernels.group_norm_silu.triton_impl import MAX_CHUNKS, TILE_ELEMENTS, LaunchConfig, launch_config, split_count
from kernels.testing.tolerance import as_float64, mismatch

OP = kernels.OPS["group_norm_silu"]
REFERENCE, TRITON = OP.backend("reference").run, OP.backend("triton").run
SHARED_BY_FOUR = {90: 227 * 1024 // 4, 80: 163 * 1024 // 4}


def test_a_part_is_what_lies_side_by_side():
    x = torch.empty(2, 64, 6, 5)
    assert split_count(x.flatten(2), 32) == 32
    assert split_count(x.contiguous(memory_format=torch.channels_last).flatten(2), 32) == 1
    assert split_count(torch.empty(2, 64, 1), 32) == 1


def power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


@pytest.mark.parametrize(
    ("parts", "channels", "positions"), product((1, 8, 33, 600), (3, 32, 128, 512, 5000), (1, 17, 256, 4095, 65536))
)
def test_chunks_cover_every_position_once(parts, channels, positions):
    config = launch_config(parts, channels, positions)
    assert power_of_two(config.block_n) and config.chunk_size % config.block_n == 0
    assert (config.chunks - 1) * config.chunk_size < positions <= config.chunks * config.chunk_size
    assert config.chunks <= MAX_CHUNKS
    assert config.block_n * channels <= max(TILE_ELEMENTS, channels)


@pytest.mark.parametrize("case", [case for case in OP.cases if case.production], ids=lambda case: case.id)
def test_a_wave_of_programs_where_there_is_work_for_it(case):
    x = case.inputs(torch.bfloat16, "meta")["x"]
    (samples, channels, positions), splits = x.flatten(2).shape, split_count(x.flatten(2), 32)
    config = launch_config(samples * splits, channels // splits, positions)
    if samples * positions * channels >= 4 * TILE_ELEMENTS * 528:
        assert 0.9 * 528 <= config.chunks * samples * splits <= 528, "four for each of 132 multiprocessors, in one wave"
    assert config.chunk_size // config.block_n >= 4, "less work than reading the sums of the other chunks"


def test_four_forward_programs_share_a_multiprocessor():
    config = launch_config(8, 128, 65536)
    assert 4 * 32 * config.warps * config.forward_registers <= 65536
    for shared, itemsize in product(SHARED_BY_FOUR.values(), (2, 4)):
        assert (config.stages - 1) * TILE_ELEMENTS * itemsize <= shared


def launches(needs_dx: bool = True, needs_dweight: bool = True) -> list:
    """Those of a call in a layer of the tokenizer and of its backward pass."""
    case = next(case for case in OP.cases if case.id == "f16_128")
    inputs = case.inputs(torch.bfloat16, "meta")
    inputs["x"].requires_grad_(needs_dx)
    inputs["weight"].requires_grad_(needs_dweight)
    inputs["bias"].requires_grad_(needs_dweight)
    with recorded(90) as found:
        y = TRITON(**inputs)
        y.backward(torch.empty_like(y))
    return found


def test_two_launches_each_way():
    assert [launch.kernel.__name__ for launch in launches()] == [
        "group_norm_silu_statistics",
        "group_norm_silu_apply",
        "group_norm_silu_sums",
        "group_norm_silu_gradients",
    ]


def test_programs_are_left_out_with_the_gradients_that_nobody_asks_for():
    assert launches()[-1].grid[1] == 8 + 1
    assert launches(needs_dweight=False)[-1].grid[1] == 8
    assert launches(needs_dx=False)[-1].grid[1] == 1


def arguments(dtype: torch.dtype, *shape: int, mean: float = 0.5, groups: int = 3) -> dict:
    generator = torch.Generator().manual_seed(7)
    x = (torch.randn(shape, generator=generator) * 1.5 + mean).to(dtype)
    weight, bias = (torch.randn(shape[1], generator=generator) + 1 for _ in range(2))
    layout = torch.channels_last
    return {"x": x.contiguous(memory_format=layout), "weight": weight, "bias": bias, "groups": groups, "eps": 1e-6}


def results(function, inputs: dict) -> dict[str, torch.Tensor]:
    asked = {name: inputs[name].detach().requires_grad_() for name in OP.differentiable}
    y = function(**inputs | asked)
    upstream = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    found = torch.autograd.grad(y, list(asked.values()), upstream)
    return {"y": y.detach()} | dict(zip(asked, found, strict=True))


def compare(inputs: dict) -> None:
    runs = [results(*run) for run in ((TRITON, inputs), (REFERENCE, inputs), (REFERENCE, as_float64(inputs)))]
    for name in runs[0]:
        assert not mismatch(name, *(run[name] for run in runs))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_more_partial_sums_than_are_added_up_at_a_time(dtype, layout, monkeypatch):
    """3 × 5 chunks by 8 for the sums of the weights; the last chunk of a sample has 3 positions of 4, in tiles of 2."""
    monkeypatch.setattr(triton_impl, "launch_config", lambda *_: LaunchConfig(2, 4, 5))
    monkeypatch.setattr(triton_impl, "BLOCK_S", 8)
    inputs = arguments(dtype, 3, 18, 19, 1)
    compare(inputs | {"x": inputs["x"].contiguous(memory_format=layout)})


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("mean", [300.0, 1e4])
def test_a_mean_far_above_the_deviations(mean):
    """Rounding such a mean moves every result by more than all else; the reference in float32 does."""
    inputs = arguments(torch.float32, 1, 6, 40, 33, mean=mean)
    compare(inputs)
    found, exact = results(TRITON, inputs), results(REFERENCE, as_float64(inputs))
    for name, value in exact.items():
        assert (found[name] - value).abs().max() <= 16 * torch.finfo(torch.float32).eps * value.abs().max(), name


def test_a_first_position_unlike_the_others():
    """Were it the origin of the deviations, their squares would lose the digits that the mean costs."""
    inputs = arguments(torch.float32, 1, 6, 33, 1, mean=3000.0)
    inputs["x"][:, :, 0] = 0
    compare(inputs)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_results_and_gradients_are_laid_out_as_their_input(layout):
    inputs = arguments(torch.float32, 2, 6, 4, 5)
    inputs["x"] = inputs["x"].contiguous(memory_format=layout)
    found = results(TRITON, inputs)
    assert found["y"].is_contiguous(memory_format=layout) and found["x"].is_contiguous(memory_format=layout)


def test_what_is_not_finite_shows():
    inputs = arguments(torch.float32, 2, 6, 3, 3)
    inputs["x"][0, 0, 1, 1] = float("nan")
    y = TRITON(**inputs)
    assert y[0, :2].isnan().all() and y[0, 2:].isfinite().all() and y[1].isfinite().all()
