"""Files with the labels of ImageNet's validation images, as synset ids: `n` and 8 digits.

* `ILSVRC2012_validation_ground_truth.txt`: a number from 1 a line, in the order of the sorted image names. It counts
  synsets in the development kit's own order, which `meta.mat` or `map_clsloc.txt` beside it holds.
* A synset id a line, in the same order.
* `LOC_val_solution.csv` of Kaggle: image name and synset id.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.files import FileError, open_regular
from common.text import printable
from vavae.sources.classes import text_lines

GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
SYNSETS = "imagenet_2012_validation_synset_labels.txt"
SOLUTION = "LOC_val_solution.csv"
SYNSET = re.compile(r"n[0-9]{8}")
_NUMBER = re.compile(r"[0-9]{1,9}")
_HEADER = "ImageId,PredictionString"


@dataclass(frozen=True)
class ValidationLabels:
    """Labels of images in a given order.

    Fields:
        synsets: of each image.
        lines: number of each image's line in the file.
        classes: all synset ids that the file may name, sorted.
        origin: the file, and what tells the order of its synsets, for messages.
    """

    synsets: list[str]
    lines: list[int]
    classes: tuple[str, ...]
    origin: str


def read_labels(path: str, names: Sequence[str], folder: str) -> ValidationLabels:
    """The labels in a file for the images of these names, sorted; what kind of file it is, its first line tells.

    Raises FileError, naming the line, for one of no kind or damaged, and where images and lines do not match.
    """
    lines = text_lines(path)
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise FileError(f"{path} is empty; wanted are labels of validation images")
    begin = lines[0].strip()
    if begin == _HEADER:
        return _solution(path, lines, names, folder)
    numbers = _NUMBER.fullmatch(begin) is not None
    if not numbers and not SYNSET.fullmatch(begin):
        raise FileError(
            f"{path}, line 1: {printable(begin[:60])!r} is no number from 1, no synset id (n and 8 digits) and not "
            f"{_HEADER!r}"
        )
    if len(lines) != len(names):
        raise FileError(
            f"{path} has {len(lines):,} lines, {folder} {len(names):,} images: there must be a line for each image"
        )
    if numbers:
        return _ground_truth(path, lines)
    synsets = [line.strip() for line in lines]
    for number, synset in enumerate(synsets, start=1):
        if not SYNSET.fullmatch(synset):
            raise FileError(f"{path}, line {number}: {printable(synset[:60])!r} is no synset id (n and 8 digits)")
    return ValidationLabels(synsets, list(range(1, len(lines) + 1)), tuple(sorted(set(synsets))), path)


def _solution(path: str, lines: list[str], names: Sequence[str], folder: str) -> ValidationLabels:
    rows: dict[str, tuple[str, int]] = {}
    for number, line in enumerate(lines[1:], start=2):
        image, _, prediction = line.partition(",")
        found = set(prediction.split()[::5])  # a synset id and four corners for each box
        synset = found.pop() if len(found) == 1 else ""
        if not SYNSET.fullmatch(synset):
            raise FileError(
                f"{path}, line {number}: {printable(line[:60])!r} is not an image, a comma and boxes of one synset id"
            )
        if image in rows:
            raise FileError(f"{path}, line {number}: image {image!r} has a label on line {rows[image][1]} already")
        rows[image] = synset, number
    stems = [os.path.splitext(name)[0] for name in names]
    if absent := [name for name, stem in zip(names, stems, strict=True) if stem not in rows]:
        raise FileError(f"{path} has no line for {len(absent):,} of {len(names):,} images of {folder}: {absent[0]}")
    if extra := rows.keys() - set(stems):
        image, number = min((image, rows[image][1]) for image in extra)
        raise FileError(
            f"{path}, line {number}: there is no image {image} in {folder}, nor any for {len(extra):,} of "
            f"{len(rows):,} lines"
        )
    if len(stems) > len(rows):
        raise FileError(f"{path} has {len(rows):,} images, {folder} {len(names):,}: some names differ by ending alone")
    synsets, numbers = zip(*(rows[stem] for stem in stems), strict=True)
    return ValidationLabels(list(synsets), list(numbers), tuple(sorted(set(synsets))), path)


def _ground_truth(path: str, lines: list[str]) -> ValidationLabels:
    order, origin = _devkit_order(Path(path))
    synsets = []
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        synset = order.get(int(text)) if _NUMBER.fullmatch(text) else None
        if synset is None:
            raise FileError(
                f"{path}, line {number}: {printable(text[:60])!r} is no number of a class; {origin} has "
                f"{min(order)} to {max(order)}"
            )
        synsets.append(synset)
    classes = tuple(sorted(order.values()))
    return ValidationLabels(synsets, list(range(1, len(lines) + 1)), classes, f"{path} by {Path(origin).name}")


def _devkit_order(ground_truth: Path) -> tuple[dict[int, str], str]:
    """Number in the development kit → synset id, and the file that says so."""
    matlab, text = ground_truth.with_name("meta.mat"), ground_truth.with_name("map_clsloc.txt")
    if matlab.is_file():
        pairs, origin = _read_meta(matlab), matlab
    elif text.is_file():
        pairs, origin = _read_map(text), text
    else:
        raise FileError(
            f"{ground_truth} numbers classes in an order of its own, and neither meta.mat nor map_clsloc.txt lies "
            "beside it to tell their synset ids"
        )
    order = dict(pairs)
    if not pairs or not len(order) == len(set(order.values())) == len(pairs):
        raise FileError(f"{origin} is damaged: wanted is another number and another synset id for each class")
    if wrong := [synset for synset in order.values() if not SYNSET.fullmatch(synset)]:
        raise FileError(f"{origin} is damaged: {printable(wrong[0][:60])!r} is no synset id (n and 8 digits)")
    return order, str(origin)


def _read_meta(path: Path) -> list[tuple[int, str]]:
    from scipy.io import loadmat

    try:
        with open_regular(path) as file:
            synsets = loadmat(file, squeeze_me=True)["synsets"]
        # Number, synset id, words, gloss, number of children; inner nodes of the hierarchy are no classes.
        return [(int(row[0]), str(row[1])) for row in map(tuple, synsets) if int(row[4]) == 0]
    except FileError:
        raise
    except Exception as e:  # SciPy raises errors of many types for damaged files
        raise FileError(f"{path} is damaged, or not of the development kit: {e}") from None


def _read_map(path: Path) -> list[tuple[int, str]]:
    pairs = []
    for number, line in enumerate(text_lines(str(path)), start=1):
        if line.strip():
            synset, index, *_ = [*line.split(), ""]
            if not _NUMBER.fullmatch(index):
                raise FileError(f"{path}, line {number}: {printable(line[:60])!r} is no synset id, number and name")
            pairs.append((int(index), synset))
    return pairs
