"""Images that are files of their own: those of a folder, or of a list."""

import os
from collections.abc import Sequence
from pathlib import Path

from vavae.image_files import read_image_file
from vavae.sources.classes import Labelled


class Files:
    """A `Source` of the files at `paths`, relative to `root` (or absolute), in that order."""

    def __init__(self, description: str, root: Path, paths: Sequence[str], labelled: Labelled, *, empty: int = 0):
        self.description, self.root, self.paths = description, root, tuple(paths)
        self.classes, self.labels, self.empty = labelled.classes, labelled.labels, empty

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return os.path.join(self.root, self.paths[index])

    def relative_name(self, index: int) -> str:
        return self.paths[index]

    def entry(self, index: int) -> str:
        try:
            size = os.stat(self.name(index)).st_size
        except (OSError, ValueError):
            size = -1
        return f"{self.paths[index]} {size}"

    def read(self, index: int) -> bytes:
        return read_image_file(self.name(index))
