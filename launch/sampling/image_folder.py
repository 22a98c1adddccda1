"""A folder of images by index: `images/00000007.png`, or below a folder for each class, `images/0207/00000007.png`."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from common.files import FileError, atomic_write, make_directory, sha256
from common.text import shortened
from launch.sampling.units import Rows

ImageFormat = Literal["png", "webp"]
_WITHOUT_LOSS: dict[ImageFormat, dict] = {"png": {}, "webp": {"lossless": True, "method": 4}}
THREADS = min(8, len(os.sched_getaffinity(0)))  # that compress: Pillow lets others run meanwhile


@dataclass(frozen=True)
class ImageFolder:
    """Files of N images below `output`/images.

    Attributes:
        labels: int64 [N].
        by_class: whether each class has a folder of its own, named by its label in so many digits that names sort as
            labels do.
    """

    output: Path
    format: ImageFormat
    labels: np.ndarray
    num_classes: int
    by_class: bool = False

    @property
    def directory(self) -> Path:
        return self.output / "images"

    def path(self, index: int) -> Path:
        """The file of image `index`."""
        name = f"{index:08d}.{self.format}"
        if not self.by_class:
            return self.directory / name
        return self.directory / f"{self.labels[index]:0{len(str(self.num_classes - 1))}d}" / name

    def begin(self) -> None:
        """Make the folders and clear what killed processes left half written, on one process."""
        make_directory(self.directory)
        for folder in {self.path(int(i)).parent for i in np.unique(self.labels, return_index=True)[1]}:
            make_directory(folder)
        for leftover in self.directory.rglob(".*.tmp"):
            leftover.unlink(missing_ok=True)

    def write(self, start: int, images: np.ndarray) -> None:
        """Write images uint8 [b, H, W, 3] from index `start` on; each file comes into being whole."""
        with ThreadPoolExecutor(THREADS, "compress") as pool:
            for _ in pool.map(self._write_one, range(start, start + len(images)), images):
                pass

    def _write_one(self, index: int, image: np.ndarray) -> None:
        with atomic_write(self.path(index)) as file:
            Image.fromarray(image).save(file, format=self.format, **_WITHOUT_LOSS[self.format])

    def holds(self, rows: Rows) -> bool:
        """Whether the files of these images are there."""
        return all(self.path(index).is_file() for index in range(*rows))

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """uint8 [b, H, W, 3] of the images with these indices; raises FileError where one cannot be read."""
        return np.stack([self._read_one(index) for index in indices])

    def _read_one(self, index: int) -> np.ndarray:
        try:
            with Image.open(self.path(index)) as image:
                return np.array(image)
        except OSError as e:
            raise FileError(f"{self.path(index)} cannot be read ({e}): {self._advice()}") from None

    def entry(self) -> dict:
        """{"files", "bytes", "sha256"}: of all files in order of their index, the hash of their names and hashes.

        Raises FileError where a file is missing or one too many.
        """
        self.require_whole()
        digest, size = hashlib.sha256(), 0
        for path in self._paths():
            digest.update(f"{path.relative_to(self.directory)} {sha256(path)}\n".encode())
            size += path.stat().st_size
        return {"files": len(self.labels), "bytes": size, "sha256": digest.hexdigest()}

    def require_whole(self) -> None:
        """Raise FileError where the files are not those of N images."""
        found = {str(p.relative_to(self.directory)) for p in self.directory.rglob(f"*.{self.format}") if p.is_file()}
        wanted = {str(path.relative_to(self.directory)) for path in self._paths()}
        for names, what in ((wanted - found, "are missing"), (found - wanted, "are too many")):
            if names:
                raise FileError(
                    f"{self.directory} holds {len(found):,} images where {len(wanted):,} are promised; "
                    f"{shortened(sorted(names), 3)} {what}: {self._advice()}"
                )

    def _advice(self) -> str:
        return f"remove {self.output}, and sample again"

    def _paths(self) -> Iterator[Path]:
        return map(self.path, range(len(self.labels)))
