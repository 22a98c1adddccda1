"""A set of latents in the memory of devices, spread over them, and samples made of it by a device's own arithmetic.

Device r of `world_size` holds samples N·r // world_size to N·(r + 1) // world_size as they are stored, and their mirror
images behind them unless the set is not mirrored. float16 and bfloat16 are widened when a sample is made; what comes of
it is what `lightningdit.data.LatentDataset.batch` makes of the same place of the files, bit for bit.
"""

import logging
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from lightningdit.data import LatentDataset
from lightningdit.latents_shards import parts_of

log = logging.getLogger(__name__)

CHUNK_BYTES = 32 * 2**20  # that a thread reads at once
READERS = 4  # threads: those of one alone would wait for each other's reading and copying
PROGRESS_SECONDS = 10.0


def device_bytes(
    count: int, shape: Sequence[int], *, parts: int, mirrors: bool, dtype: torch.dtype, processes: int
) -> int:
    """Bytes on each device of `count` latents of `shape` over so many: `parts` numbers for each, held in `dtype`."""
    return -(-count // processes) * (1 + mirrors) * parts * math.prod(shape) * dtype.itemsize


class DeviceLatents:
    """Part `rank` of `world_size` of a set, on `device`.

    Attributes: `data`; `rows` [(1 or 2)·n, (1 or 2 parts)·C·H·W] in the set's `memory_dtype`, None before `load`.
    """

    def __init__(self, data: LatentDataset, device: torch.device | str, rank: int = 0, world_size: int = 1):
        self.data, self.device, self.rank, self.world_size = data, torch.device(device), rank, world_size
        self._bounds = len(data) * np.arange(world_size + 1) // world_size
        self._sizes = np.diff(self._bounds)
        self.rows: torch.Tensor | None = None
        statistics = data.statistics
        self._mean, self._std = (v.to(self.device).view(-1, 1, 1) for v in (statistics.mean, statistics.std))  # [C,1,1]

    @property
    def bytes(self) -> int:
        """Bytes that the largest part takes on its device."""
        data = self.data
        return device_bytes(
            len(data),
            data.shape,
            parts=parts_of(data.store),
            mirrors=data.latent_flip,
            dtype=data.memory_dtype,
            processes=self.world_size,
        )

    def load(self) -> None:
        """Read this part of the files, unless it is here; how far it is, and at which rate, is logged.

        Raises LatentsError where a shard has been truncated.
        """
        if self.rows is not None:
            return
        data, size = self.data, int(self._sizes[self.rank])
        width = parts_of(data.store) * math.prod(data.shape)
        rows = torch.empty((1 + data.latent_flip) * size, width, dtype=data.memory_dtype, device=self.device)
        step, begin = max(CHUNK_BYTES // data.row_bytes, 1), time.perf_counter()
        spans = [(start, min(start + step, size)) for start in range(0, size, step)]
        said = begin
        self._wait()  # the memory may be that of tensors that are still in use; it is filled in other streams
        with ThreadPoolExecutor(READERS, "latents", torch.set_num_threads, (1,)) as pool:
            todo = [(mirrored, *span) for mirrored in (False, True)[: 1 + data.latent_flip] for span in spans]
            for done, _ in enumerate(pool.map(lambda which: self._fill(rows, *which), todo), 1):
                if (now := time.perf_counter()) - said > PROGRESS_SECONDS:
                    said = now
                    log.info("%s: read %.0f %% of this process's part", data.path, 100 * done / len(todo))
        self._wait()
        self.rows, seconds = rows, time.perf_counter() - begin
        read = (1 + data.latent_flip) * size * data.row_bytes
        log.info(
            "%s: %.2f GiB of latents in %s on %s%s, read in %.1f s (%.2f GB/s)",
            data.path,
            rows.nbytes / 2**30,
            str(rows.dtype).removeprefix("torch."),
            self.device.type,
            f" of each of {self.world_size} processes" if self.world_size > 1 else "",
            seconds,
            read / 1e9 / seconds,
        )

    def _fill(self, rows: torch.Tensor, mirrored: bool, start: int, stop: int) -> None:
        """Read rows `start` to `stop` of this part; they are rounded, if at all, on the device."""
        first, cuda = int(self._bounds[self.rank]), self.device.type == "cuda"
        content = self.data.consecutive(first + start, first + stop, mirrored=mirrored, pin_memory=cuda)
        behind = int(mirrored) * int(self._sizes[self.rank])
        rows[behind + start : behind + stop].copy_(content.to(self.device, non_blocking=cuda))

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        """Give the memory back; `load` reads it again."""
        self.rows = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def places(self, indices: np.ndarray, flips: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rank that holds each sample [B], and its row there, of the mirror image where `flips` says so."""
        ranks = np.searchsorted(self._bounds, indices, side="right") - 1
        return ranks, indices - self._bounds[ranks] + flips * self._sizes[ranks]

    def samples(self, rows: torch.Tensor, places: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        """Normalised samples [B, C, H, W] float32 of rows as they are held, at `places` [B].

        noise: [B, C·H·W], by which moments are drawn; None where no moments are stored.
        """
        data = self.data
        stored = rows.index_select(0, places).float().view(len(places), parts_of(data.store), -1)
        # Products and sums one after the other, as on the host: fused, they would be rounded once.
        x = stored[:, 0] if noise is None else (noise * stored[:, 1]).add_(stored[:, 0])
        x = x.view(-1, *data.shape)
        if data.latent_norm:
            x.sub_(self._mean).div_(self._std)
        if data.statistics.multiplier != 1:
            x.mul_(data.statistics.multiplier)
        return x
