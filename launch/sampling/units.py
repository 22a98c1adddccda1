"""Units and batches: which samples are computed together.

On a CPU products and convolutions round differently with the number of rows they are given. There network and decoder
are called with units of fixed membership: samples kU to (k + 1)U, filled up past the last one, whatever the size of a
batch and whoever computes it. Unit k is then the same bits in every run that compiles nothing (`sample.compile` none,
the default there): what a compiler makes of a network depends on its version and on the machine.

UNIT was chosen by times of a forward pass on one core of a server CPU, in ms per sample in batches of 4, 8, 16, 32 and
64: 6.8, 4.5, 3.2, 2.7, 2.9 (depth 6, width 128, 16 tokens), 32.8, 29.0, 28.1, 28.5, 30.2 (3, 384, 64) and 449, 432,
415, 408, 454 (3, 768, 256). With guidance the network sees twice as many rows.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch

from lightningdit.config import ModelConfig
from lightningdit.cost import forward_bytes_per_image

UNIT = 16
Rows = tuple[int, int]
#: Of free device memory, what a batch may take by the estimate. Assumed, as are the limits below: not measured yet.
SHARE_OF_MEMORY = 0.7
#: Tokens at once, beyond which a GPU gains nothing, and a killed process would only lose more.
MOST_TOKENS = 2**17
#: Images decoded at once on a GPU, and the bytes that each pixel then takes: of the published decoder in float32.
DECODED, DECODED_PIXEL = 32, 2560
#: Pixels decoded at once on a CPU.
DECODED_PIXELS = 4 * 256**2


def unit_of(device: torch.device) -> int:
    """Samples that are always computed together: UNIT on a CPU; 1 on other devices, which make no such promise."""
    return UNIT if device.type == "cpu" else 1


def decoded_at_once(device: torch.device, image_size: int) -> int:
    """Images that the decoder is called with: on a CPU a divisor of UNIT that the size of an image alone decides."""
    if device.type != "cpu":
        return DECODED
    return max(d for d in (1, 2, 4, 8, 16) if d == 1 or d * image_size**2 <= DECODED_PIXELS)


def batch_size(
    given: int | None, device: torch.device, config: ModelConfig, image_size: int, *, weight_bytes: int, workers: int
) -> int:
    """Samples that a process makes at once: what is given, else by memory.

    On a CPU a unit for each of `workers` threads; a number that is given is rounded up to whole units. On a GPU as many
    as the estimate says that fit into the memory that is free, with both halves of guidance, beside what the decoder
    takes; at most 2¹⁷ tokens.
    """
    if device.type == "cpu":
        return -(-(given or UNIT * workers) // UNIT) * UNIT
    if given is not None:
        return given
    free, _ = torch.cuda.mem_get_info(device)
    return fitting(free, config, image_size, weight_bytes)


def fitting(free: int, config: ModelConfig, image_size: int, weight_bytes: int) -> int:
    """Samples of a batch that `free` bytes of device memory take, at least 1."""
    decoding = DECODED * image_size**2 * DECODED_PIXEL
    of_one = 2 * forward_bytes_per_image(config, weight_bytes=weight_bytes) + 3 * 4 * image_size**2
    fits = int((SHARE_OF_MEMORY * free - decoding) // of_one)
    return max(1, min(fits, MOST_TOKENS // (2 * config.num_tokens)))


def rows_done(total: int, there: Iterable[Rows]) -> np.ndarray:
    """Whether each of samples 0 to `total` is in one of these stretches: bool [total]."""
    done = np.zeros(total, dtype=bool)
    for start, stop in there:
        done[start:stop] = True
    return done


def missing_units(done: np.ndarray, unit: int) -> np.ndarray:
    """The units of which a sample is not done, ascending."""
    padded = np.pad(done, (0, -len(done) % unit), constant_values=True)
    return np.flatnonzero(~padded.reshape(-1, unit).all(1))


def share_of(units: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """One stretch of the units that are missing, as long as every other process's."""
    first, last = (len(units) * r // world_size for r in (rank, rank + 1))
    return units[first:last]


def batches_of(units: Sequence[int] | np.ndarray, unit: int, size: int, total: int) -> Iterator[Rows]:
    """Batches of whole units, each a stretch of at most `size` samples, as even as they can be."""
    for run in np.split(np.asarray(units), np.flatnonzero(np.diff(units) > 1) + 1):
        count = -(-len(run) * unit // max(size, unit))
        edges = [len(run) * i // count for i in range(count + 1)] if len(run) else []
        for first, last in pairwise(edges):
            yield int(run[first]) * unit, min((int(run[last - 1]) + 1) * unit, total)


def rows_missing(rows: Rows, done: np.ndarray) -> list[Rows]:
    """The stretches of `rows` that are not done."""
    start, stop = rows
    missing = np.pad(~done[start:stop], 1)
    edges = (np.flatnonzero(np.diff(missing)) + start).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))
