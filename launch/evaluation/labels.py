"""Labels of samples: where they are found, whether they fit, and how evenly they are spread over the classes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import chi2

from launch.evaluation.image_source import ImageSource
from launch.evaluation.moments import NOT_STATED
from launch.evaluation.npz_file import LABELS, NpzImages, read_npy

_RANDOM = 1e-3  # a deviation that random labels show less often than this is said to be more than theirs


@dataclass(frozen=True)
class Labels:
    """What is known of the labels of a set.

    Fields:
        values: int64 [N], None where they are not stated one by one.
        protocol: how they were chosen, in the words of whoever made the samples.
        num_classes: None where nobody says it.
    """

    values: np.ndarray | None
    protocol: str
    num_classes: int | None

    @property
    def facts(self) -> dict[str, Any] | str:
        """For the result; NOT_STATED where nothing is known."""
        if self.values is None:
            return self.protocol
        counts = self._counts()
        return {
            "protocol": self.protocol,
            "classes": len(counts) if self.num_classes is not None else f"{len(counts)} that occur",
            "per_class": [int(counts.min()), int(counts.max())],
        }

    def notes(self) -> list[str]:
        """What is uneven about them."""
        if self.values is None:
            return []
        counts = self._counts()
        found, least, most = [], int(counts.min()), int(counts.max())
        if absent := int((counts == 0).sum()):
            found.append(f"{absent:,} of {len(counts):,} classes have no sample")
        if most - least > 1:
            mean = counts.mean()
            chance = float(chi2.sf(((counts - mean) ** 2 / mean).sum(), len(counts) - 1))
            how = "no more uneven than random labels" if chance > _RANDOM else "more uneven than random labels"
            found.append(f"classes have {least:,} to {most:,} samples each: {how} (chi-squared test, p = {chance:.2g})")
        return found

    def _counts(self) -> np.ndarray:
        assert self.values is not None
        if self.num_classes is not None:
            return np.bincount(self.values, minlength=self.num_classes)
        return np.unique(self.values, return_counts=True)[1]


def read_labels(
    images: ImageSource, metadata: Mapping[str, Any], num_classes: int | None = None, file: Path | None = None
) -> Labels:
    """The labels of samples: `arr_1` of their npz, or those of a file beside them, else the list in the metadata.

    Args:
        num_classes: what labels stay below; without it the metadata's `num_classes`, or the number of its `classes` or
            `label_counts`.
        file: an .npy of the labels by index, as images come, also those in a folder for each class.

    Raises ValueError, naming what holds them: another number than of images, labels that are no whole numbers or out of
    range, and labels of the npz or the file other than the metadata's.
    """
    stated = metadata.get("labels")
    if num_classes is None:
        lists = [metadata.get(key) for key in ("classes", "label_counts")]
        known = metadata.get("num_classes", next((len(found) for found in lists if isinstance(found, list)), None))
        num_classes = known if isinstance(known, int) and known > 0 else None
    inside = images.array(LABELS) if isinstance(images, NpzImages) else None
    found: list[np.ndarray] = []
    if inside is not None:
        found.append(_checked(inside, f"{images.description}: {LABELS}", len(images), num_classes))
    if file is not None:
        found.append(_checked(read_npy(file), str(file), len(images), num_classes))
    if isinstance(stated, list):
        found.append(_checked(np.array(stated), f"metadata of {images.description}: labels", len(images), num_classes))
    if len(found) == 2 and not np.array_equal(found[0], found[1]):
        place = int(np.argmax(found[0] != found[1]))
        where = f"{images.description}: {LABELS}" if file is None else str(file)
        raise ValueError(
            f"{where} are other labels than the metadata's: image {place} has {found[0][place]}, and "
            f"{found[1][place]} there"
        )
    protocol = metadata.get("label_protocol", stated if isinstance(stated, str) else None)
    words = "given one by one" if isinstance(stated, list) else NOT_STATED
    return Labels(found[0] if found else None, str(protocol or words), num_classes)


def _checked(labels: np.ndarray, where: str, images: int, num_classes: int | None) -> np.ndarray:
    if labels.ndim != 1 or labels.dtype.kind not in "iuf" or not np.array_equal(labels, np.floor(labels)):
        raise ValueError(f"{where} must be whole numbers [N], they are {labels.dtype} {list(labels.shape)}")
    if len(labels) != images:
        raise ValueError(f"{where} has {len(labels):,} labels of {images:,} images")
    wrong = np.flatnonzero((labels < 0) | (labels >= (num_classes or np.inf)))
    if len(wrong):
        below = "0 or more" if num_classes is None else f"0 to {num_classes - 1}"
        raise ValueError(f"{where}: image {wrong[0]} has label {labels[wrong[0]]:g}; labels are {below}")
    return labels.astype(np.int64)
