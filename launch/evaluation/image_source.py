"""Images to evaluate, uint8 `[B, H, W, 3]` in a fixed order: of files (in folders, tars or lists) or an `.npz`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from torch import Tensor

from common.files import read_json
from launch.evaluation.encoded_images import AS_PUBLISHED, Decoding, EncodedImages, as_size
from launch.evaluation.npz_file import ARRAY, NpzImages, npz_names


class ImageSource(Protocol):
    """Images that can be gone through as often as needed."""

    description: str

    def __len__(self) -> int: ...

    def batches(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """uint8 `[size, H, W, 3]` (the last one may be smaller) of the images `start` to `stop` (default: all), always
        in the same order.

        A source of files also has `seen(start, stop)`: of those images that were decoded, how many were `lossy` and
        `resized`.
        """
        ...


def open_images(
    path: str | Path,
    image_size: int | None = None,
    crop: str = "center",
    decoding: Decoding = AS_PUBLISHED,
    by_index: bool | None = None,
) -> ImageSource:
    """The images at `path`: an `.npz` with `arr_0`, files, or a folder that `sample` wrote: its `samples.npz`, or what
    is in its `images/` beside a `samples.json`.

    by_index: whether files come in the order of the indices that are their names, not of their folders; None: where the
    description beside them says that each class has a folder of its own (`by_class`).

    Raises ValueError where there are none, or an npz holds others than squares of `image_size`: it is not cropped.
    """
    path = Path(path)
    if (path / "samples.npz").is_file():
        path = path / "samples.npz"
    elif (path / "samples.json").is_file() and (path / "images").is_dir():
        path = path / "images"
    if path.suffix != ".npz" or path.is_dir():
        return EncodedImages(path, image_size, crop, decoding, _are_by_class(path) if by_index is None else by_index)
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if ARRAY not in npz_names(path):
        raise ValueError(f"{path} holds no images: no array {ARRAY!r}, only {', '.join(npz_names(path)) or 'nothing'}")
    images = NpzImages(path)
    if image_size is not None and images.shape[1:3] != (image_size, image_size):
        raise ValueError(
            f"{path} holds images of {as_size(images.shape[1:])}; an image size of {image_size} crops those "
            "of folders only: leave it out"
        )
    return images


def beside(images: Path) -> Path | None:
    """The description of images: `samples.json` in a folder, or in the one above its `images/`; of a file the JSON of
    its name; None where there is none."""
    places = [images.with_suffix(".json")]
    if images.is_dir():
        places = [images / "samples.json"] + ([images.parent / "samples.json"] if images.name == "images" else [])
    return next((path for path in places if path.is_file()), None)


def _are_by_class(images: Path) -> bool:
    described = beside(images) if images.is_dir() else None
    facts = None if described is None else read_json(described)
    return isinstance(facts, dict) and facts.get("by_class") is True


def image_sides(images: ImageSource) -> tuple[int, int]:
    """Height and width of the images of a source, which are all of one size: those of the first."""
    return tuple(next(iter(images.batches(1))).shape[1:3])


def image_size(images: ImageSource) -> str:
    """Width × height of the images of a source, for messages; see `image_sides`."""
    return as_size(image_sides(images))
