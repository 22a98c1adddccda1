"""A linear layer and SwiGLU in Triton, by the tensor memory accelerator and `wgmma`.

    M, D, H      rows of x, columns of x, columns of each half of the product
    BM, BH, BD   rows and columns of a tile, columns of x that one step of the products takes

A program takes one tile after another, the same columns of both halves in each, so that gate and up of an element meet
in one thread. While a tile is activated and stored, the operands of the next are in flight.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.backends.descriptors import DTYPES, aligned_rows, alignment_reasons, backend, tensor_descriptor
from kernels.backends.layout import contiguous
from kernels.backends.triton_launch import launch, num_sms, operator, unsupported_reasons


@dataclass(frozen=True)
class LaunchConfig:
    """Launch configuration.

    Attributes:
        rows: BM; 64 for each four warps.
        columns: BH, of each of a tile's two products.
        depth: BD, of one step of the products.
        stages: steps whose operands are in flight at once; with what is stored they fill an SM's shared memory.
        warps: of a program.
        flatten: whether the steps of all tiles are one loop, so that the next tile's operands come during the epilogue.
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


#: Compiles for sm_90 without spills, as do stages=3 and flatten=False, to be timed on a GPU.
CONFIG = LaunchConfig()


@triton.jit
def add_bias(x, bias_ptr, first_col, H, BH: tl.constexpr):
    """x [BM, BH] plus BH numbers of the bias from `first_col` on, in float32; those from H on are 0."""
    cols = first_col + tl.arange(0, BH)  # [BH]
    return x + tl.load(bias_ptr + cols, cols < H, other=0.0).to(tl.float32)[None, :]  # [BM, BH]


@triton.jit
def linear_swiglu_kernel(
    x_desc, gate_weight_desc, up_weight_desc, bias_ptr, gate_desc, up_desc, activated_desc, M, H, D,
    BM: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """gate = x · gate_weightᵀ, up = x · up_weightᵀ, and activated = silu(gate + bias) · (up + bias).

    Args:
        x_desc [M, D]; gate_weight_desc, up_weight_desc [H, D]; bias_ptr [2H] or None; gate_desc, up_desc,
        activated_desc [M, H], results.
    """
    tiles_across = tl.cdiv(H, BH)
    tiles = tl.cdiv(M, BM) * tiles_across
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        row, col = (tile // tiles_across) * BM, (tile % tiles_across) * BH
        gate = tl.zeros((BM, BH), tl.float32)  # [BM, BH]
        up = tl.zeros((BM, BH), tl.float32)  # [BM, BH]
        for d in tl.range(0, D, BD, num_stages=STAGES):
            x = x_desc.load([row, d])  # [BM, BD]
            gate = tl.dot(x, gate_weight_desc.load([col, d]).T, gate)  # [BM, BH]
            up = tl.dot(x, up_weight_desc.load([col, d]).T, up)  # [BM, BH]
        gate_rounded, up_rounded = gate.to(gate_desc.dtype), up.to(up_desc.dtype)  # [BM, BH] each
        gate_desc.store([row, col], gate_rounded)
        up_desc.store([row, col], up_rounded)
        # As rounded, because the backward pass has nothing else.
        gate, up = gate_rounded.to(tl.float32), up_rounded.to(tl.float32)  # [BM, BH] each
        if bias_ptr is not None:
            gate = add_bias(gate, bias_ptr, col, H, BH)  # [BM, BH]
            up = add_bias(up, bias_ptr + H, col, H, BH)  # [BM, BH]
        activated_desc.store([row, col], (gate / (1 + tl.exp(-gate)) * up).to(activated_desc.dtype))


@operator("linear_swiglu")
def linear_swiglu_fwd(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """On `[rows, D]`."""
    rows, width = x.shape
    hidden = weight.shape[0] // 2
    gate_up, activated = x.new_empty(rows, 2 * hidden), x.new_empty(rows, hidden)
    weight = aligned_rows(weight)
    launch(
        linear_swiglu_kernel,
        (min(CONFIG.count(rows, hidden), num_sms()),),
        tensor_descriptor(aligned_rows(x), CONFIG.rows, CONFIG.depth),
        *(tensor_descriptor(half, CONFIG.columns, CONFIG.depth) for half in weight.chunk(2)),
        contiguous(bias),
        *(tensor_descriptor(half, CONFIG.rows, CONFIG.columns) for half in (*gate_up.chunk(2, dim=1), activated)),
        *(rows, hidden, width),
        BM=CONFIG.rows,
        BH=CONFIG.columns,
        BD=CONFIG.depth,
        STAGES=CONFIG.stages,
        FLATTEN=CONFIG.flatten,
        num_warps=CONFIG.warps,
    )
    return gate_up, activated


def linear_swiglu(x, weight, *, bias=None):
    results = linear_swiglu_fwd(x.flatten(0, -2), weight, bias)
    return tuple(result.unflatten(0, x.shape[:-1]) for result in results)


def unsupported(x, weight, *, bias=None):
    reasons = unsupported_reasons(x, weight, dtypes=DTYPES) + unsupported_reasons(x, bias)
    return reasons + alignment_reasons(x.element_size(), x.shape[-1], weight.shape[0] // 2)


BACKEND = backend(linear_swiglu, unsupported, torch_op="ldit::linear_swiglu", config=CONFIG)
