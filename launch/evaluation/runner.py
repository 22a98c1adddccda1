"""One pass over images through a network, and the figures of samples against a reference set."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from common.files import sha256
from launch.evaluation.features import Extractor
from launch.evaluation.image_source import (
    AS_PUBLISHED,
    Decoding,
    ImageSource,
    image_size,
    npz_names,
    open_images,
    read_npz,
)
from launch.evaluation.metrics import (
    NOT_STATED,
    FeatureStatistics,
    Moments,
    frechet_distance,
    inception_score,
    precision_recall,
    require_moments,
)

REQUIRED_METADATA = ("solver", "nfe", "dtype", "guidance", "hashes")  # facts that no figure may be without
NEAREST_K = 3  # of precision and recall
MAX_KEPT = 50_000  # images whose features are kept for precision and recall; 0.4 GB of Inception's
_PAIRS = (("mu", "sigma"), ("mu_s", "sigma_s"))  # of features, and of spatial ones, in a file of statistics


@dataclass
class ImageFeatures:
    """The result of one pass over images."""

    description: str
    count: int
    sha256: str = ""  # of all pixels in order
    features: FeatureStatistics = field(default_factory=FeatureStatistics)
    spatial: FeatureStatistics = field(default_factory=FeatureStatistics)
    kept: Tensor | None = None  # [N, D] float32, None of more than MAX_KEPT images
    logits: Tensor | None = None


def measure(images: ImageSource, extractor: Extractor, batch_size: int = 64) -> ImageFeatures:
    """One pass over `images` through the extractor; raises ValueError for features that are not finite."""
    digest, result = hashlib.sha256(), ImageFeatures(images.description, len(images))
    kept, logits = [], []
    for batch in tqdm(images.batches(batch_size), total=-(-len(images) // batch_size), disable=None, leave=False):
        digest.update(batch.contiguous().numpy().tobytes())
        found = {name: value.float().cpu() for name, value in extractor(batch).items()}
        try:
            result.features.update(found["features"])
            if "spatial" in found:
                result.spatial.update(found["spatial"])
        except ValueError as e:
            raise ValueError(f"{images.description}: {e}") from None
        if "logits" in found:
            logits.append(found["logits"])
        if len(images) <= MAX_KEPT:
            kept.append(found["features"])
    result.sha256 = digest.hexdigest()
    result.kept = torch.cat(kept) if kept else None
    result.logits = torch.cat(logits) if logits else None
    return result


@dataclass(frozen=True)
class Reference:
    """Real images, their statistics, or both: then the images serve precision and recall alone."""

    description: str
    images: ImageSource | None = None
    features: Moments | None = None
    spatial: Moments | None = None
    sha256: str | None = None  # of the statistics file


def open_reference(
    path: str | Path, image_size: int | None = None, crop: str = "center", decoding: Decoding = AS_PUBLISHED
) -> Reference:
    """Image files (see `open_images`), or an npz with statistics (`mu`, `sigma`, and `mu_s`, `sigma_s`), images
    (`arr_0`) or both.

    Raises ValueError for an npz with neither, with half of a pair, or with statistics of which there is no distance.
    """
    path = Path(path)
    names = npz_names(path) if path.suffix == ".npz" and path.is_file() else []
    statistics = [name for pair in _PAIRS for name in pair if name in names]
    if not statistics:
        return Reference(str(path), images=open_images(path, image_size, crop, decoding))
    for mean, covariance in _PAIRS:
        if (mean in names) != (covariance in names):
            raise ValueError(f"{path} holds only one of {mean!r} and {covariance!r}")
    if "mu" not in names:
        raise ValueError(f"{path} holds no 'mu' and 'sigma'")
    pairs = {name: torch.from_numpy(read_npz(path, name)) for name in statistics}
    for mean, covariance in _PAIRS:
        if mean in pairs:
            require_moments(pairs[mean], pairs[covariance], (f"{path}: {mean}", f"{path}: {covariance}"))
    spatial = (pairs["mu_s"], pairs["sigma_s"]) if "mu_s" in pairs else None
    images = open_images(path) if "arr_0" in names else None
    return Reference(str(path), images, (pairs["mu"], pairs["sigma"]), spatial, sha256(path))


def evaluate_samples(
    samples: ImageSource,
    reference: Reference,
    extractor: Extractor,
    *,
    metadata: Mapping[str, Any],
    batch_size: int = 64,
    allow_few: bool = False,
) -> dict:
    """Fréchet distance `fid` of samples to the reference, and what else the extractor and the reference allow:
    `sfid`, `inception_score`, `precision`, `recall`.

    Args:
        metadata: what the samples were made by; of `solver, nfe, dtype, guidance, hashes` those that are missing are
            said to be.
        allow_few: measure even with no more samples than features, where the covariance is singular and the distance
            far too large.

    Returns:
        A JSON-ready dict: `metrics`, `samples` (their number), `samples_sha256`, `reference`, `features`, the metadata,
        `skipped` (figure → reason), `notes`.

    Raises:
        ValueError: images of another size than the reference's, too few samples, features of another width than the
            reference's, non-finite features.
    """
    if reference.images is not None:
        require_one_size(samples, reference.images)
    _require_widths(reference, samples, extractor)
    got = measure(samples, extractor, batch_size)
    notes = check_count(got, allow_few)
    real = None
    # Statistics beside images spare a pass over a large set; one small enough for precision and recall is used.
    if reference.images is not None and (reference.features is None or len(reference.images) <= MAX_KEPT):
        real = measure(reference.images, extractor, batch_size)
    if real is not None and reference.features is None:
        notes += check_count(real, allow_few, "reference images")
    metrics, skipped = {}, {}
    names = samples.description, reference.description
    metrics["fid"] = named_distance(got.features.moments, reference.features or real.features.moments, names)
    spatial = reference.spatial or (real.spatial.moments if real is not None and real.spatial.count else None)
    if spatial is None or not got.spatial.count:
        skipped["sfid"] = "needs Inception's spatial features of the samples and of the reference"
    else:
        metrics["sfid"] = named_distance(got.spatial.moments, spatial, names)
    if got.logits is None:
        skipped["inception_score"] = "needs Inception's class scores"
    else:
        metrics["inception_score"] = inception_score(got.logits)
    if real is None or got.kept is None or real.kept is None:
        skipped["precision, recall"] = (
            f"need at most {MAX_KEPT:,} samples and as many reference images, not statistics alone"
        )
    elif min(real.count, got.count) <= NEAREST_K:
        skipped["precision, recall"] = f"need more than {NEAREST_K} samples and reference images"
    else:
        metrics["precision"], metrics["recall"] = precision_recall(real.kept, got.kept, NEAREST_K)
    about = {"images": real.count if real else None, "sha256": reference.sha256 or real.sha256}
    facts = {"samples": got.count, "samples_sha256": got.sha256}
    facts["reference"] = {"path": reference.description, **about}
    return make_result(metrics, skipped, notes, facts, extractor, metadata)


def require_one_size(first: ImageSource, second: ImageSource) -> None:
    """Raise ValueError where two sources hold images of different sizes: the extractor scales
    its input, and the figures would be silently wrong."""
    sizes = [image_size(images) for images in (first, second)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{first.description} holds images of {sizes[0]}, {second.description} of {sizes[1]}: they "
            "cannot be compared (--image-size crops those of folders to one size)"
        )


def _require_widths(reference: Reference, samples: ImageSource, extractor: Extractor) -> None:
    """Raise ValueError, before a pass over all samples, where the reference's statistics are of other features."""
    if reference.features is None:
        return
    found = extractor(next(iter(samples.batches(1))))
    for name, known in (("features", reference.features), ("spatial", reference.spatial)):
        if known is not None and name in found and (width := found[name].shape[1]) != known[0].numel():
            raise ValueError(
                f"{reference.description} holds statistics of {known[0].numel()} {name}; the network to "
                f"compare by gives {width}, so they are another's"
            )


def named_distance(made: Moments, real: Moments, names: tuple[str, str]) -> float:
    """The Fréchet distance of generated features to real ones; errors name where each of them is from."""
    try:
        return frechet_distance(*made, *real)
    except ValueError as e:
        raise ValueError(f"no distance of {names[0]} (mu1, sigma1) to {names[1]} (mu2, sigma2): {e}") from None


def check_count(measured: ImageFeatures, allowed: bool, what: str = "samples") -> list[str]:
    """A note where there are no more images than features; raises ValueError there unless `allowed`."""
    if measured.count < 2:
        raise ValueError(f"{measured.description} holds {measured.count} image; a distance needs at least 2")
    width = len(measured.features.mean)
    if measured.count > width:
        return []
    problem = f"{measured.count} {what} for {width} features: the covariance is singular and the distance far too large"
    if not allowed:
        raise ValueError(f"{measured.description}: {problem} (--allow-few measures all the same)")
    return [problem]


def make_result(metrics, skipped, notes, facts, extractor, metadata) -> dict:
    """The JSON-ready result of an evaluation; facts of `REQUIRED_METADATA` that are missing are marked so."""
    missing = [key for key in REQUIRED_METADATA if key not in metadata]
    if missing:
        notes = [*notes, f"not stated by whoever made the images: {', '.join(missing)}"]
    stated = {key: metadata.get(key, NOT_STATED) for key in REQUIRED_METADATA}
    name = getattr(extractor, "name", None) or getattr(extractor, "__name__", type(extractor).__name__)
    used = {} if extractor is None else {"features": name}
    measured = {"metrics": metrics, **facts, **used, "skipped": skipped, "notes": notes}
    # Measured values take precedence over metadata of the same name.
    return measured | {key: value for key, value in (metadata | stated).items() if key not in measured}
