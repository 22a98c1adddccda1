"""Training batches from a folder of images, one sub-folder a class; samples are functions of (seed, epoch, index)."""

import logging
import os
from pathlib import Path

import numpy as np
import torch

from common.seeds import mix
from common.text import shortened
from vavae import seeds
from vavae.config import DataConfig
from vavae.image_files import EXTENSIONS, ImageListing, UnreadableImage, open_image
from vavae.images import center_crop, published_eval_crop, resize_short_side, to_float

log = logging.getLogger(__name__)


class ImageFolder:
    """The images below `root`, in the order of their sorted paths; classes are its sub-folders, sorted by name as text.

    What was found, and what was left out (see `ImageListing`), is logged.

    Args:
        root: the folder.
        image_size: S, side of the square images handed out.
        seed: of the random crops.
        crop, num_classes, on_unreadable, cache: see `DataConfig`.

    Attributes:
        classes: class names; a label is an index into it.
        paths: image files, relative to the root.
        labels: int64 [N].
        unreadable: files skipped so far in this process, with the reason.

    Raises:
        ValueError: no such folder, no sub-folder, a sub-folder without images, or another number of classes.
    """

    def __init__(
        self,
        root: str | Path,
        image_size: int,
        *,
        seed: int,
        crop: str = "random",
        on_unreadable: str = "error",
        cache: bool = False,
        num_classes: int | None = None,
    ):
        self.root, self.image_size, self.seed = Path(root), image_size, seed
        self.crop, self.on_unreadable = crop, on_unreadable
        self.unreadable: dict[str, str] = {}
        self.classes, self.paths, labels = _scan(self.root, on_unreadable)
        self.labels = torch.tensor(labels, dtype=torch.int64)
        if num_classes is not None and len(self.classes) != num_classes:
            raise ValueError(
                f"data.num_classes is {num_classes}, but {root} has {len(self.classes)} class folders: "
                f"{shortened(self.classes, 5)}"
            )
        self._cache: dict[int, torch.Tensor | np.ndarray] | None = {} if cache else None
        if cache:  # filled before loader processes are forked, so that they share one copy
            for index in range(len(self.paths)):
                self._load(index)

    @classmethod
    def from_config(cls, config: DataConfig, seed: int) -> "ImageFolder":
        """The training images of a run."""
        return cls(
            config.folder,
            config.image_size,
            seed=seed,
            crop=config.crop,
            cache=config.cache,
            on_unreadable=config.on_unreadable,
            num_classes=config.num_classes,
        )

    def __len__(self) -> int:
        return len(self.paths)

    def batch(self, epochs: torch.Tensor, indices: torch.Tensor) -> dict[str, torch.Tensor]:
        """Images and labels for pairs of epoch and index (int64 [B] each).

        Returns:
            `image` float32 [B, 3, S, S] in [−1, 1]; `y` int64 [B]; where unreadable files may be skipped also
            `unreadable` float32 [B], 1 where the next readable image stands in for the one asked for.

        Raises:
            UnreadableImage: a broken file that may not be skipped.
        """
        images, sources = [], []
        for epoch, index in zip(epochs.tolist(), indices.tolist(), strict=True):
            source, pixels = self._readable(index)
            images.append(self._finish(pixels, epoch, index))
            sources.append(source)
        taken = torch.tensor(sources)
        batch = {"image": torch.stack(images), "y": self.labels[taken]}
        if self.on_unreadable == "skip":
            batch["unreadable"] = (taken != indices).float()
        return batch

    def _readable(self, index: int) -> tuple[int, torch.Tensor | np.ndarray]:
        """(source, pixels): the image at `index`, or the next that can be read."""
        for source in (*range(index, len(self)), *range(index)):
            pixels = self._load(source)
            if pixels is not None:
                return source, pixels
        raise UnreadableImage(f"none of the {len(self)} images under {self.root} can be read")

    def _load(self, index: int) -> torch.Tensor | np.ndarray | None:
        """Decoded and scaled image, ready for `_finish`; None for a broken file that is skipped."""
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        path = self.paths[index]
        if path in self.unreadable:
            return None
        try:
            image = open_image(self.root / path)
        except UnreadableImage as error:
            if self.on_unreadable == "error":
                raise
            log.warning("skipping: %s", error)
            self.unreadable[path] = str(error)
            return None
        pixels: torch.Tensor | np.ndarray
        if self.crop == "published_eval":
            pixels = published_eval_crop(image, self.image_size)
        else:
            scale = center_crop if self.crop == "center" else resize_short_side
            pixels = np.asarray(scale(image, self.image_size))
        if self._cache is not None:
            self._cache[index] = pixels
        return pixels

    def _finish(self, pixels: torch.Tensor | np.ndarray, epoch: int, index: int) -> torch.Tensor:
        """Random crop of (seed, epoch, index), converted to float32 [3, S, S] in [−1, 1]."""
        if isinstance(pixels, torch.Tensor):
            return pixels
        size = self.image_size
        spare_rows, spare_columns = pixels.shape[0] - size, pixels.shape[1] - size
        if spare_rows or spare_columns:
            draw = int(mix(self.seed, seeds.CROP, epoch, index))
            top, left = (draw >> 32) % (spare_rows + 1), (draw & 0xFFFFFFFF) % (spare_columns + 1)
            pixels = pixels[top : top + size, left : left + size]
        return to_float(pixels)


def _scan(root: Path, on_unreadable: str) -> tuple[tuple[str, ...], tuple[str, ...], list[int]]:
    """Class names, image paths relative to the root and their labels."""
    listing = ImageListing(root)
    classes = listing.classes()
    if not classes:
        raise ValueError(
            f"data folder {root} has no sub-folders: each class needs a folder of its own{listing.describe_left_out()}"
        )
    paths, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(listing.images(name))
        if not found:
            raise ValueError(
                f"class folder {root / name} holds no images (of {', '.join(sorted(EXTENSIONS))})"
                f"{listing.describe_left_out()}"
            )
        paths += found
        labels += [label] * len(found)
    if on_unreadable == "error":
        listing.refuse_empty()
    log.info("%s: %s", root, _describe(listing, classes, paths))
    return classes, tuple(paths), labels


def _describe(listing: ImageListing, classes: tuple[str, ...], paths: list[str]) -> str:
    """One line on the data, with warnings about folders that are probably not what was meant."""
    text = f"{len(paths):,} images in {len(classes):,} classes ({shortened(classes, 3)})"
    if listing.linked:
        text += f", {listing.linked:,} of them links"
    text += listing.describe_left_out()
    if all(name.isdecimal() for name in classes):
        pairs = enumerate(zip(classes, sorted(classes, key=int), strict=True))
        moved = next((label for label, (name, by_number) in pairs if name != by_number), None)
        if moved is not None:
            text += f"; classes are sorted as text, so label {moved} is class {classes[moved]!r}"
    if all(path.count(os.sep) > 1 for path in paths):
        text += (
            f"; no class folder holds images itself, they lie deeper ({paths[0]}): is data.data_path one level "
            "too high?"
        )
    return text
