"""Real photographs, which scikit-image and scikit-learn ship, and encoded files of them."""

import io
from collections.abc import Mapping
from functools import cache

import numpy as np
import skimage.data
from PIL import Image
from sklearn.datasets import load_sample_images

#: Of scikit-image's own package; the others of `skimage.data` would be downloads.
NAMES = ("astronaut", "coffee", "chelsea", "rocket", "hubble_deep_field", "retina", "immunohistochemistry", "camera")


@cache
def photographs() -> tuple[Image.Image, ...]:
    """Ten photographs of 300 to 1,411 pixels a side, one of them grey."""
    pixels = [getattr(skimage.data, name)() for name in NAMES] + list(load_sample_images().images)
    return tuple(Image.fromarray(np.asarray(p)) for p in pixels)


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    """The image as a file of a kind; options of Pillow's writer."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def jpegs(seed: int = 0) -> list[bytes]:
    """Every photograph as it is, and at random sizes of both parities; quality 90."""
    rng, files = np.random.default_rng(seed), []
    for image in photographs():
        files.append(encoded(image, quality=90))
        size = [int(side * factor) for side, factor in zip(image.size, rng.uniform(0.6, 2.2, 2), strict=True)]
        files.append(encoded(image.resize(size, Image.Resampling.LANCZOS), quality=90))
    return files


class MemoryFiles:
    """Encoded files in memory, as a decoder reads them."""

    def __init__(self, files: Mapping[str, bytes] | list[bytes]):
        self.files = dict(files) if isinstance(files, Mapping) else {f"{i}.jpg": f for i, f in enumerate(files)}

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return list(self.files)[index]

    def read(self, index: int) -> bytes:
        return list(self.files.values())[index]
