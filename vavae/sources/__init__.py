"""Where training images come from: `open_source` takes folders, ImageNet as it is distributed, tars and file lists."""

import os
from pathlib import Path

from vavae.sources.file_list import open_list
from vavae.sources.folder import open_folder
from vavae.sources.imagenet import find_split, is_flat, open_flat
from vavae.sources.listing import folders_and_files, is_image_name
from vavae.sources.source import Source, SourceOptions
from vavae.sources.tar import Tars, tar_names

__all__ = ["Source", "SourceOptions", "open_source", "source_exists"]

_LISTS = (".txt", ".tsv")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_INDEX = ".tar.index.json"
_ACCEPTED = (
    "accepted are a folder with a sub-folder for each class, a folder of ImageNet, a folder of .tar files, a .tar or a "
    "pattern of them such as train-{000..137}.tar, and a .txt or .tsv of lines with a path, a tab and a label"
)


def open_source(
    path: str | Path,
    *,
    split: str = "train",
    class_file: str | Path | None = None,
    labels_file: str | Path | None = None,
    num_classes: int | None = None,
    on_unreadable: str = "error",
    labelled: bool = True,
) -> Source:
    """The images at a path; what was found, and what was left out, is logged in one line.

    * A folder with a sub-folder for each class.
    * ImageNet: the folder that holds `train/` and `val/`, or those in `Data/CLS-LOC/`; or validation images without
      class folders.
    * Tars of samples as WebDataset packs them: one, a pattern with braces, or a folder of them without image files.
    * A text file that lists images and labels.

    Args:
        split: `train` or `val`, of a folder of ImageNet; elsewhere the path says it.
        class_file: a text file with a class name a line: the order of labels, or the names of numeric labels.
        labels_file: labels of validation images without class folders, where they are not found beside them; the
            training split of a folder of ImageNet does not need it.
        num_classes: required number of named classes, or what numeric labels stay below.
        on_unreadable: `error` refuses images that are seen to be empty, `skip` leaves them out.
        labelled: whether labels are wanted; without them all images of a folder are taken, at any depth, and neither
            class file nor labels file is read.

    Raises:
        ValueError: nothing there, of no such kind, or classes that are not those wanted.
        FileError: a file that is damaged or not what it should be.
        UnreadableImage: images that are empty.
    """
    options = SourceOptions(
        split=split,
        class_file=None if class_file is None else str(class_file),
        labels_file=None if labels_file is None else str(labels_file),
        num_classes=num_classes,
        on_unreadable=on_unreadable,
        labelled=labelled,
    )
    path = str(path)
    if os.path.isdir(path):
        return _open_directory(path, options)
    if tars := tar_names(path):
        return Tars(path, tars, options)
    if path.lower().endswith(_LISTS):
        return open_list(path, options)
    if not os.path.lexists(path):
        raise ValueError(f"{path} does not exist; {_ACCEPTED}")
    if path.lower().endswith(_COMPRESSED):
        raise ValueError(f"{path} is a compressed tar: unpack it to a .tar first (images in it are addressed by place)")
    raise ValueError(f"{path} is no source of images; {_ACCEPTED}")


def source_exists(path: str | Path) -> bool:
    """Whether anything is at a path: a folder, a file, the first tar of a pattern.

    Raises ValueError for a pattern that is not well-formed.
    """
    path = str(path)
    if os.path.exists(path):
        return True
    tars = tar_names(path)
    return bool(tars) and os.path.exists(tars[0])


def _open_directory(path: str, options: SourceOptions) -> Source:
    folder, taken, order = Path(path), "", None
    if found := find_split(folder, options.split, labelled=options.labelled):
        folder, taken, order = found.folder, found.taken, found.order
    folders, files = folders_and_files(folder)
    tars = sorted(name for name in files if name.lower().endswith(".tar"))
    if tars and not folders and found is None and not any(map(is_image_name, files)):
        beside = [name for name in files if name not in tars and not name.lower().endswith(_INDEX)]
        return Tars(path, [os.path.join(path, tar) for tar in tars], options, beside)
    if is_flat(folders, files, options):
        return open_flat(path, folder, options, taken=taken, order=order)
    return open_folder(path, folder, options, taken=taken, order=order)
