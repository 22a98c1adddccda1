"""The real images that samples are compared with: images, statistics of their features, or both; read and written."""

import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.files import atomic_write, sha256
from launch.evaluation.encoded_images import AS_PUBLISHED, Decoding
from launch.evaluation.features import Extractor, facts_of, giver
from launch.evaluation.image_source import ImageSource, image_size, open_images
from launch.evaluation.moments import Moments, require_moments
from launch.evaluation.npz_file import ARRAY, npz_names, read_npz, read_text_of, write_array, write_images
from launch.evaluation.one_pass import ImageFeatures

#: Features → the names of their mean and covariance in a file of statistics: ADM's, and ours beside them.
NAMES = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s"), "dinov2": ("mu_dinov2", "sigma_dinov2")}
FACTS = "facts"  # the name of a text there, JSON: what the statistics are of
_BLOCK = 64  # images written at a time


@dataclass(frozen=True)
class Reference:
    """Real images, their statistics, or both: then the images serve KID, precision and recall alone.

    Fields:
        features, spatial, dinov2: moments of those features.
        sha256: of the statistics file.
        facts: what a file that was written here says of itself.
    """

    description: str
    images: ImageSource | None = None
    features: Moments | None = None
    spatial: Moments | None = None
    sha256: str | None = None
    dinov2: Moments | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def moments(self) -> dict[str, Moments]:
        """Those that are known, by the name of the features."""
        known = {"features": self.features, "spatial": self.spatial, "dinov2": self.dinov2}
        return {name: moments for name, moments in known.items() if moments is not None}


def open_reference(
    path: str | Path, image_size: int | None = None, crop: str = "center", decoding: Decoding = AS_PUBLISHED
) -> Reference:
    """Image files (see `open_images`), or an npz with statistics (`mu`, `sigma`, and `mu_s`, `sigma_s`), images
    (`arr_0`) or both.

    Raises ValueError for an npz with neither, with half of a pair, or with statistics of which there is no distance.
    """
    path = Path(path)
    names = npz_names(path) if path.suffix == ".npz" and path.is_file() else []
    statistics = [name for pair in NAMES.values() for name in pair if name in names]
    if not statistics:
        return Reference(str(path), images=open_images(path, image_size, crop, decoding))
    for mean, covariance in NAMES.values():
        if (mean in names) != (covariance in names):
            raise ValueError(f"{path} holds only one of {mean!r} and {covariance!r}")
    if "mu" not in names and "mu_s" in names:
        raise ValueError(f"{path} holds no 'mu' and 'sigma'")
    moments = {kind: _moments(path, *pair) for kind, pair in NAMES.items() if pair[0] in names}
    images = open_images(path) if ARRAY in names else None
    return Reference(str(path), images, sha256=sha256(path), facts=_facts(path), **moments)


def _moments(path: Path, mean: str, covariance: str) -> Moments:
    pair = torch.from_numpy(read_npz(path, mean)), torch.from_numpy(read_npz(path, covariance))
    require_moments(*pair, (f"{path}: {mean}", f"{path}: {covariance}"))
    return pair


def _facts(path: Path) -> dict[str, Any]:
    text = read_text_of(path, FACTS)
    if text is None:
        return {}
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: {FACTS} is no JSON: {e}") from None
    if not isinstance(facts, dict):
        raise ValueError(f"{path}: {FACTS} holds {type(facts).__name__}, not a JSON object")
    return facts


def require_one_size(first: ImageSource, second: ImageSource) -> None:
    """Raise ValueError where two sources hold images of different sizes: the extractor scales
    its input, and the figures would be silently wrong."""
    sizes = [image_size(images) for images in (first, second)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{first.description} holds images of {sizes[0]}, {second.description} of {sizes[1]}: they "
            "cannot be compared (--image-size crops those of folders to one size)"
        )


def require_comparable(samples: ImageSource, reference: Reference, extractor: Extractor) -> None:
    """Raise ValueError, before a pass over all samples, where the reference is of images of another size or of another
    network: as its images, its own words (`facts`) or the width of its statistics say."""
    if reference.images is not None:
        require_one_size(samples, reference.images)
    if (stated := reference.facts.get("image_size")) not in (None, size := image_size(samples)):
        raise ValueError(
            f"{samples.description} holds images of {size}, {reference.description} statistics of images of {stated}: "
            "they cannot be compared"
        )
    if not reference.moments:
        return
    for network in reference.facts.get("networks", []):
        for kind in network.get("gives", {}):
            ours, theirs = (giver(extractor, kind) or {}).get("sha256"), network.get("sha256")
            if ours is not None and theirs is not None and ours != theirs:
                raise ValueError(
                    f"{reference.description} holds statistics by {network.get('name')} with SHA-256 {theirs}; the "
                    f"network to compare by has {ours}"
                )
    found = extractor(next(iter(samples.batches(1))))
    for name, known in reference.moments.items():
        if name in found and (width := found[name].shape[1]) != known[0].numel():
            raise ValueError(
                f"{reference.description} holds statistics of {known[0].numel()} {name}; the network to "
                f"compare by gives {width}, so they are another's"
            )


def reference_facts(images: ImageSource, measured: ImageFeatures, extractor: Extractor) -> dict[str, Any]:
    """What a written reference says of itself."""
    return {
        "images": measured.count,
        "pixels_sha256": measured.sha256,
        "source": measured.description,
        "image_size": image_size(images),
        "files": measured.seen | getattr(images, "facts", {}),
        "networks": facts_of(extractor),
    }


def write_reference(
    path: Path, images: ImageSource, measured: ImageFeatures, extractor: Extractor, keep_images: int
) -> dict[str, Any]:
    """Write an npz that ADM's evaluator reads, too → its facts.

    It holds the statistics (`mu`, `sigma`; `mu_s`, `sigma_s`; `mu_dinov2`, `sigma_dinov2`), float64, the facts, and
    in `arr_0` as many images, evenly spread over the set, as `keep_images` says: ADM's evaluator takes precision and
    recall of them, and does not go without. They are read once more.
    """
    facts = reference_facts(images, measured, extractor) | {"kept_images": min(keep_images, measured.count)}
    with atomic_write(path) as file, zipfile.ZipFile(file, "w", allowZip64=True) as archive:
        if facts["kept_images"]:
            write_images(archive, facts["kept_images"], _spread(images, facts["kept_images"]))
        arrays = {FACTS: np.array(json.dumps(facts))}
        for kind, pair in NAMES.items():
            if kind in measured.moments:
                arrays |= {name: part.numpy() for name, part in zip(pair, measured.moments[kind].moments, strict=True)}
        for name, array in arrays.items():
            write_array(archive, name, array)
    return facts


def _spread(images: ImageSource, count: int) -> Iterator[np.ndarray]:
    """Of N images those at ⌊i·N / count⌋, in blocks uint8 [b, H, W, 3]."""
    places, first = {i * len(images) // count for i in range(count)}, 0
    for batch in images.batches(_BLOCK):
        yield batch[[i for i in range(len(batch)) if first + i in places]].numpy()
        first += len(batch)
