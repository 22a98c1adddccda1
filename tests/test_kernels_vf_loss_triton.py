"""The Triton backend of `vf_loss`: launch configurations, memory, and inputs that the generic cases leave out."""

from itertools import product

import pytest
import torch

import kernels
from kernels.backends.device import cuda_reasons
from kernels.backends.triton_launch import recorded
from kernels.testing.tolerance import as_float64, mismatch
from kernels.vf_loss.triton_impl import backward_config, block, forward_config, positions_config

OP = kernels.OPS["vf_loss"]
SHARED = {90: 227 * 1024, 80: 163 * 1024}
POSITIONS = (1, 2, 15, 16, 100, 255, 256, 257, 1024)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


@pytest.mark.parametrize(("size", "found"), [(1, 16), (16, 16), (17, 32), (64, 64), (65, 64)])
def test_blocks_cover_a_size_or_are_the_largest(size, found):
    assert block(size, 64) == found


@pytest.mark.parametrize(("positions", "samples", "dtype", "arch"), product(POSITIONS, (1, 8, 64), DTYPES, SHARED))
def test_tiles_fit_a_multiprocessor(positions, samples, dtype, arch):
    forward, backward = forward_config(dtype, samples, positions, arch), backward_config(dtype, positions)
    assert forward.rows == forward.columns
    for config in (forward, backward):
        assert all(power_of_two(n) and n >= 16 for n in (config.rows, config.columns, config.depth))
        step = 2 * (config.rows + config.columns) * config.depth * dtype.itemsize
        assert config.stages * step <= SHARED[arch]
        accumulators = 2 * config.rows * config.columns // (32 * config.warps)
        assert accumulators <= 128, "two accumulators take half of a thread's 255 registers at most"


def test_every_position_is_in_a_program():
    for positions in POSITIONS:
        config = positions_config(64, positions)
        assert power_of_two(config.positions) and config.positions >= min(positions, 32)


def test_small_tiles_where_large_ones_would_leave_multiprocessors_idle():
    sides = {samples: forward_config(torch.bfloat16, samples, 256, 90).rows for samples in (1, 8, 21, 22, 32, 256)}
    assert sides == {1: 64, 8: 64, 21: 64, 22: 128, 32: 128, 256: 128}
    assert forward_config(torch.bfloat16, 256, 256, 80).rows == 64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_row_of_256_positions_needs_no_partial_sums(dtype):
    assert backward_config(dtype, 256).columns == 256


def memory_beside_results(case, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that kernels are given beside inputs, results and their gradients; and elements of the largest of them."""
    inputs = case.inputs(dtype, "meta")
    z = inputs["z"].requires_grad_()
    with recorded(90) as launches:
        results = OP.backend("triton").run(**inputs)
        torch.autograd.backward(results, [torch.empty_like(result) for result in results])
    tensors = [a for launch in launches for a in launch.args if isinstance(a, torch.Tensor) and a.numel() != z.numel()]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values()), max(t.numel() for t in tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_memory_beside_the_results_is_a_percent_of_what_eager_needs(dtype):
    case = next(case for case in OP.cases if case.id == "dinov2_large")
    z = case.inputs(dtype, "meta")["z"]
    samples, channels, positions = z.flatten(2).shape
    extra, largest = memory_beside_results(case, dtype)
    # The reference keeps, in float32, both inputs as units and the difference of the matrices, to say the least.
    eager = 4 * samples * positions * (2 * channels + positions)
    assert extra <= 0.01 * eager, f"{extra} bytes, {eager} in eager"
    assert largest < positions**2 * samples / 16


def arguments(dtype: torch.dtype, *shape: int) -> dict:
    generator = torch.Generator().manual_seed(1)
    z, f = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    return {"z": z, "f": f, "distmat_margin": 0.1, "cos_margin": 0.2}


def results_and_gradient(function, inputs: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    z = inputs["z"].detach().requires_grad_()
    distmat, cos = function(**inputs | {"z": z})
    return distmat.detach(), cos.detach(), torch.autograd.grad(distmat + cos, z)[0]


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_vector_of_zeros_leaves_the_other_gradients_as_they_are(dtype):
    """Its own pull is 1e12 times that of others, infinite in float16, in the reference too."""
    inputs = arguments(dtype, 1, 24, 3, 4)
    inputs["z"][:, :, 1, 2] = 0
    reference = OP.backend("reference").run
    others = torch.arange(12) != 6
    got, eager, exact = (
        tuple(part.flatten(2)[:, :, others] if part.ndim else part for part in results_and_gradient(function, given))
        for function, given in (
            (OP.backend("triton").run, inputs),
            (reference, inputs),
            (reference, as_float64(inputs)),
        )
    )
    for name, *parts in zip(("distmat", "cos", "gradient"), got, eager, exact, strict=True):
        assert not mismatch(name, *parts)


def test_lengths_of_any_ratio_in_float16():
    """The weights of the backward product, 1 / |z_j|, are far beyond the range of float16 unless they are scaled."""
    inputs = arguments(torch.float16, 1, 24, 2, 4)
    inputs["z"] *= torch.tensor([3e3, 1.0, 1e-2, 2e-6]).half()
    reference = OP.backend("reference").run
    runs = (OP.backend("triton").run, inputs), (reference, inputs), (reference, as_float64(inputs))
    gradients = [results_and_gradient(function, given)[2] for function, given in runs]
    for column in range(4):  # column by column, for the gradients' sizes differ as much
        assert not mismatch("gradient", *(gradient[..., column] for gradient in gradients))


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("argument", ["z", "f"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_is_not_finite_shows_in_both_terms(value, argument, device):
    """On a device too, where a maximum of NaN and 0 is 0."""
    if reasons := cuda_reasons() if device == "cuda" else []:
        pytest.skip("; ".join(reasons))
    inputs = arguments(torch.float32, 1, 6, 2, 3)
    inputs[argument][0, 3, 1, 1] = value
    inputs |= {name: inputs[name].to(device) for name in ("z", "f")}
    assert all(term.isnan() for term in OP.backend("triton").run(**inputs))


def test_no_gradient_flows_to_frozen_features():
    inputs = arguments(torch.float32, 1, 6, 2, 3)
    with recorded(90) as launches:
        z = inputs["z"].to("meta").requires_grad_()
        results = OP.backend("triton").run(**inputs | {"z": z, "f": inputs["f"].to("meta")})
        torch.autograd.backward(results, [torch.empty_like(result) for result in results])
    names = [launch.kernel.__name__ for launch in launches]
    assert names == ["vf_loss_positions", "vf_loss_tiles", "vf_loss_means", "vf_loss_gradient"]
