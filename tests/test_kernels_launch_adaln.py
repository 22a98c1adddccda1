"""Launch configurations of the modulated norms: they fit the device, and cover every column and token once."""

from dataclasses import astuple

import pytest
import torch

import kernels
from kernels.adaln_rms_norm.triton_config import (
    LEAST_SHARED,
    NUM_SMS,
    REGISTERS,
    SHARED,
    backward_config,
    chunking,
    column_blocks,
    forward_config,
    vector_config,
)
from kernels.adaln_rms_norm.triton_passes import vector_gradients
from kernels.backends.triton_launch import INTERPRETED, recorded
from kernels.testing.tolerance import leaves, named

WIDTHS = (1, 8, 37, 384, 440, 768, 1024, 1152, 1408, 1792, 2048, 2304, 4096, 8192, 9216, 12000)
PASSES = {
    "forward": lambda width, size, arch: forward_config(width, 2 * size * width, arch),
    "backward": lambda width, size, arch: backward_config(width, 4 * size * width, arch, bias=False),
    "backward, bias": lambda width, size, arch: backward_config(width, 4 * size * width, arch, bias=True),
}


def power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


@pytest.mark.parametrize("width", WIDTHS)
def test_blocks_hold_a_row_and_little_more(width):
    blocks, warps = column_blocks(width)
    assert all(power_of_two(block) for block in blocks) and power_of_two(warps)
    assert list(blocks) == sorted(blocks, reverse=True), "a block begins at a multiple of its own width"
    assert 0 <= sum(blocks) - width < 64 * warps, "less than two columns of a lane are idle"
    assert min(blocks) >= 64 * warps, "two columns of 16 bits for every lane"


def test_blocks_of_the_presets():
    assert column_blocks(768) == ((512, 256), 2)
    assert column_blocks(1024) == ((1024,), 2)
    assert column_blocks(1152) == ((1024, 128), 2)
    assert column_blocks(1792) == ((1024, 512, 256), 4)


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("architecture", [80, 86, 90, 100])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_programs_fit_a_multiprocessor(name, architecture, size):
    """`size`: bytes of an element; 3 for a float32 stream with halves beside it."""
    for width in WIDTHS:
        config = PASSES[name](width, size, architecture)
        per_token = (2 if name == "forward" else 4) * size * sum(config.blocks)
        assert 0 < config.registers <= 255 and config.registers % 8 == 0
        assert config.programs >= 1 and config.programs * 32 * config.warps * config.registers <= REGISTERS
        assert config.stages in (1, 3)
        assert config.programs * (config.stages - 1) * per_token <= SHARED.get(architecture, LEAST_SHARED)


@pytest.mark.parametrize("name", PASSES)
def test_enough_bytes_are_under_way_at_the_widths_of_the_presets(name):
    """4.8 TB/s for 0.8 µs are 29 KB for each of 132 multiprocessors; two thirds of them are read."""
    for width in (768, 1024, 1152, 1792):
        config = PASSES[name](width, 2, 90)
        tensors = 2 if name == "forward" else 4
        assert config.stages == 3 and config.programs * 2 * tensors * 2 * width >= 40_000


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("samples", [1, 3, 32, 128, 300, 5000])
def test_chunks_cover_every_token_once(name, samples):
    config = PASSES[name](1152, 2, 90)
    for tokens in (1, 7, 64, 256, 257, 1024, 4096):
        chunks, chunk_tokens = chunking(samples, tokens, config, 90)
        assert chunks >= 1 and (chunks - 1) * chunk_tokens < tokens <= chunks * chunk_tokens
        running = NUM_SMS[90] * config.programs
        assert chunks == 1 or samples * chunks <= running, "one wave"
        assert 2 * chunk_tokens > min(tokens, config.least_tokens), "no program has next to nothing to do"


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("samples", [32, 64, 128, 256])
def test_a_device_is_full_at_the_batches_of_training(name, samples):
    config = PASSES[name](1152, 2, 90)
    chunks, _ = chunking(samples, 256, config, 90)
    assert samples * chunks >= 0.75 * NUM_SMS[90] * config.programs


@pytest.mark.parametrize("samples", [1, 32, 33, 64, 65, 128, 1000])
def test_lanes_of_the_second_stage_read_128_bits(samples):
    config = vector_config(samples)
    assert all(power_of_two(value) for value in astuple(config))
    assert config.columns * config.samples == 4 * 32 * config.warps
    assert config.samples >= min(samples, 128)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


@pytest.mark.skipif(not INTERPRETED, reason="the kernels are compiled in this process")
@pytest.mark.parametrize(("samples", "chunks"), [(3, 1), (133, 2), (40, 9)])
def test_second_stage_adds_up_more_samples_and_chunks_than_it_holds(samples, chunks):
    """Against the formulas in float64; 11 columns are more than a program's, and no multiple of them."""
    sums = normal(samples, chunks, 4, 11, seed=0)
    gate, shift, scale = normal(samples, 33, seed=1).chunk(3, dim=1)
    bias, weight = normal(11, seed=2), normal(11, seed=3)
    got = vector_gradients(sums, gate, bias, weight, shift, scale)
    dy_x, dy, dx_branch, dx = sums.double().sum(dim=1).unbind(1)
    want = (
        dx_branch + bias.double() * dx,
        (gate.double() * dx).sum(dim=0),
        ((1 + scale.double()) * dy_x).sum(dim=0),
        dy,
        weight.double() * dy_x,
    )
    for found, truth in zip(got, want, strict=True):
        torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(not INTERPRETED, reason="the kernels are compiled in this process")
@pytest.mark.parametrize("stream", [torch.float16, torch.float32])
def test_the_norm_sees_the_stream_as_it_is_returned(stream):
    x, branch, vectors = normal(2, 5, 24, seed=4).to(stream), normal(2, 5, 24, seed=5).half(), normal(2, 72, seed=6)
    (gate, shift, scale), weight = vectors.chunk(3, dim=1), normal(24, seed=7)
    ops = kernels.select("triton")
    x_new, y = ops.gated_residual_adaln_rms_norm(x, branch, gate, weight, shift, scale, 1e-6)
    assert torch.equal(y, ops.adaln_rms_norm(x_new, weight, shift, scale, 1e-6, out_dtype=torch.float16))


@pytest.mark.parametrize("name", ["adaln_rms_norm", "gated_residual_adaln_rms_norm"])
def test_launches_and_what_they_are_given(name):
    """One kernel forward, two backward, one where no vector asks; parts of a modulation are read where they lie."""
    op = kernels.OPS[name]
    backend = op.backend("triton")
    inputs = next(case for case in op.cases if case.id == "XL").inputs(torch.float16, "meta")
    wanted = [argument for argument in op.differentiable if inputs[argument] is not None]
    assert inputs["scale"].stride(0) > 1152
    for asked, expected in ((wanted, 3), (["x"], 2)):
        with recorded(90) as found:
            results = list(named(backend.run(**inputs | leaves(inputs, asked))).values())
            assert len(found) == 1
            torch.autograd.backward(results, [torch.empty_like(result) for result in results])
        assert len(found) == expected
        for launch in found:
            vectors = [arg for arg in launch.args if isinstance(arg, torch.Tensor) and arg.shape == (128, 1152)]
            gradients = launch.kernel.__name__ == "modulation_bwd"
            views = [vector for vector in vectors if vector.stride(0) == inputs["scale"].stride(0)]
            assert views and (gradients or len(views) == len(vectors)), f"{launch.kernel.__name__} is given copies"


@pytest.mark.parametrize("name", ["triton", "cuda", "emulated"])
def test_a_result_of_float64_is_refused(name):
    op = kernels.OPS["adaln_rms_norm"]
    inputs = next(case for case in op.cases if case.id == "XL").inputs(torch.float16, "meta")
    reasons = op.backend(name).unsupported(**inputs | {"out_dtype": torch.float64})
    assert any(reason.startswith("out_dtype torch.float64") for reason in reasons), reasons
    assert op.backend(name).unsupported(**inputs | {"out_dtype": torch.float32}) == []
