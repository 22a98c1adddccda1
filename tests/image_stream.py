"""A process that reads a run's images and writes down what it got, until it is done or kills itself."""

import hashlib
import itertools
import json
import os
import signal
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from launch.training.loader import BatchSplit, SampleOrder, micro_batches
from vavae.config import DataConfig
from vavae.data import ImageDataset
from vavae.image_files import decode_image
from vavae.images import resize_short_side, to_uint8

GLOBAL_BATCH_SIZE, SEED = 4, 3


def write_stream(fields: dict, last_step: int, paths: list[Path], kill_after: int | None = None) -> None:
    """Append a line for each step to this process's file: of each sample index, place of the crop, hash of the pixels.

    Goes on behind the last line that is there. A process of a group of as many as there are paths.

    fields: of the `data` section.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), len(paths)
    path = paths[rank]
    config = DataConfig(**fields)
    images = ImageDataset(config, SEED)
    order = SampleOrder(len(images), GLOBAL_BATCH_SIZE, SEED)
    split = BatchSplit(GLOBAL_BATCH_SIZE, world_size, GLOBAL_BATCH_SIZE // world_size)
    done = len(path.read_text().splitlines()) if path.exists() else 0
    stream = micro_batches(
        images,
        order,
        split,
        rank,
        first_step=done + 1,
        last_step=last_step,
        num_workers=config.num_workers,
        pin_memory=False,
    )
    with closing(stream), path.open("a") as file:
        for step, batch in enumerate(stream, start=done + 1):
            _, indices = order.slice(step, *split.bounds(0, rank))
            pixels = to_uint8(batch["image"])
            samples = [
                (index, place_of(images, index, square), hashlib.sha256(square.numpy().tobytes()).hexdigest())
                for index, square in zip(indices.tolist(), pixels, strict=True)
            ]
            print(json.dumps(samples), file=file, flush=True)
            if step == kill_after:
                os.kill(os.getpid(), signal.SIGKILL)


def place_of(images: ImageDataset, index: int, square: torch.Tensor) -> tuple[int, int, bool]:
    """Top and left of the part of Pillow's scaled image that a square [3, S, S] is most like, and if mirrored."""
    size, source = square.shape[-1], images.source
    scaled = np.asarray(resize_short_side(decode_image(source.read(index), "image", rotate=True), size), np.int64)
    found = square.permute(1, 2, 0).numpy().astype(np.int64)
    rows, columns = (range(side - size + 1) for side in scaled.shape[:2])
    places = list(itertools.product(rows, columns, (False, True)))
    errors = [
        np.square(scaled[top : top + size, left : left + size, :][:, :: -1 if mirrored else 1] - found).sum()
        for top, left, mirrored in places
    ]
    return places[int(np.argmin(errors))]
