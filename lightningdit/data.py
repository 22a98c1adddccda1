"""Training batches from a latents directory; samples are functions of (seed, epoch, index)."""

import logging
import math
import os
from pathlib import Path

import numpy as np
import torch

from common.seeds import mix
from common.text import shortened
from lightningdit.config import DataConfig
from lightningdit.latents import (
    MANIFEST_FILE,
    LatentsError,
    LatentStatistics,
    Manifest,
    Shard,
    open_shard,
    read_manifest,
    read_statistics,
    shards_of,
)

log = logging.getLogger(__name__)


class LatentDataset:
    """The samples of a latents directory (see `lightningdit.latents`), published ones too.

    latent_norm: normalise with `latents_stats.pt`; else only multiply by latent_multiplier.
    latent_flip: mirror half of the samples; else none.
    num_classes: if given, labels must be below it.
    verify: also compare every checksum of the manifest (reads everything once); None does so below 4 GiB.

    Attributes: `shape` (C, H, W); `labels` [N] int64; `statistics` that undo the normalisation; `manifest` of the
    directory or None; `classes`, the names of the labels, or None. Opened files are not pickled, so data-loader workers
    may be forked or spawned; `threaded` tells the loader to use threads, as reading releases the GIL.

    Raises LatentsError, naming the file, where a shard is missing, truncated (also later, while batches are read) or of
    another shape, a checksum differs, statistics are missing or unusable, or a label is out of range or has no name.
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
    ):
        self.path, self.seed, self.latent_norm, self.latent_flip = Path(path), seed, latent_norm, latent_flip
        if not self.path.is_dir():
            raise LatentsError(
                f"{self.path} is not a directory; data_path holds latents shards, as extract writes them"
            )
        self.manifest: Manifest | None = read_manifest(self.path)
        self.classes = None if self.manifest is None else self.manifest.classes
        self._check_manifest(verify)
        self._shards = [Shard.read(p) for p in shards_of(self.path, self.manifest)]
        self.shape = self._common_shape()
        counts = [shard.count for shard in self._shards]
        self._ends = np.cumsum(counts)
        if self.manifest and (self.manifest.count, self.manifest.shape) != (sum(counts), self.shape):
            said, found = (self.manifest.count, self.manifest.shape), (sum(counts), self.shape)
            raise LatentsError(f"{self.path / MANIFEST_FILE} says count and shape {said}, its shards hold {found}")
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
        """The training set of a `data` section; its size and classes are logged."""
        latents = cls(
            config.data_path,
            latent_norm=config.latent_norm,
            latent_multiplier=config.latent_multiplier,
            latent_flip=config.latent_flip,
            num_classes=config.num_classes,
            seed=seed,
            verify=config.verify,
        )
        classes = latents.classes or ()
        names = f" of {len(classes):,} classes ({shortened(classes, 3)})" if classes else ""
        log.info("%s: %s latents%s", latents.path, f"{len(latents):,}", names)
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
        flips = self.flips(np.asarray(epochs), indices) if flips is None else np.asarray(flips, dtype=bool)
        shape = (len(indices), math.prod(self.shape))
        # torch reuses pinned memory for the next batch; of NumPy's, large arrays are in huge pages.
        x = torch.empty(shape, pin_memory=True) if pin_memory else torch.from_numpy(np.empty(shape, np.float32))
        self._read(x.numpy(), indices, flips)
        self._normalise(x.numpy())
        y = self.labels[torch.from_numpy(indices)]
        return {"x": x.view(-1, *self.shape), "y": y.pin_memory() if pin_memory else y}

    def _read(self, x: np.ndarray, indices: np.ndarray, flips: np.ndarray) -> None:
        """Fill x [B, C·H·W] with the samples as they are stored, by one positional read each.

        A short read of a truncated shard is an error that names it; in a memory map it would be a SIGBUS. np.memmap is
        not faster from the page cache (32 × 16 × 16 latents, batches of 128 on one core: 249,000 latents/s against
        239,000 row by row and 264,000 by an index for each shard; safetensors' slices 40,000).
        """
        shards = np.searchsorted(self._ends, indices, side="right")  # [B]
        rows = indices - self._starts[shards]  # [B]
        offsets = self._offsets[shards, flips.astype(np.int64)] + rows * x.itemsize * x.shape[1]  # [B]
        for row, shard, offset in zip(x, shards.tolist(), offsets.tolist(), strict=True):
            if os.preadv(self._files[shard].fileno(), (row,), offset) != row.nbytes:
                raise LatentsError(f"{self._shards[shard].path} has been truncated since it was opened")

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
        self._offsets = np.array([[s.offsets[name] for name in ("latents", "latents_flip")] for s in self._shards])

    def _check_manifest(self, verify: bool | None) -> None:
        if self.manifest is None:
            if verify:
                raise LatentsError(f"{self.path} has no {MANIFEST_FILE}, so there are no checksums to verify")
            return
        self.manifest.check(self.path, checksums=verify)

    def _common_shape(self) -> tuple[int, int, int]:
        first = self._shards[0]
        for shard in self._shards:
            if shard.shape != first.shape:
                raise LatentsError(f"{shard.path} has latents of {shard.shape}, {first.path.name} of {first.shape}")
        return first.shape

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
