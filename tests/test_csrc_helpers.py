"""The helpers of csrc/common against torch: in the emulation and, marked `gpu`, the same kernels on a device."""

import pytest
import torch

from kernels.backends.device import cuda_reasons
from kernels.testing import emulation
from tests.emulated import emulated, on_device

HALF_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
#: Tensor cores cut off what float32 cannot hold beside the largest product, here below 16: 16 times 2^-20 at most.
CUT_OFF = 2.0**-16


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def machine(request):
    """Where the kernels run: the device of their tensors, and the call."""
    if request.param == "cuda":
        if reasons := cuda_reasons():
            pytest.skip("; ".join(reasons))
        return "cuda", on_device("helpers")
    if reasons := emulation.reasons():
        pytest.skip("; ".join(reasons))
    return "cpu", emulated("helpers")


def call(machine, name: str, *args) -> None:
    device, library = machine
    library(name, *args)
    if device == "cuda":
        torch.cuda.synchronize()


def numbers(*shape: int, dtype=torch.float32, device="cpu", seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def nans(*shape: int, device: str) -> torch.Tensor:
    return torch.full(shape, torch.nan, device=device)


@pytest.mark.parametrize("k", [16, 8])
@pytest.mark.parametrize("name", HALF_DTYPES)
def test_mma(machine, name, k):
    """Every element of both factors counts once and in its place: products with random and with one-hot matrices."""
    device = machine[0]
    a, b = (
        numbers(16, k, dtype=HALF_DTYPES[name], device=device),
        numbers(k, 8, dtype=HALF_DTYPES[name], device=device, seed=1),
    )
    out = nans(16, 8, device=device)
    call(machine, "multiply", name == "bfloat16", k, a, b, out)
    torch.testing.assert_close(out, (a.double() @ b.double()).float(), rtol=1e-6, atol=CUT_OFF)
    codes = torch.arange(16.0 * k, device=device).view(16, k).to(HALF_DTYPES[name])
    for column in range(0, k, 8):
        one_hot = torch.zeros(k, 8, device=device, dtype=HALF_DTYPES[name])
        one_hot[column : column + 8] = torch.eye(8)
        call(machine, "multiply", name == "bfloat16", k, codes, one_hot, out)
        assert torch.equal(out, codes[:, column : column + 8].float())


def test_products_of_float32(machine):
    """Exact to float32, and what the emulation does at once has the bits of what a device does by shuffles."""
    device = machine[0]
    a, b = numbers(16, 8, device=device), numbers(8, 8, device=device, seed=1)
    out, by_shuffles = nans(16, 8, device=device), nans(16, 8, device=device)
    call(machine, "multiply_float32", a, b, out, by_shuffles)
    torch.testing.assert_close(out, (a.double() @ b.double()).float(), rtol=1e-6, atol=1e-6)
    assert torch.equal(out, by_shuffles)


@pytest.mark.parametrize("name", HALF_DTYPES)
def test_mma_of_what_ldmatrix_loads(machine, name):
    device = machine[0]
    a, b = (
        numbers(16, 16, dtype=HALF_DTYPES[name], device=device),
        numbers(16, 8, dtype=HALF_DTYPES[name], device=device, seed=1),
    )
    out = nans(16, 8, device=device)
    call(machine, "multiply_from_shared", name == "bfloat16", a, b, out)
    torch.testing.assert_close(out, (a.double() @ b.double()).float(), rtol=1e-6, atol=CUT_OFF)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(machine, transposed, count):
    """Lane 4·g + m gets columns 2m and 2m + 1 of row g, of each tile or of its transpose."""
    device = machine[0]
    tiles = torch.arange(count * 64, dtype=torch.int16, device=device).view(count, 8, 8)
    words = torch.full((count, 32), -1, dtype=torch.int32, device=device)
    call(machine, "tiles", transposed, count, tiles, words)
    want = (tiles.mT if transposed else tiles).contiguous().view(torch.int32).view(count, 32)
    assert torch.equal(words, want)


@pytest.mark.parametrize("valid", [0, 4, 12, 16])
def test_asynchronous_copies_in_stages(machine, valid):
    device = machine[0]
    source, out = numbers(3, 128, device=device), nans(3, 128, device=device)
    call(machine, "staged", source, out, valid)
    want = source.clone()
    want[2].view(32, 4)[:, valid // 4 :] = 0
    assert torch.equal(out, want)


@pytest.mark.parametrize("threads", [32, 96, 160, 1024])
def test_reductions(machine, threads):
    device = machine[0]
    source, out = numbers(threads, device=device), nans(4, threads, device=device)
    call(machine, "reductions", threads, source, out)
    groups = source.view(-1, 8)
    torch.testing.assert_close(out[0], groups.sum(1).repeat_interleave(8), rtol=1e-6, atol=1e-6)
    assert torch.equal(out[1], groups.amax(1).repeat_interleave(8))
    for sums in out[2:]:
        assert torch.equal(sums, sums[:1].expand(threads)), "every thread has the same bits"
    torch.testing.assert_close(out[2, 0].double(), source.double().sum(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out[3, 0], out[2, 0] * threads, rtol=1e-5, atol=1e-5)


def edges() -> torch.Tensor:
    """Floats where rounding changes its mind: around every 16-bit value and the middle to the next; and random bits."""
    generator = torch.Generator().manual_seed(0)
    every = torch.arange(65536, dtype=torch.int32)
    values = [every.to(torch.int16).view(dtype).float().view(torch.int32) for dtype in HALF_DTYPES.values()]
    middles = [values[0] + 0x8000, values[1] + 0x1000, values[1][(values[1] & 0x7FFFFFFF) < 0x38800000] + 0x400]
    middles.append((torch.arange(2048.0) * 2**-25).view(torch.int32))  # halves of the float16 numbers near 0
    middles.append(torch.tensor([65519.996, 65520, 65535, 65536, 3.4e38, 0.0, 1e-45]).view(torch.int32))
    near = torch.cat([*values, *middles])
    near = torch.cat([near, near - 1, near + 1])
    random = torch.randint(-(2**31), 2**31, (1 << 20,), generator=generator, dtype=torch.int64).to(torch.int32)
    both = torch.cat([near, near ^ -(2**31), random])
    return both.view(torch.float32)


@pytest.mark.parametrize("name", HALF_DTYPES)
def test_rounding_to_16_bits(machine, name):
    """To the nearest, ties to even, as torch does; NaN stays NaN of some kind."""
    device, dtype = machine[0], HALF_DTYPES[name]
    source = edges().to(device)
    out = torch.empty(source.shape, dtype=dtype, device=device)
    call(machine, "round_to_16_bits", name == "bfloat16", source, out, source.numel())
    assert torch.equal(out.isnan(), source.isnan())
    numeric = ~source.isnan()
    assert torch.equal(out.view(torch.int16)[numeric], source.to(dtype).view(torch.int16)[numeric])


@pytest.mark.parametrize("name", HALF_DTYPES)
def test_every_16_bit_number_as_float32(machine, name):
    device, dtype = machine[0], HALF_DTYPES[name]
    source = torch.arange(65536, dtype=torch.int32, device=device).to(torch.int16).view(dtype)
    out = torch.empty(65536, device=device)
    call(machine, "to_float32", name == "bfloat16", source, out, 65536)
    numeric = ~source.isnan()
    assert torch.equal(out.isnan(), source.isnan())
    assert torch.equal(out.view(torch.int32)[numeric], source.float().view(torch.int32)[numeric])


@pytest.mark.parametrize("count", [1, 7, 8, 9, 250])
@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_vectors_and_their_tails(machine, dtype, count):
    """Every element once, none beyond; from an address that is aligned and from one that is not."""
    device = machine[0]
    for offset, whole in ((0, True), (0, False), (1, False)):
        source = numbers(count + 16, dtype=dtype, device=device)
        out = torch.full_like(source, torch.nan)
        call(machine, "copy", CODES[dtype], source[offset:], out[offset:], count, whole)
        assert torch.equal(out[offset : offset + count], source[offset : offset + count])
        assert out[:offset].isnan().all() and out[offset + count :].isnan().all()
