"""Images in tars of samples, as WebDataset packs them."""

import logging
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.files import FileError
from vavae.image_files import unreadable, whole
from vavae.sources.braces import expand_braces
from vavae.sources.classes import Labelled, RawLabels, class_order, label_images, unlabelled
from vavae.sources.listing import OF_EXTENSIONS
from vavae.sources.open_files import OpenFiles
from vavae.sources.source import EMPTY_FILE, SourceOptions, describe_left_out, empty_images
from vavae.sources.tar_index import NO_LABEL, TarIndex, load_indexes

log = logging.getLogger(__name__)


def tar_names(path: str) -> list[str]:
    """The tars that a path or pattern names, in its order; empty where it names none.

    Raises ValueError for a pattern that is not well-formed, or names a tar twice.
    """
    if os.path.isfile(path) or "{" not in path:
        return [path] if path.lower().endswith(".tar") else []
    if not path.lower().endswith((".tar", "}")):
        return []
    names = expand_braces(path)
    if not all(name.lower().endswith(".tar") for name in names):
        return []
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{path} names {name} twice")
        seen.add(name)
    return names


class Tars:
    """A `Source` of the images in tars, one after the other; see `vavae.sources.tar_scan` for what a sample is.

    Args:
        path: the source as the user named it.
        tars: paths of the tars.
        beside: names in the folder that are left out.

    Raises:
        FileError: a tar that is missing or damaged, an image without a label, a damaged index.
        ValueError: no images, or classes that are not those wanted.
        UnreadableImage: empty images that may not be skipped.
    """

    def __init__(self, path: str, tars: Sequence[str], options: SourceOptions, beside: Sequence[str] = ()):
        options.refuse_labels_file(path)
        missing = [tar for tar in tars if not os.path.exists(tar)]
        if missing:
            of = (
                f"{len(missing):,} of {len(tars):,} tars of {path} do not exist, the first is " if len(tars) > 1 else ""
            )
            hint = " (patterns are written with braces: train-{000..137}.tar)" if "*" in path else ""
            raise FileError(f"{of}{missing[0]}" if of else f"{missing[0]} does not exist{hint}")
        self.description, self.tars = path, [Path(tar) for tar in tars]
        folder = os.path.commonpath([os.path.abspath(tar.parent) for tar in self.tars])
        self._short_names = [os.path.relpath(tar, folder) for tar in self.tars]
        self._files = OpenFiles()
        indexes = load_indexes(path, self.tars)
        left_out = _left_out(self.tars, indexes, beside)
        codes = self._take(indexes, left_out, options)
        if not len(self):
            raise ValueError(f"{path} holds no images {OF_EXTENSIONS}{describe_left_out(left_out)}")
        labelled = self._label(indexes, codes, options) if options.labelled else unlabelled(len(self))
        self.classes, self.labels = labelled.classes, labelled.labels
        count = f", in {len(tars):,} tars" if len(tars) > 1 else ""
        rest = f"{labelled.found}{count}{labelled.note}{describe_left_out(left_out)}"
        log.info("%s: %s images%s", path, f"{len(self):,}", rest)

    def _take(
        self, indexes: list[TarIndex], left_out: dict[str, tuple[int, list[str]]], options: SourceOptions
    ) -> list[np.ndarray]:
        """Join the indexes, without the images that are empty; returns the label codes of each tar's images."""
        kept = [index.sizes > 0 for index in indexes]
        self._names = [
            [name for name, keep in zip(index.names, mask, strict=True) if keep] if not mask.all() else index.names
            for index, mask in zip(indexes, kept, strict=True)
        ]
        empty = [
            f"{self._short_names[number]}: {index.names[place]}"
            for number, (index, mask) in enumerate(zip(indexes, kept, strict=True))
            for place in np.flatnonzero(~mask)
        ]
        if empty and options.on_unreadable == "error":
            raise empty_images(f"in {self.description}", empty)
        self.empty, left_out[EMPTY_FILE] = len(empty), (len(empty), empty)
        self._offsets = np.concatenate([index.offsets[mask] for index, mask in zip(indexes, kept, strict=True)])
        self._sizes = np.concatenate([index.sizes[mask] for index, mask in zip(indexes, kept, strict=True)])
        self._ends = np.cumsum([len(names) for names in self._names])
        return [index.labels[mask] for index, mask in zip(indexes, kept, strict=True)]

    def _label(self, indexes: list[TarIndex], codes: list[np.ndarray], options: SourceOptions) -> Labelled:
        """Labels of the images whose label codes `codes` holds, tar by tar."""
        texts: dict[str, int] = {}
        of_all = []
        for index, own in zip(indexes, codes, strict=True):
            to_all = [texts.setdefault(text, len(texts)) for text in index.label_texts]
            of_all.append(np.array([*to_all, NO_LABEL], np.int64)[own])  # NO_LABEL is the last place too
        joined = np.concatenate(of_all)
        if (joined == NO_LABEL).any():
            name = self.name(int(np.argmax(joined == NO_LABEL)))
            raise FileError(f"{name} has no label: its sample has no member with the ending .cls")
        raw = RawLabels(tuple(texts), joined, self.description, self.name)
        return label_images(raw, order=class_order(options), num_classes=options.num_classes)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _place(self, index: int) -> tuple[int, str]:
        """Number of the tar and name of the member."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)} in {self.description}")
        tar = int(np.searchsorted(self._ends, index, side="right"))
        return tar, self._names[tar][index - int(self._ends[tar])]

    def name(self, index: int) -> str:
        tar, member = self._place(index)
        return f"{self.tars[tar]}: {member}"

    def relative_name(self, index: int) -> str:
        tar, member = self._place(index)
        return f"{self._short_names[tar]}: {member}"

    def entry(self, index: int) -> str:
        return f"{self.relative_name(index)} {self._sizes[index]}"

    def read(self, index: int) -> bytes:
        tar, size = self._place(index)[0], int(self._sizes[index])
        name = self.name(index)
        with unreadable(name):
            return whole(self._files.read(self.tars[tar], int(self._offsets[index]), size), size, name)


def _left_out(
    tars: Sequence[Path], indexes: Sequence[TarIndex], beside: Sequence[str]
) -> dict[str, tuple[int, list[str]]]:
    """Kind → number and first names, of all tars together."""
    counts: dict[str, int] = defaultdict(int)
    names: dict[str, list[str]] = defaultdict(list)
    for tar, index in zip(tars, indexes, strict=True):
        for kind, (count, first) in index.left_out.items():
            counts[kind] += count
            names[kind] += [f"{tar.name}: {name}" for name in first]
    if beside:
        counts["beside the tars"], names["beside the tars"] = len(beside), sorted(beside)
    return {kind: (count, names[kind]) for kind, count in counts.items()}
