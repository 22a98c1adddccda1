"""Weight gradients in Triton: one launch for all layers, so that tiles of one fill the wave that another leaves.

A program sums one tile of one layer's `[O, I]` over all tokens. Both factors lie with the tokens outermost, which the
tensor memory accelerator and `wgmma` take as it is: nothing is turned or held in registers. Where even together the
tiles are few, each sum is cut in parts that a second kernel adds up in a fixed order.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.backends.descriptors import DTYPES, backend, described, misaligned, table
from kernels.backends.triton_launch import launch, num_sms, operator, unsupported_reasons
from kernels.weight_gradients import tokens as tokens_of


@dataclass(frozen=True)
class LaunchConfig:
    """Launch configuration.

    Attributes:
        rows: of a program's tile, along O; a power of two, 64 for each four warps.
        columns, more_columns: along I, beside each other: two powers of two, since one would be 256 or 128.
        depth: tokens that one step adds.
        stages: steps whose operands are under way at once; they take most of a processor's shared memory.
        warps: of a program.
    """

    rows: int = 128
    columns: int = 128
    more_columns: int = 64
    depth: int = 64
    stages: int = 4
    warps: int = 8

    @property
    def width(self) -> int:
        return self.columns + self.more_columns

    def count(self, out: int, inner: int) -> int:
        return triton.cdiv(out, self.rows) * triton.cdiv(inner, self.width)


#: 128 × 192: the four layers of XL are 648 of them, 4.91 waves on 132 SMs with nothing beyond an edge. Others
#: that compile for sm_90 without spills, to be timed on a GPU: (128, 128, 128, stages=3), (256, 64, 32).
CONFIG = LaunchConfig()
#: What `parts` reckons with: FLOP/s of products, bytes/s of sums in parts, fewest tokens of a part, most parts.
PRODUCTS, TRAFFIC, LEAST_TOKENS, MOST_PARTS = 7e14, 4e12, 1024, 8
#: As many as the kernel has arguments for.
MOST_LAYERS = 4
#: Numbers for which the second kernel takes a program.
SUM_BLOCK = 1024


def parts(widths: list[tuple[int, int]], tokens: int, num_sms: int, config: LaunchConfig = CONFIG) -> int:
    """Into how many parts each sum over the tokens is cut: what makes waves full saves more than the parts cost."""
    tiles = sum(config.count(*pair) for pair in widths)
    numbers = sum(out * inner for out, inner in widths)
    seconds = 2 * config.rows * config.width * tokens * num_sms / PRODUCTS

    def cost(count: int) -> float:
        waves = -(-tiles * count // num_sms)
        return waves * seconds / count + (0 if count == 1 else numbers * (8 * count + 2) / TRAFFIC)

    return min(range(1, max(1, min(MOST_PARTS, tokens // LEAST_TOKENS)) + 1), key=cost)


@triton.jit
def _sum_of_tile(
    d_output, x, more_x, to, program, first, end, out, inner,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, MORE: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of a layer's sum over the tokens from `first` to `end`, stored at `to`.

    Tiles that run at the same time are neighbours in both directions, so that they read the same tokens together:
    numbers grow along the shorter side.
    """
    down, across = tl.cdiv(out, ROWS), tl.cdiv(inner, COLUMNS + MORE)
    if down < across:
        row, column = (program % down) * ROWS, (program // down) * (COLUMNS + MORE)
    else:
        row, column = (program // across) * ROWS, (program % across) * (COLUMNS + MORE)
    main = tl.zeros((ROWS, COLUMNS), tl.float32)
    more = tl.zeros((ROWS, MORE), tl.float32)
    for token in tl.range(first, end, DEPTH, num_stages=STAGES):
        left = d_output.load([token, row]).T
        main = tl.dot(left, x.load([token, column]), main)
        more = tl.dot(left, more_x.load([token, column + COLUMNS]), more)
    _store(main, to, row, column, out, inner, ROWS, COLUMNS)
    _store(more, to, row, column + COLUMNS, out, inner, ROWS, MORE)


@triton.jit
def _store(values, to, row, column, out, inner, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    place = to + rows.to(tl.int64)[:, None] * inner + columns[None, :]
    tl.store(place, values.to(to.dtype.element_ty), (rows < out)[:, None] & (columns < inner)[None, :])


@triton.jit
def weight_gradients_kernel(
    d_output0, input0, more0, out0, inner0, d_output1, input1, more1, out1, inner1,
    d_output2, input2, more2, out2, inner2, d_output3, input3, more3, out3, inner3,
    results, tokens, tokens_each, numbers,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, MORE: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Tiles of all layers along the first axis of the grid, parts of the tokens along the second.

    Layers come one by one because a launch passes descriptors as arguments, not in tuples; None where there is none.
    """
    program, part = tl.program_id(0), tl.program_id(1)
    to = results + part.to(tl.int64) * numbers
    begin = part * tokens_each
    end = tl.minimum(begin + tokens_each, tokens)
    d_outputs, inputs = (d_output0, d_output1, d_output2, d_output3), (input0, input1, input2, input3)
    mores, outs, inners = (more0, more1, more2, more3), (out0, out1, out2, out3), (inner0, inner1, inner2, inner3)
    for layer in tl.static_range(4):
        out, inner = outs[layer], inners[layer]
        if out is not None:
            tiles = tl.cdiv(out, ROWS) * tl.cdiv(inner, COLUMNS + MORE)
            if (program >= 0) & (program < tiles):
                _sum_of_tile(d_outputs[layer], inputs[layer], mores[layer], to, program, begin, end, out, inner,
                             ROWS, COLUMNS, MORE, DEPTH, STAGES)  # fmt: skip
            program -= tiles
            to += out.to(tl.int64) * inner


@triton.jit
def weight_gradients_sum_kernel(partial_sums, results, parts, numbers, BLOCK: tl.constexpr):
    """results[n] = Σ partial_sums[:, n], always in the same order."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < numbers
    total = tl.zeros([BLOCK], tl.float32)
    source = partial_sums + place
    for _ in range(parts):
        total += tl.load(source, inside, other=0.0)
        source += numbers
    tl.store(results + place, total.to(results.dtype.element_ty), inside)


@operator("weight_gradients")
def flat_weight_gradients(d_outputs: list[torch.Tensor], inputs: list[torch.Tensor]) -> torch.Tensor:
    """All of them behind each other."""
    first, tokens = d_outputs[0], tokens_of(d_outputs[0])
    widths = _widths(d_outputs, inputs)
    numbers, count = sum(out * inner for out, inner in widths), parts(widths, tokens, num_sms())
    tokens_each = triton.cdiv(triton.cdiv(tokens, count), CONFIG.depth) * CONFIG.depth
    result = torch.empty(numbers, dtype=first.dtype, device=first.device)
    partial_sums = result if count == 1 else torch.empty(count, numbers, device=first.device)
    layers = [value for pair in zip(d_outputs, inputs, strict=True) for value in _arguments(*pair)]
    layers += [None] * (MOST_LAYERS * 5 - len(layers))
    launch(
        weight_gradients_kernel, (sum(CONFIG.count(*pair) for pair in widths), count),
        *layers, partial_sums, tokens, tokens_each, numbers,
        ROWS=CONFIG.rows, COLUMNS=CONFIG.columns, MORE=CONFIG.more_columns, DEPTH=CONFIG.depth, STAGES=CONFIG.stages,
        num_warps=CONFIG.warps,
    )  # fmt: skip
    if count > 1:
        launch(
            weight_gradients_sum_kernel, (triton.cdiv(numbers, SUM_BLOCK),), partial_sums, result, count, numbers,
            BLOCK=SUM_BLOCK, num_warps=4,
        )  # fmt: skip
    return result


def _arguments(d_output: torch.Tensor, x: torch.Tensor) -> list:
    """What the kernel is told of a layer."""
    left, right = table(d_output), table(x)
    blocks = ((left, CONFIG.rows), (right, CONFIG.columns), (right, CONFIG.more_columns))
    return [*(described(rows, CONFIG.depth, columns) for rows, columns in blocks), left.shape[1], right.shape[1]]


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
    reasons += misaligned(tensors[0].element_size(), *(tensor.shape[-1] for tensor in tensors))
    if len(d_outputs) > MOST_LAYERS:
        reasons.append(f"{len(d_outputs)} layers are more than {MOST_LAYERS}")
    if tokens_of(tensors[0]) >= 2**31 - CONFIG.depth:
        reasons.append(f"{tokens_of(tensors[0])} tokens are more than 32-bit numbers count")
    return reasons


BACKEND = backend(weight_gradients, unsupported, torch_op="ldit::weight_gradients", config=CONFIG)
