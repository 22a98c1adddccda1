"""Batches of images and labels; a sample is a function of (seed, epoch, index), whoever decodes it and where."""

import hashlib
import logging
import os
import threading
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property

import numpy as np
import torch

from common.seeds import mix
from vavae import seeds
from vavae.config import DataConfig
from vavae.decoders.choice import choose_decoder
from vavae.decoders.decoder import Crop
from vavae.decoders.make import make_decoder
from vavae.image_files import UnreadableImage
from vavae.images import to_float_batch
from vavae.sources import open_source
from vavae.unreadable import UnreadableFiles

log = logging.getLogger(__name__)


class ImageDataset:
    """The images of a `data` section: which there are, and how they become batches.

    What was found, what was left out, and which decoder reads them is logged.

    Args:
        config: the section, as its preset means it.
        seed: of the random crops and flips.
        split: `train` or `val`, where `data_path` holds both.
        device: of the process; of a batch where the decoder can.

    Attributes:
        source: the images, see `vavae.sources`.
        classes: class names by label; None where labels are numbers without names.
        labels: int64 [N].
        decoder: name of the decoder.
        threaded: whether `batch` is for threads, of which `most_readers` (None: any number) are enough; else for
            processes.

    Raises:
        ValueError: no images, no labels, or other classes than the section says; no such decoder here.
    """

    def __init__(self, config: DataConfig, seed: int, *, split: str = "train", device: torch.device | str = "cpu"):
        has_labels_file = split == "val" or config.valid_path in (None, config.data_path)
        self.source = open_source(
            config.folder,
            split=split,
            class_file=config.class_file,
            labels_file=config.labels_file if has_labels_file else None,
            num_classes=config.num_classes,
            on_unreadable=config.on_unreadable,
        )
        self.classes, self.labels, self.seed = self.source.classes, self.source.labels, seed
        self.unreadable: UnreadableFiles | None = None
        if config.on_unreadable == "skip":
            self.unreadable = UnreadableFiles(
                len(self), config.max_unreadable, self.source.description, empty=self.source.empty
            )
        self._flip = config.flip
        self._streams: dict[int, torch.cuda.Stream] = {}
        self.decoder, reason = choose_decoder(config.decoder, device, crop=config.crop, cached=config.cache)
        self._decoder = make_decoder(
            self.decoder,
            Crop(config.crop, config.image_size, config.exif_rotation),
            threads=config.num_workers,
            device=device,
            cache=config.cache,
        )
        self.threaded, self.most_readers = self._decoder.threaded, self._decoder.most_readers
        log.info("%s: decoded by %s on %s (%s)", self.source.description, self.decoder, self._decoder.device, reason)
        if config.cache:  # filled before loader processes are forked, so that they share one copy
            for index in range(len(self)):
                self._readable([index], [0])

    def __len__(self) -> int:
        return len(self.source)

    @cached_property
    def identity(self) -> str:
        """SHA-256 of the images' names in their order and of the labels: equal where indices mean the same."""
        digest = hashlib.sha256(self.labels.numpy().tobytes())
        for index in range(len(self)):
            digest.update(os.fsencode(self.source.relative_name(index)) + b"\n")
        return digest.hexdigest()

    def batch(
        self, epochs: torch.Tensor, indices: torch.Tensor, *, pin_memory: bool = False
    ) -> dict[str, torch.Tensor]:
        """Images and labels for pairs of epoch and index (int64 [B] each).

        Returns:
            `image` float32 [B, 3, S, S] in [−1, 1], on the decoder's device; `y` int64 [B]; where unreadable files may
            be skipped also `unreadable` float32 [B], 1 where the next readable image stands in for the one asked for;
            with a decoder that leaves some files to Pillow also `by_pillow` float32 [B], 1 for those.

        Raises:
            UnreadableImage: a broken file that may not be skipped, or too many that may.
        """
        with self._stream():
            return self._batch(epochs, indices, pin_memory)

    def _batch(self, epochs: torch.Tensor, indices: torch.Tensor, pin_memory: bool) -> dict[str, torch.Tensor]:
        draws = mix(self.seed, seeds.CROP, epochs, indices).tolist()
        squares, by_pillow, taken = self._readable(indices.tolist(), draws)
        pixels = torch.stack(squares)  # [B, 3, S, S]
        if self._flip:
            flips = torch.from_numpy((mix(self.seed, seeds.FLIP, epochs, indices) >> np.uint64(63)).astype(bool))
            pixels = torch.where(flips.view(-1, 1, 1, 1).to(pixels.device), pixels.flip(3), pixels)
        images = to_float_batch(pixels.permute(0, 2, 3, 1)) if pixels.dtype == torch.uint8 else pixels
        if images.is_cuda:
            torch.cuda.current_stream(images.device).synchronize()
        found = torch.tensor(taken)
        batch = {"image": images, "y": self.labels[found]}
        if self.unreadable is not None:
            batch["unreadable"] = (found != indices).float()
        if self.threaded:
            batch["by_pillow"] = torch.tensor(by_pillow, dtype=torch.float32)
        if pin_memory:
            batch = {name: value if value.is_cuda else value.pin_memory() for name, value in batch.items()}
        return batch

    def _stream(self) -> AbstractContextManager:
        """On a GPU a stream of the reader's own, so that batches are made beside a training step.

        One for each thread that reads: memory is kept for each stream.
        """
        device = self._decoder.device
        if device.type != "cuda":
            return nullcontext()
        reader = threading.get_ident()
        if reader not in self._streams:
            self._streams[reader] = torch.cuda.Stream(device)
        return torch.cuda.stream(self._streams[reader])

    def _readable(self, indices: list[int], draws: list[int]) -> tuple[list[torch.Tensor], list[bool], list[int]]:
        """The images at `indices`, each the next one that can be read; whether Pillow stood in; and which they are."""
        taken, pixels, by_pillow = list(indices), dict[int, torch.Tensor](), dict[int, bool]()
        waiting = list(range(len(indices)))
        while waiting:
            if self.unreadable is not None:
                for place in waiting:
                    taken[place] = self.unreadable.next_readable(taken[place])
            some = [taken[place] for place in waiting], [draws[place] for place in waiting]
            for place, square in zip(waiting, self._decoder.squares(self.source, *some), strict=True):
                if isinstance(square.pixels, UnreadableImage):
                    if self.unreadable is None:
                        raise UnreadableImage(f"{square.pixels} (data.on_unreadable=skip takes the next one instead)")
                    self.unreadable.mark_unreadable(taken[place], square.pixels)
                    continue
                pixels[place], by_pillow[place] = square.pixels, square.by_pillow
                if self.unreadable is not None:
                    self.unreadable.mark_read(taken[place])
            waiting = [place for place in waiting if place not in pixels]
        places = range(len(indices))
        return [pixels[place] for place in places], [by_pillow[place] for place in places], taken
