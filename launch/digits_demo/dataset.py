"""The embedded data set: scikit-learn's 1,797 handwritten digits as a folder of 32×32 RGB images.

The source is the test part of the UCI optical recognition set: 8×8 counts from 0 to 16. Each digit is enlarged four
times by bicubic interpolation, which is smooth enough for a small tokenizer and keeps more of the strokes than
bilinear (root-mean-square error of the round trip 1.0 of 16, not 1.5); averaging 4×4 pixels brings an image back to
8×8. Both directions are always used as a pair: real images and generated ones are compared after the same trip.

The held-out split is fixed: 50 digits of each class, evenly spaced in the order of the file (which goes from writer to
writer), leaving 1,297 for training. No run's seed has any say in it.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.files import read_json, sha256, write_json

CLASSES = 10
HELD_OUT_PER_CLASS = 50
SCALE = 4  # 8×8 to 32×32
PEAK = 16  # largest count of the source, shown as white
_RECIPE = "sklearn digits, bicubic x4, held out 50 a class evenly spaced"


@dataclass(frozen=True)
class Digits:
    """Images `[N, 32, 32, 3]` uint8 with their labels `[N]` int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def balanced(self, per_class: int, seed: int = 0) -> Tensor:
        """Indices of `per_class` random digits of each class."""
        generator = torch.Generator().manual_seed(seed)
        members = [(self.labels == label).nonzero().flatten() for label in range(CLASSES)]
        return torch.cat([m[torch.randperm(len(m), generator=generator)[:per_class]] for m in members])


@dataclass(frozen=True)
class Folders:
    """The two image folders (one sub-folder a class) that `write` makes."""

    train: Path
    heldout: Path


def source() -> dict[str, Digits]:
    """`train` (1,297) and `heldout` (500) digits, straight from scikit-learn."""
    from sklearn.datasets import load_digits

    data = load_digits()
    labels = data.target.astype(np.int64)
    held = np.zeros(len(labels), bool)
    held[_evenly_spaced(labels, HELD_OUT_PER_CLASS)] = True
    images = upsample(data.images)
    return {
        name: Digits(images[torch.from_numpy(mask)], torch.from_numpy(labels[mask]))
        for name, mask in (("train", ~held), ("heldout", held))
    }


def upsample(digits: np.ndarray) -> Tensor:
    """Counts `[N, 8, 8]` from 0 to 16 → uint8 `[N, 32, 32, 3]`, grey; bicubic in float32, rounded once at the end."""
    enlarged = [
        np.asarray(Image.fromarray(d).resize((SCALE * 8, SCALE * 8), Image.Resampling.BICUBIC))
        for d in np.asarray(digits, dtype=np.float32)
    ]
    grey = np.clip(np.rint(np.stack(enlarged) * (255 / PEAK)), 0, 255).astype(np.uint8)
    return torch.from_numpy(grey)[..., None].repeat(1, 1, 1, 3)


def downsample(images: Tensor) -> Tensor:
    """uint8 `[N, 32, 32, 3]` → counts `[N, 8, 8]` float64 from 0 to 16: means over 4×4 pixels and the colours."""
    side = SCALE * 8
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != (side, side, 3):
        raise ValueError(f"digit images must be uint8 [N, {side}, {side}, 3], got {images.dtype} {tuple(images.shape)}")
    blocks = images.cpu().double().view(-1, 8, SCALE, 8, SCALE, 3)
    return blocks.mean((2, 4, 5)) * (PEAK / 255)


def _evenly_spaced(labels: np.ndarray, per_class: int) -> np.ndarray:
    """Sorted indices of `per_class` members of each class, equally far apart among the members."""
    members = [np.flatnonzero(labels == label) for label in range(CLASSES)]
    return np.sort(np.concatenate([m[np.arange(per_class) * len(m) // per_class] for m in members]))


def write(directory: str | Path) -> Folders:
    """Write both splits under `directory` as `train/<class>/<number>.png` and `heldout/…`, and return the folders.

    A manifest with the checksum of every file is written last. A directory that agrees with its manifest is left alone,
    missing or damaged images are written again; a file that is not of the set raises ValueError.
    """
    directory = Path(directory)
    folders = Folders(directory / "train", directory / "heldout")
    manifest = directory / "manifest.json"
    expected = _recorded_checksums(manifest)
    found = [p for folder in (folders.train, folders.heldout) for p in folder.rglob("*") if p.is_file()]
    present = {p.relative_to(directory).as_posix(): p for p in found}
    if expected and present.keys() == expected.keys() and all(sha256(p) == expected[k] for k, p in present.items()):
        return folders

    names = {f"{split}/{name}": image for split, part in source().items() for name, image in _named(part)}
    unknown = sorted(present.keys() - names.keys())
    if unknown:
        raise ValueError(f"{directory} holds {len(unknown)} files that are not of the digits set, e.g. {unknown[0]}")
    manifest.unlink(missing_ok=True)
    for name, image in names.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.numpy()).save(path)
    write_json(manifest, {"recipe": _RECIPE, "sha256": {name: sha256(directory / name) for name in names}})
    return folders


def read(folder: str | Path) -> Digits:
    """The digits of one split's folder, by class and number."""
    paths = sorted(Path(folder).glob("[0-9]/*.png"))
    if not paths:
        raise ValueError(f"no digits under {folder}: expected <class>/<number>.png")
    images = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    return Digits(torch.from_numpy(images), torch.tensor([int(path.parent.name) for path in paths]))


def _named(digits: Digits):
    """(`<class>/<number>.png`, image) pairs; numbers count within the split."""
    for i, (image, label) in enumerate(zip(digits.images, digits.labels.tolist(), strict=True)):
        yield f"{label}/{i:04d}.png", image


def _recorded_checksums(manifest: Path) -> dict[str, str]:
    """File name → SHA-256 of a manifest of this recipe; empty where there is none, or an unreadable or older one."""
    try:
        content = read_json(manifest)
        return content["sha256"] if content["recipe"] == _RECIPE else {}
    except (ValueError, KeyError, TypeError):
        return {}
