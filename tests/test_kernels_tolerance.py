"""The tolerance rule: it accepts sums as tensor cores make them, simulated, and refuses coarser ones."""

import pytest
import torch

from kernels.backends.device import cuda_reasons
from kernels.testing.tolerance import has_half_precision, mismatch

MARGIN = 0.25


def truncated(values: torch.Tensor) -> torch.Tensor:
    """float64 to float32, rounded towards 0."""
    near = values.float()
    bits = near.view(torch.int32)
    return torch.where(near.double().abs() > values.abs(), bits - 1, bits).view(torch.float32)


def cosines(vectors: torch.Tensor, add) -> torch.Tensor:
    """Those of bfloat16 rows with each other; `add` rounds the sum after each step of 16 products."""
    vectors, total = vectors.double(), torch.zeros(len(vectors), len(vectors), dtype=torch.float64)
    for part in vectors.split(16, dim=1):
        total = add(total + part @ part.T).double()
    lengths = vectors.norm(dim=1)
    return total / lengths[:, None] / lengths


def distances(pair: list[torch.Tensor], add) -> torch.Tensor:
    """As in the VF loss: the mean of how much more than a margin cosines differ."""
    a, b = (cosines(vectors, add) for vectors in pair)
    return ((a - b).abs() - MARGIN).relu().mean()


def test_sums_that_tensor_cores_truncate_pass_and_coarser_ones_do_not():
    random = torch.Generator().manual_seed(0)
    # Of the second set each row but the first resembles it: cosines near 0 in one set, and near 0.9 in the other.
    first, other = (torch.randn(64, 1024, generator=random) for _ in range(2))
    second = (other + 3 * other[:1]).bfloat16()
    pair = [first.bfloat16(), second]
    exact = distances(pair, lambda total: total)
    got = distances(pair, truncated).float()
    assert mismatch("mean", got, exact.float(), exact), "not what float32 could do"
    assert not mismatch("mean", got, exact.float(), exact, half_precision=True)
    assert not mismatch("mean", distances(pair, torch.Tensor.float).float(), exact.float(), exact), "rounded to nearest"
    in_float16 = distances(pair, torch.Tensor.half).float()
    assert mismatch("mean", in_float16, exact.float(), exact, half_precision=True)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_is_simulated_is_what_tensor_cores_do(device):
    """Squares of a row only add up: each truncation makes them smaller, and float32 products of a CPU do not."""
    if device == "cuda" and (reasons := cuda_reasons()):
        pytest.skip("; ".join(reasons))
    rows = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact, simulated = rows.double().square().sum(dim=1), torch.zeros(len(rows))
    for part in rows.double().split(16, dim=1):
        simulated = truncated(simulated.double() + part.square().sum(dim=1))
    if device == "cuda":
        got = torch.mm(rows.cuda(), rows.cuda().T, out_dtype=torch.float32).diagonal().cpu()
    else:
        got = torch.mm(rows.float(), rows.float().T).diagonal()
    bias, expected = (float(((t.double() - exact) / exact).mean()) for t in (got, simulated))
    assert abs(bias - (expected if device == "cuda" else 0)) < 0.5e-6 < -expected / 2


EXACT = torch.linspace(-3, 3, 25, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("times, right", [(0, True), (1, True), (1.9, True), (2.2, False), (5, False), (19, False)])
def test_twice_the_error_of_the_reference_is_the_limit(times, right, dtype):
    """Where that error is large beside the roundings of the dtype; the largest difference counts, of either sign."""
    error = 512 * torch.finfo(dtype).eps
    eager, got = EXACT.clone(), EXACT.clone()
    eager[3] += error
    got[20] -= times * error
    assert (mismatch("x", got.to(dtype), eager.to(dtype), EXACT) == "") is right


@pytest.mark.parametrize(
    "dtype, half_precision, unit",
    [
        (torch.float32, False, 2.0**-23),
        (torch.float32, True, 2.0**-18),
        (torch.bfloat16, True, 2.0**-7),
        (torch.float16, True, 2.0**-10),
    ],
)
def test_a_perfect_reference_leaves_four_roundings_of_the_largest_number(dtype, half_precision, unit):
    exact = torch.tensor([8.0, 1.0], dtype=torch.float64)
    for units, right in ((3, True), (5, False)):
        got = (exact + torch.tensor([-units * 8 * unit, 0.0])).to(dtype)
        assert (mismatch("x", got, exact.to(dtype), exact, half_precision) == "") is right, units


def test_results_that_are_not_numbers_are_wrong():
    exact = torch.ones(3, dtype=torch.float64)
    for value in (float("nan"), float("inf")):
        assert "error" in mismatch("x", torch.full((3,), value), exact.float(), exact)


def test_what_counts_as_half_precision():
    single = {"x": torch.zeros(1), "count": torch.zeros(1, dtype=torch.int16), "eps": 1e-6, "bias": None}
    assert not has_half_precision(single)
    assert has_half_precision(single | {"bias": torch.zeros(1, dtype=torch.float16)})
    assert has_half_precision({"x": torch.zeros(1).bfloat16()})
