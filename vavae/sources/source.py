"""What every source of images offers, the choices it is opened with, and the words that its line in the log shares."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from common.text import shortened
from vavae.image_files import UnreadableImage

EMPTY_FILE = "empty file"  # a kind of what is left out
_MAX_NAMES, _MAX_KINDS = 2, 8  # in a message: names of a kind, and kinds


class Source(Protocol):
    """Encoded images with labels, each at an index that stays the same as long as the data does.

    Images are read by several threads at once, and in processes forked or unpickled after opening.

    Attributes:
        description: the source as the user named it.
        classes: names by label; None where labels are plain numbers, or none are wanted.
        labels: int64 [N].
        empty: number of images that were left out because they are empty.
    """

    description: str
    classes: tuple[str, ...] | None
    labels: torch.Tensor
    empty: int

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """An image as messages name it: its path; of an image in a tar `path of the tar: member`."""
        ...

    def relative_name(self, index: int) -> str:
        """Name without the folder of the source; see `entry`."""
        ...

    def entry(self, index: int) -> str:
        """Name without the folder of the source, a space, and the size in bytes: tells which image an index means.

        The size is −1 where the system does not tell; `read` then raises the reason. Bytes of a name that are no UTF-8
        are surrogates (`os.fsencode` gives them back).
        """
        ...

    def read(self, index: int) -> bytes:
        """The whole encoded image; raises UnreadableImage, naming it, where it is missing, empty or cut short."""
        ...


@dataclass(frozen=True)
class SourceOptions:
    """How a source is opened; see `vavae.sources.open_source`."""

    split: str = "train"
    class_file: str | None = None
    labels_file: str | None = None
    num_classes: int | None = None
    on_unreadable: str = "error"
    labelled: bool = True

    def __post_init__(self):
        for key, value, allowed in (
            ("split", self.split, ("train", "val")),
            ("on_unreadable", self.on_unreadable, ("error", "skip")),
        ):
            if value not in allowed:
                raise ValueError(f"{key} is {value!r}; allowed are {' and '.join(allowed)}")

    def refuse_labels_file(self, path: str) -> None:
        """Raise ValueError where a labels file is given for a source that has labels of its own."""
        if self.labelled and self.labels_file is not None:
            raise ValueError(
                f"data.labels_file is {self.labels_file}, but {path} has its own labels; the file is for a validation "
                "folder of ImageNet without class folders"
            )


def describe_left_out(left_out: Mapping[str, tuple[int, Sequence[str]]]) -> str:
    """Such as `; left out: 3 × .gif (a/x.gif, a/y.gif, …)`, from kind → number and first names; empty where none is."""
    kinds = sorted(((kind, count, names) for kind, (count, names) in left_out.items() if count), key=_most_first)
    parts = []
    for kind, count, names in kinds[:_MAX_KINDS]:
        shown = shortened(names[:_MAX_NAMES], _MAX_NAMES)
        parts.append(f"{count:,} × {kind} ({shown}{', …' if count > _MAX_NAMES else ''})")
    if others := sum(count for _, count, _ in kinds[_MAX_KINDS:]):
        parts.append(f"{others:,} of other kinds")
    return f"; left out: {', '.join(parts)}" if parts else ""


def _most_first(kind: tuple[str, int, Sequence[str]]) -> tuple[int, str]:
    return -kind[1], kind[0]


def empty_images(where: str, names: Sequence[str], what: str = "image") -> UnreadableImage:
    """The error for images without content (a copy or download broke off), `where` such as `in x.tar`."""
    count = f"1 {what} is" if len(names) == 1 else f"{len(names):,} {what}s are"
    return UnreadableImage(f"{count} empty {where}: {shortened(names, 5)}")


def from_folder(taken: str) -> str:
    """Such as `, from its folder train`; empty where `taken`, the part of a folder that was taken, is."""
    return f", from its folder {taken}" if taken else ""
