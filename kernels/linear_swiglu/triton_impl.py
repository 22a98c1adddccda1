"""A linear layer and SwiGLU in Triton, by the tensor memory accelerator and `wgmma`.

A program takes tiles by turns, the same columns of both halves in each, so that gate and product of a number meet in
one thread. While a tile is activated and stored, the operands of the next are under way.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.backends.descriptors import DTYPES, backend, described, misaligned, table
from kernels.backends.triton_launch import launch, num_sms, operator, unsupported_reasons


@dataclass(frozen=True)
class LaunchConfig:
    """Launch configuration.

    Attributes:
        rows: of a tile; 64 for each four warps.
        columns: of each of a tile's two products.
        depth: of one step of the products.
        stages: steps whose operands are under way at once; with what is stored they fill a processor's shared memory.
        warps: of a program.
        flatten: whether steps of all tiles are one loop, so that the next tile's operands come during this one's end.
    """

    rows: int = 128
    columns: int = 128
    depth: int = 64
    stages: int = 4
    warps: int = 8
    flatten: bool = True

    def count(self, rows: int, hidden: int) -> int:
        """Tiles whose two products are the same columns of both halves."""
        return triton.cdiv(rows, self.rows) * triton.cdiv(hidden, self.columns)


#: Compiles for sm_90 without spills, as do stages=3 and flatten=False, for a GPU to judge.
CONFIG = LaunchConfig()


@triton.jit
def with_bias(values, bias, first, hidden, COLUMNS: tl.constexpr):
    column = first + tl.arange(0, COLUMNS)
    return values + tl.load(bias + column, column < hidden, other=0.0).to(tl.float32)[None, :]


@triton.jit
def linear_swiglu_kernel(
    x, gate_weight, up_weight, bias, gate_out, up_out, activated, rows, hidden, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, FLATTEN: tl.constexpr,
    BIASED: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(hidden, COLUMNS)
    tiles = tl.cdiv(rows, ROWS) * across
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        row, column = (tile // across) * ROWS, (tile % across) * COLUMNS
        gate = tl.zeros((ROWS, COLUMNS), tl.float32)
        up = tl.zeros((ROWS, COLUMNS), tl.float32)
        for step in tl.range(0, width, DEPTH, num_stages=STAGES):
            left = x.load([row, step])
            gate = tl.dot(left, gate_weight.load([column, step]).T, gate)
            up = tl.dot(left, up_weight.load([column, step]).T, up)
        narrow_gate, narrow_up = gate.to(gate_out.dtype), up.to(up_out.dtype)
        gate_out.store([row, column], narrow_gate)
        up_out.store([row, column], narrow_up)
        # As rounded, because the backward pass has nothing else.
        gate, up = narrow_gate.to(tl.float32), narrow_up.to(tl.float32)
        if BIASED:
            gate = with_bias(gate, bias, column, hidden, COLUMNS)
            up = with_bias(up, bias + hidden, column, hidden, COLUMNS)
        activated.store([row, column], (gate / (1 + tl.exp(-gate)) * up).to(activated.dtype))


@operator("linear_swiglu")
def linear_swiglu_fwd(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """On `[rows, D]`."""
    rows, width = x.shape
    hidden = weight.shape[0] // 2
    gate_up, activated = x.new_empty(rows, 2 * hidden), x.new_empty(rows, hidden)
    weight = table(weight)
    launch(
        linear_swiglu_kernel, (min(CONFIG.count(rows, hidden), num_sms()),),
        described(table(x), CONFIG.rows, CONFIG.depth),
        *(described(half, CONFIG.columns, CONFIG.depth) for half in weight.chunk(2)),
        None if bias is None else bias.contiguous(),
        *(described(half, CONFIG.rows, CONFIG.columns) for half in (*gate_up.chunk(2, dim=1), activated)),
        rows, hidden, width,
        ROWS=CONFIG.rows, COLUMNS=CONFIG.columns, DEPTH=CONFIG.depth, STAGES=CONFIG.stages, FLATTEN=CONFIG.flatten,
        BIASED=bias is not None, num_warps=CONFIG.warps,
    )  # fmt: skip
    return gate_up, activated


def linear_swiglu(x, weight, *, bias=None):
    results = linear_swiglu_fwd(x.flatten(0, -2), weight, bias)
    return tuple(result.unflatten(0, x.shape[:-1]) for result in results)


def unsupported(x, weight, *, bias=None):
    reasons = unsupported_reasons(x, weight, dtypes=DTYPES) + unsupported_reasons(x, bias)
    return reasons + misaligned(x.element_size(), x.shape[-1], weight.shape[0] // 2)


BACKEND = backend(linear_swiglu, unsupported, torch_op="ldit::linear_swiglu", config=CONFIG)
