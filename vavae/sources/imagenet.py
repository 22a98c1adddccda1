"""ImageNet as it lies on a disk: the folder of a split, and validation images without class folders."""

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.files import FileError
from common.text import shortened
from vavae.sources.classes import ClassOrder, RawLabels, class_order, label_images
from vavae.sources.files import Files
from vavae.sources.imagenet_labels import GROUND_TRUTH, SOLUTION, SYNSET, SYNSETS, read_labels
from vavae.sources.listing import OF_EXTENSIONS, ImageListing, folders_and_files
from vavae.sources.source import SourceOptions, from_folder

log = logging.getLogger(__name__)

_BASES = ("", "Data/CLS-LOC", "ILSVRC/Data/CLS-LOC")
_SPLITS = {"train", "val", "test"}
_DEVKIT = "ILSVRC2012_devkit_t12/data"
# In the order in which they are looked for: those that hold synset ids first.
_LABELS_FILES = (SOLUTION, SYNSETS, GROUND_TRUTH)
_FLAT = re.compile(r"ILSVRC\d{4}_val_\d{8}\.\w+", re.IGNORECASE)


@dataclass(frozen=True)
class Split:
    """One split of an ImageNet folder, or of one that is laid out so.

    Fields:
        folder: that holds its images.
        taken: the same, relative to the folder that was named.
        order: the sorted names of the training folders, for the validation split.
    """

    folder: Path
    taken: str
    order: ClassOrder | None


def find_split(root: Path, split: str, *, labelled: bool = True) -> Split | None:
    """The split of a folder that holds several; None where it holds none.

    It does with a `train/` of synset ids alone; where labels are wanted also if `train`, `val` and `test`, or two of
    them, are all that it holds, as nobody's classes are called so.

    Raises ValueError where it has no validation folder and that is wanted.
    """
    for base in _BASES:
        train = root / base / "train"
        names = folders_and_files(train)[0] if train.is_dir() else []
        beside = set(folders_and_files(root / base)[0]) if names and labelled else set()
        if not names or not (all(map(SYNSET.fullmatch, names)) or {"train"} < beside <= _SPLITS):
            continue
        folder = root / base / split
        if not folder.is_dir():
            raise ValueError(f"{root} has {train.relative_to(root)}, but no {folder.relative_to(root)} beside it")
        order = None if split == "train" else ClassOrder(tuple(sorted(names)), f"the class folders of {train}")
        return Split(folder, str(folder.relative_to(root)), order)
    return None


def is_flat(folders: list[str], files: list[str], options: SourceOptions) -> bool:
    """Whether a folder with these names in it holds validation images whose labels are in a file elsewhere."""
    if folders or not files or not options.labelled:
        return False
    return options.labels_file is not None or any(map(_FLAT.fullmatch, files))


def open_flat(
    path: str, folder: Path, options: SourceOptions, *, taken: str = "", order: ClassOrder | None = None
) -> Files:
    """The validation images directly in `folder`, by sorted name, with the labels of a file.

    Classes are the sorted synset ids of that file, or have the given order; a class file goes before both.

    Args:
        path: the source as the user named it; the labels file is also looked for there.
        taken: the part of it that `folder` is, where it is one.

    Raises:
        FileError: no labels file, or one that does not fit the images; names its line.
        ValueError: classes that are not those wanted.
        UnreadableImage: empty image files that may not be skipped.
    """
    listing = ImageListing(folder)
    images = set(listing.images())
    if options.on_unreadable == "error":
        listing.refuse_empty()
    if not images:
        raise ValueError(f"no images in {folder} {OF_EXTENSIONS}{listing.describe_left_out()}")
    labels_file = options.labels_file or _find_labels(Path(path), folder)
    # Those left out as empty have their lines in it too.
    names = sorted(images | set(listing.empty))
    found = read_labels(labels_file, names, str(folder))
    kept = [index for index, name in enumerate(names) if name in images]
    codes = {synset: code for code, synset in enumerate(found.classes)}
    raw = RawLabels(
        found.classes,
        np.array([codes[found.synsets[index]] for index in kept], np.int64),
        path,
        lambda index: f"{labels_file}, line {found.lines[kept[index]]}",
        named=True,
    )
    labelled = label_images(raw, order=class_order(options) or order, num_classes=options.num_classes)
    log.info(
        "%s: %s images%s%s, labels from %s%s%s",
        *(path, f"{len(kept):,}", labelled.found, from_folder(taken), found.origin),
        *(labelled.note, listing.describe_left_out()),
    )
    return Files(path, folder, [names[index] for index in kept], labelled, empty=len(listing.empty))


def _find_labels(root: Path, folder: Path) -> str:
    """The labels file in or near a validation folder, or the ImageNet folder that it is of; raises FileError."""
    folder = Path(os.path.abspath(folder))
    root = Path(os.path.abspath(root))
    places = [folder]
    for parent in (folder.parent, folder.parents[min(1, len(folder.parents) - 1)], root, root.parent):
        places += [parent, parent / _DEVKIT]
    for name in _LABELS_FILES:
        for place in places:
            if (place / name).is_file():
                return str(place / name)
    raise FileError(
        f"{folder} has no class folders, and there is no {' or '.join(_LABELS_FILES)} in it, above it or in {_DEVKIT} "
        f"there: name one as data.labels_file (looked in {shortened(list(map(str, dict.fromkeys(places))), 9)})"
    )
