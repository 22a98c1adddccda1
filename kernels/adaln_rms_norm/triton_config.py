"""Launch configurations of the kernels in `triton_kernels.py`: pure functions of shape and architecture.

Compiled for sm_90 at D = 1152 in bfloat16 (instructions are those of a warp in the loop over tokens, a token takes all
warps of a program; no speed was measured):

    backward, blocks     warps  stages  registers  shared   instructions · warps
    2048, masked         8      2       74         16 KB    229 · 8
    1024 + 128           4      2       128        8 KB     313 · 4, the tail is read without a pipeline
    1024 + 128           2      3       144        18 KB    474 · 2
    1024 + 128           2      3       128        18 KB    spills
    … float32 stream     2      3       200        29 KB    445 · 2, spills at 192 on sm_80
    … and a bias         2      3       216        29 KB    spills at 200

At 4.3 TB/s a multiprocessor of an H200 has about 740 cycles for a token, 2960 instructions: two warps use a third.
Five programs of 200 registers fit, and hold two tokens each: 92 KB on the way, where 22 KB would cover the latency.
"""

from dataclasses import dataclass

#: Compute capability → multiprocessors, and bytes of shared memory of one of them.
NUM_SMS = {80: 108, 90: 132, 100: 148}
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
LEAST_SHARED = 99 * 1024  # of any other architecture since sm_80
REGISTERS = 65536  # of a multiprocessor

#: Lanes of a warp × columns for which a lane can hold vectors and sums: 18, which covers 1152 with two warps.
WARP_COLUMNS = 32 * 18


@dataclass(frozen=True)
class LaunchConfig:
    """Launch configuration of a pass over the tokens.

    Attributes:
        blocks: widths of the blocks of columns that hold one token, powers of two (BLOCK_D of the kernels).
        warps: of a program.
        stages: of the software pipeline; it holds `stages` − 1 tokens in shared memory; 1 is no pipeline.
        registers: of a thread, at most.
        programs: that a multiprocessor is meant to hold at a time.
        least_tokens: of a program, so that reading the vectors and writing the sums stays small beside them.
    """

    blocks: tuple[int, ...]
    warps: int
    stages: int
    registers: int
    programs: int
    least_tokens: int


@dataclass(frozen=True)
class VectorLaunchConfig:
    """Launch configuration of the kernel that adds up the sums of the chunks.

    Attributes:
        columns, samples: of the tile that a program adds up at a time.
        warps: of a program.
        registers: of a thread, at most.
    """

    columns: int
    samples: int
    warps: int
    registers: int


def column_blocks(width: int) -> tuple[tuple[int, ...], int]:
    """Widths of the blocks that hold `width` columns, and warps.

    As few warps as can hold a row, for they meet at barriers for each token. A block gives each lane at least two
    columns, as copies to shared memory move 32 bits or more; what is over is masked, less than two columns of a lane.
    """
    warps = 1
    while warps * WARP_COLUMNS < width and warps < 16:
        warps *= 2
    least = 64 * warps
    units = -(-width // least)
    return tuple(least << bit for bit in reversed(range(units.bit_length())) if units >> bit & 1), warps


def launch_config(
    width: int, token_bytes: int, architecture: int, registers: int, programs: int, least_tokens: int
) -> LaunchConfig:
    """Three stages where two tokens of `token_bytes` fit into shared memory, and as many of `programs` as fit.

    In a pipeline of two stages the copies would be issued just before they are waited for.
    """
    blocks, warps = column_blocks(width)
    registers = min(registers, 255, REGISTERS // (32 * warps)) // 8 * 8
    shared = SHARED.get(architecture, LEAST_SHARED)
    needed = 2 * token_bytes * sum(blocks) // width + 2048  # the statistics, the sums across warps, what is reserved
    stages = 3 if needed <= shared else 1
    fitting = min(programs, REGISTERS // (32 * warps * registers), shared // needed if stages == 3 else programs)
    return LaunchConfig(blocks, warps, stages, registers, max(1, fitting), least_tokens)


def forward_config(width: int, token_bytes: int, architecture: int) -> LaunchConfig:
    """`token_bytes`: of x and branch, for one token. A column takes x', gain, shift, gate."""
    registers = 4 * columns_per_lane(width) + 56
    return launch_config(width, token_bytes, architecture, registers, programs=8, least_tokens=8)


def backward_config(width: int, token_bytes: int, architecture: int, bias: bool) -> LaunchConfig:
    """`token_bytes`: of both upstream gradients, x' and branch, for one token.

    A column takes x̂, dx̂, gain, gate and three sums, four where a bias wants its gradient.
    """
    registers = (9 if bias else 8) * columns_per_lane(width) + 56
    return launch_config(width, token_bytes, architecture, registers, programs=5, least_tokens=16)


def columns_per_lane(width: int) -> int:
    blocks, warps = column_blocks(width)
    return -(-sum(blocks) // (32 * warps))


def chunking(samples: int, tokens: int, config: LaunchConfig, architecture: int) -> tuple[int, int]:
    """Chunks of each sample and tokens of a chunk: as many programs as run at a time, all of about the same length."""
    programs = NUM_SMS.get(architecture, NUM_SMS[90]) * config.programs
    most = -(-tokens // config.least_tokens)
    chunks = max(1, min(programs // samples, most))
    chunk_tokens = -(-tokens // chunks)
    return -(-tokens // chunk_tokens), chunk_tokens


def vector_config(samples: int) -> VectorLaunchConfig:
    """Eight float32 are one sector of memory, and 1152 / 8 programs are enough for every multiprocessor.

    All samples at once up to 128, so that loads wait for each other only from chunk to chunk; 128 bits for a lane. Left
    to itself the compiler takes 64 registers and spills; a multiprocessor has one program or two, so they are free.
    """
    held = 128 if samples > 64 else 64 if samples > 32 else 32
    return VectorLaunchConfig(columns=8, samples=held, warps=held // 16, registers=128)
