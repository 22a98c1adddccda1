"""JPEG files like ImageNet's: cut from photographs that installed packages ship, or else pictures of noise."""

import importlib.util
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

#: The commonest size of ImageNet's photographs.
WIDTH, HEIGHT, QUALITY = 500, 375, 90
CLASSES = 8
#: Images in a tar.
SHARD = 128
#: A cut's sides are at least this part of those of the largest that fits.
LEAST_CUT = 0.5
#: Name of a package, as imported and as installed, and its photographs.
SHIPPED = {
    ("skimage", "scikit-image"): (
        "data/astronaut.png",
        "data/coffee.png",
        "data/chelsea.png",
        "data/rocket.jpg",
        "data/hubble_deep_field.jpg",
        "data/retina.jpg",
        "data/ihc.png",
    ),
    ("sklearn", "scikit-learn"): ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
}
#: Powers of the frequency by which the noise of brightness, and that of each colour, falls: files of about 50 KB.
BRIGHTNESS, COLOUR = 1.5, 2.1


def photographs(count: int, seed: int = 0) -> tuple[list[bytes], str]:
    """JPEG files, a function of `count`, `seed` and the packages, and in words what they show."""
    from PIL import Image

    random = np.random.default_rng(seed)
    paths = shipped()
    originals = [Image.open(path).convert("RGB") for found in paths.values() for path in found]
    files = []
    for _ in range(count):
        if originals:
            original = originals[random.integers(len(originals))]
            box = _place(*original.size, random)
            picture = original.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS, box=box)
        else:
            picture = Image.fromarray(noise(random))
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=QUALITY)
        files.append(file.getvalue())
    what = f"cuts of photographs of {' and '.join(paths)}" if paths else "noise, as no package with photographs is here"
    return files, f"{what}, {WIDTH} x {HEIGHT}, quality {QUALITY}"


def shipped() -> dict[str, list[Path]]:
    """Package → photographs of those in `SHIPPED` that are installed."""
    found = {}
    for (module, package), names in SHIPPED.items():
        spec = importlib.util.find_spec(module)
        for root in (spec and spec.submodule_search_locations) or ():
            if paths := [path for name in names if (path := Path(root, name)).is_file()]:
                found[package] = paths
    return found


def _place(width: int, height: int, random: np.random.Generator) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a cut with the shape of the files, anywhere in an image."""
    unit = min(width / WIDTH, height / HEIGHT) * random.uniform(LEAST_CUT, 1)
    cut_width, cut_height = int(unit * WIDTH), int(unit * HEIGHT)
    left, top = int(random.integers(width - cut_width + 1)), int(random.integers(height - cut_height + 1))
    return left, top, left + cut_width, top + cut_height


def noise(random: np.random.Generator) -> np.ndarray:
    """8-bit [HEIGHT, WIDTH, 3]: brightness, and less of a noise of its own in each colour, smooth with fine texture."""
    frequencies = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None])
    frequencies[0, 0] = np.inf  # no mean

    def plane(power: float) -> np.ndarray:
        shape = frequencies.shape
        drawn = random.standard_normal(shape) + 1j * random.standard_normal(shape)
        made = np.fft.irfft2(drawn / frequencies**power, (HEIGHT, WIDTH))
        return made / made.std()

    brightness = 128 + 50 * plane(BRIGHTNESS)
    pixels = np.stack([brightness + 25 * plane(COLOUR) for _ in range(3)], axis=-1)
    return pixels.clip(0, 255).astype(np.uint8)


def label(number: int, count: int) -> int:
    """The class of one of `count` images: in the order of images, too, classes come one after the other."""
    return number * min(CLASSES, count) // count


def write_folder(folder: Path, files: Sequence[bytes]) -> None:
    """A sub-folder for each class."""
    for number, content in enumerate(files):
        path = folder / f"class-{label(number, len(files))}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def write_tars(folder: Path, files: Sequence[bytes]) -> None:
    """Tars of samples as WebDataset packs them, `jpg` and `cls`, in the order that the class folders give."""
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, len(files), SHARD):
        with tarfile.open(folder / f"images-{first // SHARD:05d}.tar", "w") as tar:
            for number, content in enumerate(files[first : first + SHARD], start=first):
                members = {"jpg": content, "cls": str(label(number, len(files))).encode()}
                for ending, data in members.items():
                    member = tarfile.TarInfo(f"{number:06d}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
