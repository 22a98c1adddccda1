"""Weight gradients in Triton: one launch for all layers, so that tiles of one fill the wave that another leaves.

    N, O, I          tokens; of one layer, widths of its result and of its input
    BO, BI + BI2     rows and columns of a tile, held as two tiles [BO, BI] and [BO, BI2] side by side
    BN               tokens that one step of the products takes

A program sums one tile of one layer's [O, I] over all tokens. Both factors lie with the tokens outermost, which the
tensor memory accelerator and `wgmma` take as it is: nothing is transposed or held in registers. Where even together the
tiles are few, each sum is split into parts, which a second kernel adds up in a fixed order.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.backends.descriptors import DTYPES, aligned_rows, alignment_reasons, backend, tensor_descriptor
from kernels.backends.triton_launch import launch, num_sms, operator, unsupported_reasons
from kernels.weight_gradients import tokens as tokens_of


@dataclass(frozen=True)
class LaunchConfig:
    """Launch configuration.

    Attributes:
        rows: BO; a power of two, 64 for each four warps.
        columns, right_columns: BI and BI2, two powers of two, since one would be 256 or 128.
        depth: BN.
        stages: steps whose operands are in flight at once; they take most of an SM's shared memory.
        warps: of a program.
    """

    rows: int = 128
    columns: int = 128
    right_columns: int = 64
    depth: int = 64
    stages: int = 4
    warps: int = 8

    @property
    def width(self) -> int:
        return self.columns + self.right_columns

    def count(self, out: int, inner: int) -> int:
        return triton.cdiv(out, self.rows) * triton.cdiv(inner, self.width)


#: 128 × 192: the four layers of XL are 648 of them, 4.91 waves on 132 SMs with nothing beyond an edge. Others
#: that compile for sm_90 without spills, to be timed on a GPU: (128, 128, 128, stages=3), (256, 64, 32).
CONFIG = LaunchConfig()
#: Assumptions of `parts`: FLOP/s of products, bytes/s of sums in parts, fewest tokens of a part, most parts.
PRODUCTS, TRAFFIC, LEAST_TOKENS, MOST_PARTS = 7e14, 4e12, 1024, 8
#: The kernel has arguments for so many.
MOST_LAYERS = 4
#: Elements of a program of the second kernel.
SUM_BLOCK = 1024


def parts(widths: list[tuple[int, int]], tokens: int, num_sms: int, config: LaunchConfig = CONFIG) -> int:
    """Number of parts of each sum over the tokens: fuller waves are to save more than adding up the parts costs."""
    tiles = sum(config.count(*pair) for pair in widths)
    elements = sum(out * inner for out, inner in widths)
    seconds = 2 * config.rows * config.width * tokens * num_sms / PRODUCTS

    def cost(count: int) -> float:
        waves = -(-tiles * count // num_sms)
        return waves * seconds / count + (0 if count == 1 else elements * (8 * count + 2) / TRAFFIC)

    return min(range(1, max(1, min(MOST_PARTS, tokens // LEAST_TOKENS)) + 1), key=cost)


@triton.jit
def _sum_tile(
    d_output_desc, x_desc, x_right_desc, out_ptr, tile, first, end, O, I,
    BO: tl.constexpr, BI: tl.constexpr, BI2: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out[o, i] = Σ_n d_output[n, o] · x[n, i] for one tile [BO, BI + BI2] and the tokens n from `first` to `end`.

    Tiles that run at the same time are neighbours in both directions, so that they read the same tokens together:
    numbers grow along the shorter side.

    Args:
        d_output_desc [N, O]; x_desc [N, I] in blocks [BN, BI], x_right_desc the same in blocks [BN, BI2].
        out_ptr [O, I], result.
    """
    tiles_down, tiles_across = tl.cdiv(O, BO), tl.cdiv(I, BI + BI2)
    if tiles_down < tiles_across:
        row, col = (tile % tiles_down) * BO, (tile // tiles_down) * (BI + BI2)
    else:
        row, col = (tile // tiles_across) * BO, (tile % tiles_across) * (BI + BI2)
    acc = tl.zeros((BO, BI), tl.float32)  # [BO, BI]
    acc_right = tl.zeros((BO, BI2), tl.float32)  # [BO, BI2]
    for n in tl.range(first, end, BN, num_stages=STAGES):
        d_output_t = d_output_desc.load([n, row]).T  # [BO, BN]
        acc = tl.dot(d_output_t, x_desc.load([n, col]), acc)  # [BO, BI]
        acc_right = tl.dot(d_output_t, x_right_desc.load([n, col + BI]), acc_right)  # [BO, BI2]
    _store_tile(acc, out_ptr, row, col, O=O, I=I)
    _store_tile(acc_right, out_ptr, row, col + BI, O=O, I=I)


@triton.jit
def _store_tile(x, ptr, row, col, O, I):
    """Store x [R, C] at (row, col) of a matrix [O, I], in its dtype; what lies outside is left out."""
    rows, cols = row + tl.arange(0, x.shape[0]), col + tl.arange(0, x.shape[1])  # [R], [C]
    ptrs = ptr + rows.to(tl.int64)[:, None] * I + cols[None, :]  # [R, C]
    tl.store(ptrs, x.to(ptr.dtype.element_ty), (rows < O)[:, None] & (cols < I)[None, :])


@triton.jit
def weight_gradients_kernel(
    d_output0, x0, x0_right, O0, I0, d_output1, x1, x1_right, O1, I1,
    d_output2, x2, x2_right, O2, I2, d_output3, x3, x3_right, O3, I3,
    out_ptr, N, tokens_each, elements,
    BO: tl.constexpr, BI: tl.constexpr, BI2: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Tiles of all layers along the first axis of the grid, parts of the tokens along the second.

    Layers come one by one because a launch passes descriptors as arguments, not in tuples; None where there is none.

    Args:
        d_output…, x…, x…_right, O…, I…: of four layers, as `_sum_tile` takes them.
        out_ptr [parts, elements]: the layers' [O, I] one after the other, `elements` together; float32 if parts > 1.
        tokens_each: tokens of a part.
    """
    tile, part = tl.program_id(0), tl.program_id(1)
    out_ptr += part.to(tl.int64) * elements
    first = part * tokens_each
    end = tl.minimum(first + tokens_each, N)
    d_outputs, Os, Is = (d_output0, d_output1, d_output2, d_output3), (O0, O1, O2, O3), (I0, I1, I2, I3)
    xs, x_rights = (x0, x1, x2, x3), (x0_right, x1_right, x2_right, x3_right)
    for layer in tl.static_range(4):
        O, I = Os[layer], Is[layer]
        if O is not None:
            tiles = tl.cdiv(O, BO) * tl.cdiv(I, BI + BI2)
            if (tile >= 0) & (tile < tiles):
                _sum_tile(
                    d_outputs[layer], xs[layer], x_rights[layer], out_ptr, tile,
                    first=first, end=end, O=O, I=I, BO=BO, BI=BI, BI2=BI2, BN=BN, STAGES=STAGES,
                )  # fmt: skip
            tile -= tiles
            out_ptr += O.to(tl.int64) * I


@triton.jit
def weight_gradients_sum_kernel(partial_ptr, sum_ptr, parts, elements, BLOCK: tl.constexpr):
    """sum[e] = Σ partial[:, e] for BLOCK elements e, always in the same order.

    Args:
        partial_ptr [parts, elements] float32; sum_ptr [elements].
    """
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = offsets < elements  # [BLOCK]
    acc = tl.zeros([BLOCK], tl.float32)  # [BLOCK]
    ptrs = partial_ptr + offsets  # [BLOCK]
    for _ in range(parts):
        acc += tl.load(ptrs, mask, other=0.0)  # [BLOCK]
        ptrs += elements  # [BLOCK]
    tl.store(sum_ptr + offsets, acc.to(sum_ptr.dtype.element_ty), mask)


@operator("weight_gradients")
def flat_weight_gradients(d_outputs: list[torch.Tensor], inputs: list[torch.Tensor]) -> torch.Tensor:
    """All layers' gradients in one vector, one after the other."""
    first, tokens = d_outputs[0], tokens_of(d_outputs[0])
    widths = _widths(d_outputs, inputs)
    elements, count = sum(out * inner for out, inner in widths), parts(widths, tokens, num_sms())
    tokens_each = triton.cdiv(triton.cdiv(tokens, count), CONFIG.depth) * CONFIG.depth
    result = torch.empty(elements, dtype=first.dtype, device=first.device)
    partial = result if count == 1 else torch.empty(count, elements, device=first.device)
    layers = [value for pair in zip(d_outputs, inputs, strict=True) for value in _layer_arguments(*pair)]
    layers += [None] * (MOST_LAYERS * 5 - len(layers))
    launch(
        weight_gradients_kernel,
        (sum(CONFIG.count(*pair) for pair in widths), count),
        *layers,
        *(partial, tokens, tokens_each, elements),
        BO=CONFIG.rows,
        BI=CONFIG.columns,
        BI2=CONFIG.right_columns,
        BN=CONFIG.depth,
        STAGES=CONFIG.stages,
        num_warps=CONFIG.warps,
    )
    if count > 1:
        launch(
            weight_gradients_sum_kernel,
            (triton.cdiv(elements, SUM_BLOCK),),
            *(partial, result, count, elements),
            BLOCK=SUM_BLOCK,
            num_warps=4,
        )
    return result


def _layer_arguments(d_output: torch.Tensor, x: torch.Tensor) -> list:
    """The kernel's arguments for one layer: d_output, x in blocks of BI and of BI2 columns, O, I."""
    d_output, x = aligned_rows(d_output), aligned_rows(x)
    blocks = ((d_output, CONFIG.rows), (x, CONFIG.columns), (x, CONFIG.right_columns))
    return [
        *(tensor_descriptor(rows, CONFIG.depth, columns) for rows, columns in blocks),
        d_output.shape[1],
        x.shape[1],
    ]


def _widths(d_outputs: list[torch.Tensor], inputs: list[torch.Tensor]) -> list[tuple[int, int]]:
    return [(d_output.shape[-1], x.shape[-1]) for d_output, x in zip(d_outputs, inputs, strict=True)]


def weight_gradients(d_outputs, inputs):
    flat = flat_weight_gradients(list(d_outputs), list(inputs))
    return split(flat, _widths(d_outputs, inputs))


def split(flat: torch.Tensor, widths: list[tuple[int, int]]) -> tuple[torch.Tensor, ...]:
    """What the operator returns, as a view `[O, I]` for each layer."""
    pieces = flat.split([out * inner for out, inner in widths])
    return tuple(piece.view(pair) for piece, pair in zip(pieces, widths, strict=True))


def unsupported(d_outputs, inputs):
    tensors = [*d_outputs, *inputs]
    reasons = unsupported_reasons(*tensors, dtypes=DTYPES)
    reasons += alignment_reasons(tensors[0].element_size(), *(tensor.shape[-1] for tensor in tensors))
    if len(d_outputs) > MOST_LAYERS:
        reasons.append(f"{len(d_outputs)} layers are more than {MOST_LAYERS}")
    if tokens_of(tensors[0]) >= 2**31 - CONFIG.depth:
        reasons.append(f"{tokens_of(tensors[0])} tokens are more than 32-bit numbers count")
    return reasons


BACKEND = backend(weight_gradients, unsupported, torch_op="ldit::weight_gradients", config=CONFIG)
