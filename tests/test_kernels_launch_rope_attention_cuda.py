"""Launch configurations of the CUDA backend of `rope_attention`: properties that csrc/rope_attention/ relies on."""

import pytest
import torch

from kernels.rope_attention.cuda_impl import (
    BACKEND,
    LaunchConfig,
    backward_bytes,
    backward_config,
    forward_config,
    has_own_kernel,
    kernel_width,
    max_width,
    smem_row_bytes,
)

LIMITS = {"sm_90": 227 << 10, "sm_80": 163 << 10, "sm_86": 99 << 10}
TOKENS, WIDTHS = (1, 16, 33, 64, 250, 256, 257, 1024, 5000), (2, 32, 64, 72, 80, 96, 128)


@pytest.mark.parametrize("limit", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_rows_fill_tiles_and_fit_in_shared_memory(itemsize, limit):
    for tokens in TOKENS:
        for width in (width for width in WIDTHS if width <= max_width(itemsize)):
            columns = kernel_width(width, itemsize)
            config = forward_config(tokens, width, itemsize, limit)
            rows, step = (32 if itemsize == 2 and columns <= 72 else 16), (64 if itemsize == 2 else 32)
            assert config.queries % rows == 0 and config.keys % step == 0 and 1 <= config.warps <= 4
            head_in_smem = has_own_kernel(width, itemsize) and config.keys >= tokens and config.queries == config.keys
            assert head_in_smem or config.queries <= config.warps * rows
            # With the weights of the norms and the bias, two blocks of a Hopper or A100 multiprocessor, one elsewhere.
            used = (config.queries + 2 * config.keys) * smem_row_bytes(columns, itemsize) + 20 * columns
            assert used <= limit
            config = backward_config(tokens, width, itemsize, limit)
            head_in_smem = has_own_kernel(width, itemsize) and config.keys >= tokens and config.queries == config.keys
            rows, block = (32, 128) if head_in_smem else (16, 64)
            assert config.keys == rows * config.warps and 1 <= config.warps <= 8
            assert config.queries % 32 == 0 and (config.queries >= tokens or config.queries % block == 0)
            assert backward_bytes(config, columns, itemsize, block) <= limit


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 80), (torch.bfloat16, 136)])
def test_wider_heads_than_kernels_have_columns_are_refused(dtype, width):
    assert not BACKEND.unsupported(torch.empty(1, 1, 3, 1, width - 8, dtype=dtype, device="meta"), None, None)
    (reason,) = BACKEND.unsupported(torch.empty(1, 1, 3, 1, width, dtype=dtype, device="meta"), None, None)
    assert reason == f"heads are {width} wide, above {width - 8} in {dtype}"


def test_more_samples_than_a_grid_has_rows_are_refused():
    assert not BACKEND.unsupported(torch.empty(65535, 1, 3, 1, 8, device="meta"), None, None)
    (reason,) = BACKEND.unsupported(torch.empty(65536, 1, 3, 1, 8, device="meta"), None, None)
    assert reason == "65536 samples, above 65535"


def test_heads_of_the_models_are_in_shared_memory():
    assert forward_config(256, 72, 2) == LaunchConfig(256, 256, 4)
    assert backward_config(256, 72, 2) == LaunchConfig(256, 256, 8)
    assert 2 * (3 * 256 * smem_row_bytes(72, 2) + 20 * 72 + 1024) <= 228 << 10, "two blocks to a multiprocessor"
    assert smem_row_bytes(72, 2) == 144 and smem_row_bytes(64, 2) == 144, "rows of 9 units of 16 bytes: no conflicts"
