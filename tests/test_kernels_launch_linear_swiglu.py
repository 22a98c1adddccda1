"""Launches of the Triton backends of `linear_swiglu` and `swiglu_linear_grad`, without a GPU."""

import pytest
import torch

import kernels
from kernels.backends.triton_launch import num_sms, recorded
from tests.kernel_launches import launches

impl = pytest.importorskip("kernels.linear_swiglu.triton_impl")
grad = pytest.importorskip("kernels.swiglu_linear_grad.triton_impl")


def launched(name: str, case_id: str) -> list:
    op = kernels.OPS[name]
    return launches(op, next(case for case in op.cases if case.id == case_id), torch.bfloat16)[0]


@pytest.mark.parametrize("name", ["linear_swiglu", "swiglu_linear_grad"])
def test_every_processor_has_one_program_and_few_wait_at_the_end(name):
    """XL: 6144 tiles of 128 × 2·128, forward, and 3072 of 128 × 256, backward, on 132 multiprocessors."""
    first = launched(name, "XL")[0]
    assert first.grid == (132,)
    config = {"linear_swiglu": impl.CONFIG, "swiglu_linear_grad": grad.CONFIG}[name]
    tiles = config.count(32_768, 3072) // (1 if name == "linear_swiglu" else 2)
    assert tiles == {"linear_swiglu": 6144, "swiglu_linear_grad": 3072}[name]
    assert tiles / (-(-tiles // 132) * 132) > 0.96


def test_processors_are_those_of_the_device_meant():
    for architecture, count in ((80, 108), (90, 132), (100, 148)):
        with recorded(architecture):
            assert num_sms() == count


def test_few_tiles_have_as_many_programs():
    x, weight = torch.empty(200, 64, device="meta").half(), torch.empty(304 * 2, 64, device="meta").half()
    assert impl.CONFIG.count(200, 304) == 2 * 3
    with recorded(90) as found:
        impl.linear_swiglu(x, weight)
    assert [launch.grid for launch in found] == [(6,)]


def test_the_activation_is_that_of_the_product_as_rounded(hopper):
    """Bit for bit nearly everywhere; of the product before it was rounded, a fifth would be others."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(64, 72, generator=generator).to(hopper, torch.float16) for _ in range(2))
    gate_up, activated = impl.linear_swiglu(x, weight)
    want = kernels.select("reference").swiglu(gate_up)
    assert float((activated == want).float().mean()) > 0.97
    unrounded = kernels.select("reference").swiglu(x.float() @ weight.float().T).half()
    assert float((unrounded == want).float().mean()) < 0.8


def test_the_sum_for_the_bias_is_a_launch_of_its_own():
    assert [launch.kernel.__name__ for launch in launched("swiglu_linear_grad", "XL")] == [
        "swiglu_linear_grad_kernel",
        "swiglu_sum_kernel",
    ]


def test_both_halves_are_read_and_written_in_place():
    """Descriptors of the gate and of what it gates begin a half apart in the packed tensors, and never overlap."""
    described = [a for a in launched("linear_swiglu", "XL")[0].args if hasattr(a, "block_shape")]
    _, gate_weight, up_weight, gate_out, up_out, activated = described
    assert gate_weight.shape == up_weight.shape == (3072, 1152)
    assert up_weight.base.storage_offset() - gate_weight.base.storage_offset() == 3072 * 1152
    assert gate_out.shape == up_out.shape == activated.shape == (32_768, 3072)
    assert (up_out.base.storage_offset(), up_out.strides[0], activated.strides[0]) == (3072, 6144, 3072)
