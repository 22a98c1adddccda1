"""Launch configurations and launches of the Triton backend of `weight_gradients`, without a GPU."""

import pytest
import torch

import kernels
from tests.kernel_launches import launches

impl = pytest.importorskip("kernels.weight_gradients.triton_impl")
OP = kernels.OPS["weight_gradients"]
XL = [(3456, 1152), (1152, 1152), (6144, 1152), (1152, 3072)]
B = [(2304, 768), (768, 768), (4096, 768), (768, 2048)]


def test_tiles_of_the_largest_model_fill_their_waves():
    """648 tiles of 128 × 192 in five waves of 132: 98 % of what the multiprocessors could do."""
    tiles = sum(impl.CONFIG.count(*pair) for pair in XL)
    assert tiles == 648 and all(out % impl.CONFIG.rows == 0 == inner % impl.CONFIG.width for out, inner in XL)
    assert tiles / (-(-tiles // 132) * 132) == pytest.approx(0.98, abs=2e-3)


@pytest.mark.parametrize(("widths", "tokens"), [(XL, 32_768), (B, 32_768), (B, 65_536), ([(128, 192)], 32_768)])
@pytest.mark.parametrize("num_sms", [78, 114, 132, 148])
def test_parts_keep_multiprocessors_busy(widths, tokens, num_sms):
    """No other number of parts would end sooner, by waves alone, by more than its sums in parts cost."""
    tiles = sum(impl.CONFIG.count(*pair) for pair in widths)
    numbers = sum(out * inner for out, inner in widths)

    def waves(parts: int) -> float:
        return -(-tiles * parts // num_sms) / parts

    chosen = impl.parts(widths, tokens, num_sms)
    wave = 2 * 128 * 192 * tokens * num_sms / impl.PRODUCTS
    for other in range(1, impl.MOST_PARTS + 1):
        gain = (waves(chosen) - waves(other)) * wave
        assert gain <= (other > 1) * numbers * (8 * other + 2) / impl.TRAFFIC + 1e-12, other


def test_parts_of_known_shapes():
    assert impl.parts(XL, 32_768, 132) == 1, "five full waves"
    assert impl.parts(B, 32_768, 132) > 1, "2.2 waves would take the time of three"
    assert impl.parts([(128, 192)], 32_768, 132) == impl.MOST_PARTS, "one tile for all multiprocessors"
    assert impl.parts([(128, 192)], 1500, 132) == 1, "a part has at least 1024 tokens"


@pytest.mark.parametrize(
    ("case", "names"),
    [("XL", ["weight_gradients_kernel"]), ("B", ["weight_gradients_kernel", "weight_gradients_sum_kernel"])],
)
def test_one_launch_for_all_layers(case, names):
    found, _ = launches(OP, next(c for c in OP.cases if c.id == case), torch.bfloat16)
    assert [launch.kernel.__name__ for launch in found] == names
    tiles, parts = found[0].grid
    widths = {"XL": XL, "B": B}[case]
    assert tiles == sum(impl.CONFIG.count(*pair) for pair in widths) and parts == impl.parts(widths, 32_768, 132)
    each = found[0].args[-2]
    assert each % impl.CONFIG.depth == 0 and (parts - 1) * each < 32_768 <= parts * each


def test_what_the_accelerator_cannot_read_is_refused():
    rows = torch.zeros(4, 8, dtype=torch.float16, device="meta")
    assert impl.unsupported([rows], [rows]) == []
    assert "rows of 6 numbers do not begin at multiples of 16 bytes" in impl.unsupported([rows], [rows[:, :6]])[0]
    assert "5 layers are more than 4" in impl.unsupported([rows] * 5, [rows] * 5)[0]
    assert "torch.float32" in impl.unsupported([rows.float()], [rows.float()])[0]


def test_tensors_may_begin_anywhere(hopper):
    """Descriptors take addresses that are multiples of 16 bytes: others are copied."""
    memory = torch.randn(16 * 8 + 1, generator=torch.Generator().manual_seed(0)).to(hopper, torch.float16)
    d_output, x = memory[1:].view(16, 8), memory[:-1].view(16, 8)
    (got,) = kernels.select("triton").weight_gradients([d_output], [x])
    torch.testing.assert_close(got, d_output.t() @ x, rtol=2e-3, atol=2e-3)
