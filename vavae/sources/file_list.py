"""A text file that lists images: one `path<TAB>label` a line."""

import logging
import os
from pathlib import Path

import numpy as np

from common.files import FileError, open_regular
from common.text import printable
from vavae.sources.classes import RawLabels, class_order, label_images, text_lines, unlabelled
from vavae.sources.files import Files
from vavae.sources.source import SourceOptions

log = logging.getLogger(__name__)


def open_list(path: str, options: SourceOptions) -> Files:
    """The images that a list names, in its order; relative paths are relative to the list's folder.

    Blank lines and those that begin with # are left out. Labels are numbers from 0, or names. Where none are wanted, a
    line may be a path alone. Of the images only the first is looked for.

    Raises:
        FileError: no such list, a line that is none of these (named by its number), no line at all, or no first image.
        ValueError: classes that are not those wanted.
    """
    options.refuse_labels_file(path)
    paths: list[str] = []
    numbers: list[int] = []
    codes: list[int] = []
    texts: dict[str, int] = {}
    for number, line in enumerate(text_lines(path), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        name, tab, label = line.partition("\t")
        label = label.strip()
        problem = None
        if not tab and options.labelled:
            problem = f"has no tab: {printable(line[:80])!r}"
        elif not name.strip():
            problem = "has no path before the tab"
        elif printable(name) != name or printable(label) != label:
            problem = "holds control characters, or more than one tab"
        if problem:
            raise FileError(f"{path}, line {number}: {problem}; wanted is a path, a tab and a label")
        paths.append(name)
        numbers.append(number)
        codes.append(texts.setdefault(label, len(texts)))
    if not paths:
        raise FileError(f"{path} lists no images; wanted is a path, a tab and a label on each line")
    root = Path(path).parent
    try:
        open_regular(os.path.join(root, paths[0])).close()
    except FileError as e:
        raise FileError(f"{path}, line {numbers[0]}: {e} (paths are relative to the list's folder)") from None
    if options.labelled:
        raw = RawLabels(tuple(texts), np.array(codes, np.int64), path, lambda index: f"{path}, line {numbers[index]}")
        labelled = label_images(raw, order=class_order(options), num_classes=options.num_classes)
    else:
        labelled = unlabelled(len(paths))
    log.info("%s: %s images%s%s", path, f"{len(paths):,}", labelled.found, labelled.note)
    return Files(path, root, paths, labelled)
