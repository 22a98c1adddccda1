"""Training batches from a latents directory; samples are functions of (seed, epoch, index)."""

import logging
import math
import os
from pathlib import Path

import numpy as np
import torch

from common.seeds import generator, mix
from common.text import shortened
from lightningdit.config import DataConfig
from lightningdit.latents import (
    MANIFEST_FILE,
    LatentsError,
    LatentStatistics,
    Manifest,
    Store,
    manifest_in,
    read_manifest,
    read_statistics,
    shards_of,
)
from lightningdit.latents_shards import STORED, Shard, open_shard, parts_of
from lightningdit.latents_statistics import check_statistics

log = logging.getLogger(__name__)

_POSTERIOR_NOISE = 1  # a word of its seeds


class LatentDataset:
    """The samples of a latents directory (see `lightningdit.latents`), published ones too.

    latent_norm: normalise with `latents_stats.pt`; else only multiply by latent_multiplier.
    latent_flip: mirror half of the samples; else none.
    num_classes: if given, labels must be below it.
    verify: also compare every checksum of the manifest (reads everything once); None does so below 4 GiB.
    unfinished: open a set whose extraction lacks the manifest alone; else that is an error.
    latent_dtype: bfloat16 rounds what is stored to it (to nearest even) before a sample is made of it; else float32.

    Whatever is stored, samples are float32. Of moments (a mean and a standard deviation for each number) one is drawn
    when it is read, by noise from (seed, epoch, index): another in every epoch, and the same after a resume.

    Attributes: `shape` (C, H, W); `store` and `dtype`, what is stored; `memory_dtype`, the smallest that holds what
    samples are made of; `labels` [N] int64; `statistics` that undo the
    normalisation; `manifest` of the directory or None; `classes`, the names of the labels, or None. Opened files are
    not pickled, so data-loader workers may be forked or spawned; `threaded` tells the loader to use threads, as reading
    releases the GIL.

    Raises LatentsError, naming the file, where a shard is missing, truncated (also later, while batches are read) or of
    another kind, a checksum differs, statistics are missing or unusable, or a label is out of range or has no name.
    """

    threaded = True

    def __init__(
        self,
        path: str | Path,
        *,
        latent_norm: bool = True,
        latent_multiplier: float = 1.0,
        latent_flip: bool = True,
        num_classes: int | None = None,
        seed: int = 0,
        verify: bool | None = None,
        unfinished: bool = False,
        latent_dtype: torch.dtype = torch.float32,
    ):
        self.path, self.seed, self.latent_norm, self.latent_flip = Path(path), seed, latent_norm, latent_flip
        if not self.path.is_dir():
            raise LatentsError(
                f"{self.path} is not a directory; data_path holds latents shards, as extract writes them"
            )
        self.manifest: Manifest | None = manifest_in(self.path) if unfinished else read_manifest(self.path)
        self.classes = None if self.manifest is None else self.manifest.classes
        self._check_manifest(verify)
        self._shards = [Shard.read(p) for p in shards_of(self.path, self.manifest)]
        self.shape, self.store, self.dtype = self._common_kind()
        self.memory_dtype = torch.bfloat16 if latent_dtype == torch.bfloat16 else self.dtype
        counts = [shard.count for shard in self._shards]
        self._ends = np.cumsum(counts)
        self._compare_with_manifest(sum(counts))
        self._starts = self._ends - counts
        self._open()
        self._check_labels(num_classes)
        self.statistics = LatentStatistics.identity(self.shape[0], latent_multiplier)
        if latent_norm:
            self.statistics = read_statistics(self.path, self.shape[0], latent_multiplier)
        area = self.shape[1] * self.shape[2]
        self._mean, self._std = (v.numpy().repeat(area) for v in (self.statistics.mean, self.statistics.std))

    @classmethod
    def from_config(cls, config: DataConfig, seed: int) -> "LatentDataset":
        """The training set of a `data` section; its size and classes are logged.

        Raises LatentsError also where its statistics do not fit, see `check_statistics`.
        """
        latents = cls(
            config.data_path,
            latent_norm=config.latent_norm,
            latent_multiplier=config.latent_multiplier,
            latent_flip=config.latent_flip,
            num_classes=config.num_classes,
            seed=seed,
            verify=config.verify,
            latent_dtype=getattr(torch, config.latent_dtype),
        )
        if config.check_statistics:
            check_statistics(latents)
        classes = latents.classes or ()
        names = f" of {len(classes):,} classes ({shortened(classes, 3)})" if classes else ""
        log.info("%s: %s latents%s%s", latents.path, f"{len(latents):,}", names, latents._stored_otherwise())
        return latents

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_files": None, "labels": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ = state
        self._open()

    def flips(self, epochs, indices) -> np.ndarray:
        """Whether each sample is mirrored: bool [B] with probability 1/2, by a hash of (seed, epoch, index)."""
        if not self.latent_flip:
            return np.zeros(len(indices), dtype=bool)
        return (mix(self.seed, epochs, indices) >> np.uint64(63)).astype(bool)

    def batch(self, epochs, indices, flips=None, *, pin_memory: bool = False) -> dict[str, torch.Tensor]:
        """Samples `indices` [B] in their `epochs` [B] → {"x": [B, C, H, W] float32 normalised, "y": [B] int64}.

        flips: bool [B] instead of the hash's choice. pin_memory: return tensors in page-locked memory.
        Raises IndexError on an index outside the set.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if len(indices) and not (indices.min() >= 0 and indices.max() < len(self)):
            raise IndexError(f"indices run from {indices.min()} to {indices.max()}; the set has {len(self)} latents")
        epochs = np.asarray(epochs)
        flips = self.flips(epochs, indices) if flips is None else np.asarray(flips, dtype=bool)
        shape = (len(indices), math.prod(self.shape))
        # torch reuses pinned memory for the next batch; of NumPy's, large arrays are in huge pages.
        x = torch.empty(shape, pin_memory=True) if pin_memory else torch.from_numpy(np.empty(shape, np.float32))
        if self.store == "moments":
            self._draw(x, epochs, indices, flips)
        else:
            self.stored(indices, flips, out=x.numpy()[:, None])
        self._normalise(x.numpy())
        y = self.labels[torch.from_numpy(indices)]
        return {"x": x.view(-1, *self.shape), "y": y.pin_memory() if pin_memory else y}

    def stored(self, indices: np.ndarray, flips: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """What is stored of samples `indices` [B], not normalised: float32 [B, 1, C·H·W]; into `out` if given.

        Of moments it is [B, 2, C·H·W], the means and the standard deviations.
        """
        if out is None:
            out = np.empty((len(indices), parts_of(self.store), math.prod(self.shape)), np.float32)
        values = torch.from_numpy(out)
        if self.dtype == torch.float32:
            self._read(out.reshape(len(out), out[:1].size).view(np.uint8), indices, flips)
            return out if self.memory_dtype == self.dtype else values.copy_(values.to(self.memory_dtype)).numpy()
        content = np.empty((len(indices), self.row_bytes), np.uint8)
        self._read(content, indices, flips)
        values.copy_(torch.from_numpy(content).view(self.dtype).view(out.shape).to(self.memory_dtype))
        return out

    def consecutive(self, start: int, stop: int, *, mirrored: bool, pin_memory: bool = False) -> torch.Tensor:
        """What is stored of samples `start` to `stop`, in its dtype: [stop − start, 1 or 2 parts · C·H·W].

        By sequential reads. pin_memory: return a tensor in page-locked memory.
        """
        rows = torch.empty((stop - start, self.row_bytes), dtype=torch.uint8, pin_memory=pin_memory)
        first, last = np.searchsorted(self._ends, (start, stop - 1), side="right").tolist()
        for shard in range(first, last + 1):
            begin, end = max(start, int(self._starts[shard])), min(stop, int(self._ends[shard]))
            offset = int(self._offsets[shard, int(mirrored)]) + (begin - int(self._starts[shard])) * self.row_bytes
            self._read_whole(shard, rows[begin - start : end - start].flatten().numpy().data, offset)
        return rows.view(self.dtype)

    @property
    def row_bytes(self) -> int:
        """Bytes in a shard of what is stored of one image, its mirror image apart."""
        return self._shards[0].row_bytes

    def _draw(self, x: torch.Tensor, epochs: np.ndarray, indices: np.ndarray, flips: np.ndarray) -> None:
        """Fill x [B, C·H·W] with a sample of each posterior: `mean + std·noise`, noise by (seed, epoch, index)."""
        for row, epoch, index in zip(x, epochs.tolist(), indices.tolist(), strict=True):
            draw_noise(row, self.seed, int(epoch), index)
        moments = self.stored(indices, flips)
        np.multiply(x.numpy(), moments[:, 1], out=x.numpy())
        np.add(x.numpy(), moments[:, 0], out=x.numpy())

    def _read(self, rows: np.ndarray, indices: np.ndarray, flips: np.ndarray) -> None:
        """Fill the rows of bytes [B, row_bytes] with the samples as they are stored, by one positional read each.

        A short read of a truncated shard is an error that names it; in a memory map it would be a SIGBUS. np.memmap is
        not faster from the page cache (32 × 16 × 16 latents, batches of 128 on one core: 249,000 latents/s against
        239,000 row by row and 264,000 by an index for each shard; safetensors' slices 40,000).
        """
        shards = np.searchsorted(self._ends, indices, side="right")  # [B]
        places = indices - self._starts[shards]  # [B]
        offsets = self._offsets[shards, flips.astype(np.int64)] + places * rows.shape[1]  # [B]
        for row, shard, offset in zip(rows, shards.tolist(), offsets.tolist(), strict=True):
            if os.preadv(self._files[shard].fileno(), (row,), offset) != row.nbytes:
                raise self._truncated(shard)

    def _read_whole(self, shard: int, content: memoryview, offset: int) -> None:
        """Fill bytes from a place in a shard, in as many reads as the system makes of it."""
        while len(content):
            read = os.preadv(self._files[shard].fileno(), (content,), offset)
            if not read:
                raise self._truncated(shard)
            content, offset = content[read:], offset + read

    def _truncated(self, shard: int) -> LatentsError:
        return LatentsError(f"{self._shards[shard].path} has been truncated since it was opened")

    def _normalise(self, x: np.ndarray) -> None:
        """Normalise x [B, C·H·W] in place."""
        if self.latent_norm:
            np.subtract(x, self._mean, out=x)
            np.divide(x, self._std, out=x)
        if self.statistics.multiplier != 1:
            np.multiply(x, np.float32(self.statistics.multiplier), out=x)

    def _open(self) -> None:
        """Open the shards in this process.

        `_offsets` [shards, 2]: the byte of each file at which plain and mirrored latents begin.
        """
        self._files = [open_shard(shard.path) for shard in self._shards]
        self.labels = torch.cat([shard.labels() for shard in self._shards])
        self._offsets = np.array([[s.offsets[name] for name in STORED] for s in self._shards])

    def _check_manifest(self, verify: bool | None) -> None:
        if self.manifest is None:
            if verify:
                raise LatentsError(f"{self.path} has no {MANIFEST_FILE}, so there are no checksums to verify")
            return
        self.manifest.check(self.path, checksums=verify)

    def _compare_with_manifest(self, count: int) -> None:
        if self.manifest is None:
            return
        said = (self.manifest.count, self.manifest.shape, self.manifest.store, self.manifest.dtype)
        found = (count, self.shape, self.store, str(self.dtype).removeprefix("torch."))
        if said != found:
            raise LatentsError(
                f"{self.path / MANIFEST_FILE} says count, shape, store and dtype {said}, its shards hold {found}"
            )

    def _common_kind(self) -> tuple[tuple[int, int, int], Store, torch.dtype]:
        first = self._shards[0]
        for shard in self._shards:
            if shard.shape != first.shape:
                raise LatentsError(f"{shard.path} has latents of {shard.shape}, {first.path.name} of {first.shape}")
            if (shard.store, shard.dtype) != (first.store, first.dtype):
                raise LatentsError(
                    f"{shard.path} stores {shard.store} in {shard.dtype}, {first.path.name} {first.store} in "
                    f"{first.dtype}"
                )
        return first.shape, first.store, first.dtype

    def _stored_otherwise(self) -> str:
        rounded = ", rounded to bfloat16" if self.memory_dtype != self.dtype else ""
        if (self.store, self.dtype) == ("sample", torch.float32):
            return rounded
        return f", stored as {self.store} in {str(self.dtype).removeprefix('torch.')}{rounded}"

    def _check_labels(self, num_classes: int | None) -> None:
        named = None if self.classes is None else len(self.classes)
        for shard, labels in zip(self._shards, self.labels.split([s.count for s in self._shards]), strict=True):
            low, high = labels.numpy().min(initial=0), labels.numpy().max(initial=0)
            if low < 0 or (num_classes is not None and high >= num_classes):
                allowed = "not negative" if num_classes is None else f"0 to {num_classes - 1} (num_classes)"
                raise LatentsError(f"{shard.path} has labels from {low} to {high}; allowed are {allowed}")
            if named is not None and high >= named:
                raise LatentsError(
                    f"{shard.path} has labels from {low} to {high}, but {MANIFEST_FILE} has names of {named} classes"
                )


def draw_noise(out: torch.Tensor, seed: int, epoch: int, index: int) -> None:
    """Fill a contiguous float32 tensor with the noise by which a sample is drawn from the moments of image `index`."""
    out.normal_(generator=generator(seed, _POSTERIOR_NOISE, epoch, index))
