"""A folder of images: a sub-folder a class, or all images at any depth where no labels are wanted."""

import logging
import os
from pathlib import Path

import numpy as np

from vavae.sources.classes import ClassOrder, RawLabels, class_order, label_images, unlabelled
from vavae.sources.files import Files
from vavae.sources.listing import OF_EXTENSIONS, ImageListing
from vavae.sources.source import SourceOptions, from_folder

log = logging.getLogger(__name__)


def open_folder(
    path: str, folder: Path, options: SourceOptions, *, taken: str = "", order: ClassOrder | None = None
) -> Files:
    """The images below `folder`, by sorted class and path; classes are the sub-folders, sorted as text.

    Without labels, all images at any depth, sorted by the parts of their paths.

    Args:
        path: the source as the user named it.
        taken: the part of it that `folder` is, where it is one.
        order: of the classes; a class file goes before it.

    Raises:
        ValueError: no sub-folder, one without images, or classes that are not those wanted.
        UnreadableImage: empty image files that may not be skipped.
    """
    if not (taken and options.split == "train"):  # of a folder of ImageNet, the file is for its other split
        options.refuse_labels_file(path)
    listing = ImageListing(folder)
    if not options.labelled:
        return _open_unlabelled(path, listing, options, taken)
    names = listing.classes()
    if not names:
        raise ValueError(
            f"data folder {folder} has no sub-folders: each class needs a folder of its own"
            f"{listing.describe_left_out()}"
        )
    paths: list[str] = []
    codes: list[int] = []
    for code, name in enumerate(names):
        found = sorted(listing.images(name))
        if not found:
            raise ValueError(
                f"class folder {folder / name} holds no images {OF_EXTENSIONS}{listing.describe_left_out()}"
            )
        paths += found
        codes += [code] * len(found)
    if options.on_unreadable == "error":
        listing.refuse_empty()
    order = class_order(options) or order
    raw = RawLabels(
        names,
        np.array(codes, np.int64),
        path,
        lambda index: os.path.join(folder, names[codes[index]]),
        named=True,
        kind="class folders",
    )
    labelled = label_images(raw, order=order, num_classes=options.num_classes)
    text = f"{len(paths):,} images{labelled.found}"
    if listing.linked:
        text += f", {listing.linked:,} of them links"
    text += from_folder(taken) + labelled.note + listing.describe_left_out()
    log.info("%s: %s%s", path, text, _doubts(names, paths, order))
    return Files(path, folder, paths, labelled, empty=len(listing.empty))


def _doubts(names: tuple[str, ...], paths: list[str], order: ClassOrder | None) -> str:
    """Warnings about folders that are probably not what was meant."""
    text = ""
    if order is None and all(name.isdecimal() for name in names):
        pairs = enumerate(zip(names, sorted(names, key=int), strict=True))
        moved = next((label for label, (name, by_number) in pairs if name != by_number), None)
        if moved is not None:
            text += f"; classes are sorted as text, so label {moved} is class {names[moved]!r}"
    if all(path.count(os.sep) > 1 for path in paths):
        text += (
            f"; no class folder holds images itself, they lie deeper ({paths[0]}): is data.data_path one level "
            "too high?"
        )
    return text


def _open_unlabelled(path: str, listing: ImageListing, options: SourceOptions, taken: str = "") -> Files:
    """All images of a listing at any depth, labels 0; raises ValueError where there are none."""
    paths = sorted(listing.images(), key=lambda name: name.split(os.sep))
    if options.on_unreadable == "error":
        listing.refuse_empty()
    if not paths:
        raise ValueError(f"no images below {listing.root} {OF_EXTENSIONS}{listing.describe_left_out()}")
    log.info("%s: %s images%s%s", path, f"{len(paths):,}", from_folder(taken), listing.describe_left_out())
    return Files(path, listing.root, paths, unlabelled(len(paths)), empty=len(listing.empty))
