"""The picture beside a set of samples."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.files import atomic_write
from launch.pictures import image_rows, sample_grid
from launch.sampling.class_names import class_captions

_CLASSES, _EACH, _LOOKED_AT = 10, 10, 1000
_DEMO = 8


def picked_for_picture(labels: np.ndarray, columns: int | None) -> np.ndarray:
    """The samples that the picture shows, ascending: all of a grid, or of few; else the first of ten classes."""
    if columns is not None or len(labels) == _DEMO:
        return np.arange(len(labels))
    shown = labels[:_LOOKED_AT]
    rows = [np.flatnonzero(shown == label)[:_EACH] for label in np.unique(shown)[:_CLASSES]]
    return np.sort(np.concatenate(rows))


def draw_picture(
    images: np.ndarray,
    path: Path,
    *,
    labels: np.ndarray,
    columns: int | None,
    names: Sequence[str] | None,
    num_classes: int,
) -> None:
    """A grid of uint8 images [P, H, W, 3] with labels [P]: rows of `columns`, named by their class; of eight images the
    published demo's 2 × 4; else a row for each class."""
    captions = class_captions(names, num_classes)
    if columns is not None:
        starts = range(0, len(images), columns)
        rows = [torch.from_numpy(images[start : start + columns]) for start in starts]
        image_rows(rows, [captions[labels[start]] for start in starts], path)
    elif len(labels) == _DEMO:
        _, height, width, _ = images.shape
        grid = images.reshape(2, 4, height, width, 3).swapaxes(1, 2).reshape(2 * height, 4 * width, 3)
        with atomic_write(path) as file:
            Image.fromarray(grid).save(file, format="png")
    else:
        sample_grid(torch.from_numpy(images), torch.from_numpy(labels), path, names=captions)
