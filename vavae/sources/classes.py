"""Labels from what sources call their classes: names by label, in sorted order or that of a class file, or numbers."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from common.files import FileError, open_regular, refuse_placeholders
from common.text import nearest, printable, shortened
from vavae.sources.source import SourceOptions

MAX_CLASSES = 10**7  # as config sections allow
_NUMBER, _NO_LABEL = re.compile(r"[0-9]+"), re.compile(r"[-+]?[0-9]+(\.[0-9]*)?")


@dataclass(frozen=True)
class ClassOrder:
    """Names of classes by label, and what says so, for messages."""

    names: tuple[str, ...]
    origin: str


@dataclass(frozen=True)
class RawLabels:
    """What the images of a source say of their classes, before it becomes labels.

    Fields:
        texts: distinct names or numbers.
        codes: int64 [N], the index into `texts` of each image.
        path: the source, for messages.
        where: what a message calls the image at an index, or the line that labels it.
        named: whether numbers are names too, as those of folders are.
        kind: what to call the classes where there are too many or too few.
    """

    texts: tuple[str, ...]
    codes: np.ndarray
    path: str
    where: Callable[[int], str]
    named: bool = False
    kind: str = "classes"

    def used(self) -> list[int]:
        """The codes that images have."""
        return np.flatnonzero(np.bincount(self.codes, minlength=len(self.texts))).tolist()

    def first(self, code: int) -> str:
        """What a message calls the first image of a code."""
        return self.where(int(np.argmax(self.codes == code)))


@dataclass(frozen=True)
class Labelled:
    """Labels of a source.

    Fields:
        classes: names by label; None where labels are numbers without names.
        labels: int64 [N].
        found: such as `in 2 classes (a, b)` or `with labels 0 to 9`.
        note: to be said after that; often empty.
    """

    classes: tuple[str, ...] | None
    labels: torch.Tensor
    found: str
    note: str = ""


def text_lines(path: str) -> list[str]:
    """Lines of a text file without their ends, UTF-8 with or without byte order mark; raises FileError."""
    with open_regular(path) as file:
        content = file.read()
    refuse_placeholders(path, content[:100])
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = content.count(b"\n", 0, e.start) + 1
        raise FileError(f"{path}, line {line}: is not UTF-8 text") from None
    return [line.removesuffix("\r") for line in text.split("\n")]


def read_class_file(path: str) -> ClassOrder:
    """The names in a text file, one a line; raises FileError where it is missing, or a name is empty or there twice."""
    try:
        lines = [line.strip() for line in text_lines(path)]
    except FileError as e:
        raise FileError(f"data.class_file: {e}") from None
    while lines and not lines[-1]:
        lines.pop()
    first: dict[str, int] = {}
    for number, name in enumerate(lines, start=1):
        problem = "is empty" if not name else "holds control characters" if printable(name) != name else None
        if name in first:
            problem = f"names class {name!r} as line {first[name]} does"
        if problem:
            raise FileError(f"data.class_file {path}, line {number}: {problem}; wanted is another class on each line")
        first[name] = number
    if not lines:
        raise FileError(f"data.class_file {path} names no classes; wanted is one on each line")
    return ClassOrder(tuple(lines), f"data.class_file {path}")


def class_order(options: SourceOptions) -> ClassOrder | None:
    """The order that the class file gives; None without one."""
    return None if options.class_file is None or not options.labelled else read_class_file(options.class_file)


def unlabelled(count: int) -> Labelled:
    """Labels 0 for images whose labels are not wanted."""
    return Labelled(None, torch.zeros(count, dtype=torch.int64), "")


def label_images(raw: RawLabels, *, order: ClassOrder | None, num_classes: int | None) -> Labelled:
    """Labels of images that say what class they are of: numbers where all of them are, else names.

    Numbers are labels as they are, and a class file gives their names, unless all its lines are numbers themselves:
    then they are looked up there like names. Names are sorted as text, or take the place that `order` gives them.

    Args:
        order: of the classes, where something says so.
        num_classes: the number of named classes, or what numbers stay below; None accepts any.

    Raises:
        ValueError: neither a name nor a number from 0, an unknown name, or another number of classes.
    """
    used, texts = raw.used(), raw.texts
    if not raw.named:
        numbers = all(_NUMBER.fullmatch(texts[code]) for code in used)
        for code in used:
            text = texts[code]
            if not text or (_NO_LABEL.fullmatch(text) and not _NUMBER.fullmatch(text)):
                raise FileError(f"{raw.first(code)}: label {text!r} is neither a whole number from 0 nor a name")
            if numbers and (len(text) > 100 or int(text) >= MAX_CLASSES):
                raise FileError(
                    f"{raw.first(code)}: label {text[:20]} is too large; allowed is up to {MAX_CLASSES - 1:,}"
                )
        if numbers and not (order and all(_NUMBER.fullmatch(name) for name in order.names)):
            return _numbered(raw, order, num_classes)
    names = tuple(sorted(texts)) if order is None else order.names
    place = {name: label for label, name in enumerate(names)}
    if order is not None and (unknown := next((code for code in used if texts[code] not in place), None)) is not None:
        text = texts[unknown]
        raise ValueError(f"{raw.first(unknown)}: class {text!r} is not in {order.origin}{nearest(text, names)}")
    values = np.array([place.get(text, -1) for text in texts], np.int64)
    owner, kind = (raw.path, raw.kind) if order is None else (order.origin, "classes")
    return _named(names, values[raw.codes], owner, kind, num_classes)


def _numbered(raw: RawLabels, order: ClassOrder | None, num_classes: int | None) -> Labelled:
    """Labels that are numbers, with the names of `order` if it is given."""
    used = raw.used()
    numbers = np.zeros(len(raw.texts), np.int64)
    numbers[used] = [int(raw.texts[code]) for code in used]
    labels = numbers[raw.codes]
    highest = int(labels.max())
    if order is not None:
        if highest >= len(order.names):
            raise ValueError(
                f"{raw.first(int(np.argmax(numbers)))}: label {highest} is beyond {order.origin}, which names "
                f"{len(order.names)} classes from 0"
            )
        return _named(order.names, labels, order.origin, "classes", num_classes)
    if num_classes is not None and highest >= num_classes:
        raise ValueError(f"data.num_classes is {num_classes}, but {raw.path} has labels up to {highest}")
    return Labelled(None, torch.from_numpy(labels), f" with labels {int(labels.min()):,} to {highest:,}")


def _named(names: tuple[str, ...], labels: np.ndarray, owner: str, kind: str, num_classes: int | None) -> Labelled:
    """Labels int64 [N] of classes with names; where they are too many or few, the error says that `owner` has them."""
    if num_classes is not None and len(names) != num_classes:
        raise ValueError(
            f"data.num_classes is {num_classes}, but {owner} has {len(names)} {kind}: {shortened(names, 5)}"
        )
    counts = np.bincount(labels, minlength=len(names))
    without = [name for name, count in zip(names, counts, strict=True) if not count]
    note = f"; without images: {len(without):,} of the classes ({shortened(without, 3)})" if without else ""
    found = f" in {len(names):,} classes ({shortened(names, 3)})"
    return Labelled(names, torch.from_numpy(labels), found, note)
