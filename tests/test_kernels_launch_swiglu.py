"""Launch configurations and launches of the Triton backend of `swiglu`, without a GPU."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import kernels
from kernels.backends.triton_launch import INTERPRETED, recorded

swiglu = pytest.importorskip("kernels.swiglu.triton_impl")
OP = kernels.OPS["swiglu"]
DEVICE = "cpu" if INTERPRETED else "cuda"
SHAPES = [(1, 1), (15, 37), (32 * 256, 2048), (32 * 256, 2730), (128 * 256, 3072), (32 * 256, 4778), (10**7, 8)]


@pytest.mark.parametrize(("rows", "hidden"), SHAPES)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("vectors", swiglu.VECTORS.values())
def test_tiles(rows, hidden, itemsize, vectors):
    config = swiglu.launch_config(rows, hidden, itemsize, vectors)
    for number in (config.rows, config.columns, config.rows_each):
        assert number & (number - 1) == 0, "a power of two"
    assert config.columns < 2 * hidden and config.columns * itemsize <= 16 * 32 * config.warps, (
        "16 bytes of each thread"
    )
    assert (
        config.rows_each % config.rows == 0
        and config.rows * config.columns * itemsize <= vectors * 16 * 32 * config.warps
    )
    assert hidden % config.vector == 0 and config.vector * itemsize in (2, 4, 8, 16)
    assert -(-rows // config.rows_each) * 8 <= max(rows * 10 * 0.03, 8), "partial sums move less than 3 % of the rest"


def test_large_tiles_are_full_and_programs_many():
    for hidden in (2048, 3072):
        assert hidden % swiglu.launch_config(8192, hidden, 2, 4).columns == 0
    config = swiglu.launch_config(32_768, 3072, 2, 2)
    programs = 32_768 // config.rows_each * 3
    assert programs >= 8 * 132 and config.vector == 8
    assert swiglu.launch_config(8192, 2730, 2, 2).vector == 2


@pytest.mark.parametrize(
    ("case", "wanted", "names"),
    [
        ("XL", ["gate_up"], ["swiglu_fwd_kernel", "swiglu_bwd_kernel"]),
        ("XL_bias", ["gate_up"], ["swiglu_fwd_kernel", "swiglu_bwd_kernel"]),
        ("XL_bias", ["gate_up", "bias"], ["swiglu_fwd_kernel", "swiglu_bwd_kernel", "swiglu_sum_kernel"]),
    ],
)
def test_launches_of_a_step(case, wanted, names):
    """One kernel forward and one backward; a small one sums the bias gradient where it is asked for."""
    inputs = next(c for c in OP.cases if c.id == case).inputs(torch.bfloat16, "meta")
    for name in wanted:
        inputs[name].requires_grad_()
    with recorded(90) as launches:
        result = swiglu.swiglu(**inputs)
        result.backward(torch.empty_like(result))
    assert [launch.kernel.__name__ for launch in launches] == names
    for launch in launches:
        assert launch.grid[0] < 2**31 and len(launch.grid) == 1


def test_row_counts_may_be_symbolic():
    """A compiled graph serves another batch without being compiled again."""
    torch._dynamo.reset()
    ops = kernels.select("triton")
    bias = torch.linspace(-1, 1, 12, device=DEVICE, requires_grad=True)
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(ops.swiglu, fullgraph=True, backend=counter)
    for rows in (3, 40, 7):
        x = torch.linspace(-3, 3, rows * 12, device=DEVICE).view(rows, 12).clone()
        torch._dynamo.mark_dynamic(x, 0)
        got = function(x.requires_grad_(), bias=bias)
        torch.testing.assert_close(got, kernels.select("reference").swiglu(x, bias=bias))
        got.sum().backward()
    assert counter.frame_count == 1
