"""Launches of the Triton backend of `rope_attention`, and cases in which its arguments have different dtypes."""

import itertools

import pytest
import torch

import kernels
from kernels.backends.device import triton_reasons
from kernels.testing.tolerance import as_float64, gradients, outputs, random_like, reference

if triton_reasons():
    pytest.skip("; ".join(triton_reasons()), allow_module_level=True)

from kernels.backends.triton_launch import INTERPRETED, recorded
from kernels.rope_attention.autograd import pairs
from kernels.rope_attention.triton_impl import (
    BACKEND,
    CONFIGS,
    LaunchConfig,
    column_tiles,
    dkdv_config,
    dq_config,
    forward_config,
    sums,
)

OP = kernels.OPS["rope_attention"]
SHARED = {90: 227 * 1024, 80: 163 * 1024}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOKENS, WIDTHS = (1, 64, 250, 256, 257, 1024, 5000), (2, 64, 72, 80, 96, 128)
LIMITS = itertools.product(TOKENS, WIDTHS, DTYPES, (False, True), (80, 90))


def power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


@pytest.mark.parametrize("width", range(1, 129))
def test_column_tiles_cover_a_head_with_little_padding(width):
    main, rest = column_tiles(width)
    assert power_of_two(main) and (rest == 0 or power_of_two(rest)) and rest <= main
    assert main + rest >= width and main >= 16 and (rest == 0 or rest >= 16)
    assert rest == 0 or main < width
    assert main + rest - width < 16 or main + rest <= 1.5 * width or width < 16


def test_column_tiles_of_the_models():
    wanted = {64: (64, 0), 72: (64, 16), 80: (64, 16), 96: (64, 32), 128: (128, 0)}
    assert {width: column_tiles(width) for width in wanted} == wanted


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_configurations_are_ones_that_triton_takes(config):
    assert all(power_of_two(n) and n >= 16 for n in (config.queries, config.keys)) and config.warps in (4, 8)
    assert config.registers is None or config.registers % 8 == 0


def test_keys_in_smem_fit_shared_memory_and_multiply_with_wgmma():
    for tokens, width, dtype, normed, arch in LIMITS:
        for kind, choose in (("fwd", forward_config), ("dq", dq_config), ("dkdv", dkdv_config)):
            config = choose(tokens, width, dtype, normed, arch)
            assert config in CONFIGS.values()
            rows = config.keys if kind == "dkdv" else config.queries  # of the products' left factors
            assert arch < 90 or dtype == torch.float32 or rows * 4 >= config.warps * 64 or rows == 64
            if config.keys_in_smem:
                other = config.queries if kind == "dkdv" else config.keys
                held = -(-tokens // other) * other * 2 * sum(column_tiles(width)) * dtype.itemsize
                assert 2 * (held + 20 * 1024) <= SHARED[arch], f"{config} does not leave two programs for a processor"


def calls(tokens: int, dtype: torch.dtype, normed: bool, arch: int, samples: int = 2, heads: int = 3, width: int = 72):
    qkv = torch.empty(samples, tokens, 3, heads, width, dtype=dtype, device="meta", requires_grad=True)
    table = torch.empty(tokens, width, device="meta")
    weights = (torch.empty(width, dtype=dtype, device="meta", requires_grad=True) for _ in "qk") if normed else ()
    with recorded(arch) as found:
        out = BACKEND.run(qkv, table, table, *weights)
        forward = len(found)
        out.backward(torch.empty_like(out))
    return found[:forward], found[forward:]


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("tokens", [1, 64, 65, 256, 257, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_launches_cover_every_row_once(tokens, dtype, arch):
    forward, backward = calls(tokens, dtype, False, arch)
    assert len(forward) == 1 and len(backward) == 2
    for one in forward + backward:
        rows = one.options["BK" if "dkdv" in one.kernel.__name__ else "BQ"]
        held = one.options["BQ" if "dkdv" in one.kernel.__name__ else "BK"]
        parts = one.grid[0] // 6
        held_blocks = one.options.get("BLOCKS", 0)
        tiles = -(-tokens // rows)
        assert one.grid == (6 * (1 if held_blocks else tiles),) and parts * (tiles if held_blocks else 1) == tiles
        assert not held_blocks or (held_blocks - 1) * held < tokens <= held_blocks * held
        assert one.options["RAGGED_Q"] == (tokens % one.options["BQ"] != 0)
        assert one.options["RAGGED_K"] == (tokens % one.options["BK"] != 0)


def test_norm_weights_take_one_more_launch():
    forward, backward = calls(256, torch.bfloat16, True, 90)
    assert [len(forward), len(backward)] == [1, 3]


@pytest.mark.parametrize(("dtype", "width", "unit"), [(torch.half, 72, 8), (torch.half, 12, 1), (torch.float, 64, 8)])
def test_whole_vectors_are_promised_where_strides_allow(dtype, width, unit):
    forward, backward = calls(16, dtype, False, 90, width=width)
    assert {one.options.get("ALIGNED") for one in forward + backward} == {unit}


def test_angles_are_packed_once_each():
    cos, sin = torch.rand(2, 5, 3, dtype=torch.float64).repeat_interleave(2, dim=2)
    table = pairs(cos, sin)
    assert table.dtype == torch.float32 and table.is_contiguous()
    assert torch.equal(table[..., 0], cos[:, ::2].float()) and torch.equal(table[..., 1], sin[:, ::2].float())


def test_wide_heads_are_refused():
    (reason,) = BACKEND.unsupported(torch.empty(1, 1, 3, 1, 136, device="meta"), None, None)
    assert "136" in reason and "128" in reason


def test_float32_vectors_beside_16_bit_heads():
    """Rotated queries and keys are rounded to 16 bits: so are the sums over them, float32 though their dtype is."""
    case = next(case for case in OP.cases if case.id == "float16_weights")
    inputs = case.inputs(torch.float32)
    inputs |= {"qkv": inputs["qkv"].half()} | {name: inputs[name].float() for name in ("q_weight", "k_weight", "bias")}
    upstream = {"result 0": random_like(outputs(OP, reference(OP), inputs)["result 0"])}
    got = gradients(OP, OP.bind(BACKEND), inputs, upstream)
    exact = gradients(OP, reference(OP), as_float64(inputs), as_float64(upstream))
    for name, want in exact.items():
        assert got[name].dtype == (torch.float16 if name.endswith("qkv") else torch.float32)
        error, size = (float(t.abs().max()) for t in (got[name] - want, want))
        assert error <= 4 * torch.finfo(torch.float16).eps * size, f"{name}: {error:.2e} of {size:.2e}"


@pytest.mark.skipif(not INTERPRETED, reason="on the CPU")
@pytest.mark.parametrize("programs", [1, 256, 257, 600])
def test_partials_of_many_programs_are_all_summed(programs):
    q_partials, k_partials = torch.randn(2, programs, 12), torch.randn(2 * programs, 12)  # queries and values; keys
    into = torch.full((36,), torch.nan)
    sums(3, 12, q_partials, k_partials, into, into[12:], programs, 2 * programs)
    assert torch.allclose(into.view(3, 12)[::2], q_partials.sum(1), atol=1e-4)
    assert torch.allclose(into[12:24], k_partials.sum(0), atol=1e-4)
    half = torch.full((12,), torch.nan, dtype=torch.float16)
    sums(2, 12, q_partials, k_partials, torch.empty(12), half, programs, 2 * programs)
    assert torch.allclose(half.float(), k_partials.sum(0), atol=1e-4, rtol=1e-3)


def forced(monkeypatch, **configs: LaunchConfig) -> None:
    for name, config in configs.items():
        monkeypatch.setattr(f"kernels.rope_attention.triton_impl.{name}", lambda *_, config=config: config)


@pytest.mark.parametrize("keys_in_smem", [False, True])
def test_other_configurations_compute_the_same(keys_in_smem, monkeypatch):
    """Every configuration is a number to edit: both loops, several tiles, ragged ones, in float32."""
    case = next(case for case in OP.cases if case.id == "width_72")
    inputs = case.inputs(torch.float32)
    upstream = {"result 0": random_like(outputs(OP, reference(OP), inputs)["result 0"])}
    exact = gradients(OP, reference(OP), as_float64(inputs), as_float64(upstream), keep=True)
    forced(
        monkeypatch,
        forward_config=LaunchConfig(16, 32, 4, keys_in_smem=keys_in_smem),
        dq_config=LaunchConfig(16, 16, 4, keys_in_smem=keys_in_smem),
        dkdv_config=LaunchConfig(16, 16, 4, keys_in_smem=keys_in_smem),
    )
    got = gradients(OP, OP.bind(BACKEND), inputs, upstream, keep=True)
    for name, want in exact.items():
        assert float((got[name] - want).abs().max()) <= 2e-6 * float(want.abs().max()), name
