"""Samples against a reference, reconstructions against originals, as functions. Every result says what it is of."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from common.files import sha256
from common.seeds import generator
from launch.evaluation.features import Extractor
from launch.evaluation.image_source import ImageSource, image_sides, image_size, npz_names, open_images, read_npz
from launch.evaluation.metrics import (
    NOT_STATED,
    FeatureStatistics,
    frechet_distance,
    inception_score,
    precision_recall,
    psnr,
    require_moments,
    ssim,
)
from vavae import seeds
from vavae.images import to_float_batch, to_uint8
from vavae.loss import Perceptual
from vavae.model import AutoencoderKL

STATED = ("solver", "nfe", "dtype", "guidance", "hashes")  # facts that no figure may be without
NEIGHBOURS = 3  # of precision and recall
KEPT = 50_000  # images whose features are kept for precision and recall; 0.4 GB of Inception's
_PAIRS = (("mu", "sigma"), ("mu_s", "sigma_s"))  # of features, and of spatial ones, in a file of statistics
Moments = tuple[Tensor, Tensor]  # mean [D], covariance [D, D]


@dataclass
class Measured:
    """What one pass over images gives."""

    description: str
    count: int
    sha256: str = ""  # of all pixels in order
    features: FeatureStatistics = field(default_factory=FeatureStatistics)
    spatial: FeatureStatistics = field(default_factory=FeatureStatistics)
    kept: Tensor | None = None  # [N, D] float32, None of more than KEPT images
    logits: Tensor | None = None


def measure(images: ImageSource, extractor: Extractor, batch_size: int = 64) -> Measured:
    """One pass over `images` through the extractor; raises ValueError for features that are not finite."""
    digest, result = hashlib.sha256(), Measured(images.description, len(images))
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
        if len(images) <= KEPT:
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


def open_reference(path: str | Path, image_size: int | None = None, crop: str = "center") -> Reference:
    """A folder of images, or an npz with statistics (`mu`, `sigma`, and `mu_s`, `sigma_s`), images (`arr_0`) or both.

    Raises ValueError for an npz with neither, with half of a pair, or with statistics of which there is no distance.
    """
    path = Path(path)
    names = npz_names(path) if path.suffix == ".npz" and path.is_file() else []
    statistics = [name for pair in _PAIRS for name in pair if name in names]
    if not statistics:
        return Reference(str(path), images=open_images(path, image_size, crop))
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
    notes = _few(got, allow_few)
    real = measure(reference.images, extractor, batch_size) if _needs_images(reference) else None
    if real is not None and reference.features is None:
        notes += _few(real, allow_few, "reference images")
    metrics, skipped = {}, {}
    names = samples.description, reference.description
    metrics["fid"] = _distance(_moments(got.features), reference.features or _moments(real.features), names)
    spatial = reference.spatial or (_moments(real.spatial) if real is not None and real.spatial.count else None)
    if spatial is None or not got.spatial.count:
        skipped["sfid"] = "needs Inception's spatial features of the samples and of the reference"
    else:
        metrics["sfid"] = _distance(_moments(got.spatial), spatial, names)
    if got.logits is None:
        skipped["inception_score"] = "needs Inception's class scores"
    else:
        metrics["inception_score"] = inception_score(got.logits)
    if real is None or got.kept is None or real.kept is None:
        skipped["precision, recall"] = (
            f"need at most {KEPT:,} samples and as many reference images, not statistics alone"
        )
    elif min(real.count, got.count) <= NEIGHBOURS:
        skipped["precision, recall"] = f"need more than {NEIGHBOURS} samples and reference images"
    else:
        metrics["precision"], metrics["recall"] = precision_recall(real.kept, got.kept, NEIGHBOURS)
    about = {"images": real.count if real else None, "sha256": reference.sha256 or real.sha256}
    facts = {"samples": got.count, "samples_sha256": got.sha256}
    facts["reference"] = {"path": reference.description, **about}
    return _result(metrics, skipped, notes, facts, extractor, metadata)


def require_one_size(first: ImageSource, second: ImageSource) -> None:
    """Raise ValueError where two sources hold images of different sizes: networks scale whatever they are given, and
    the figures would be wrong without a word."""
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
    for name, moments in (("features", reference.features), ("spatial", reference.spatial)):
        if moments is not None and name in found and (width := found[name].shape[1]) != moments[0].numel():
            raise ValueError(
                f"{reference.description} holds statistics of {moments[0].numel()} {name}; the network to "
                f"compare by gives {width}, so they are another's"
            )


def _distance(made: Moments, real: Moments, names: tuple[str, str]) -> float:
    try:
        return frechet_distance(*made, *real)
    except ValueError as e:
        raise ValueError(f"no distance of {names[0]} (mu1, sigma1) to {names[1]} (mu2, sigma2): {e}") from None


def _needs_images(reference: Reference) -> bool:
    """Statistics beside images spare a pass over a large set; a set small enough for precision and recall is used."""
    return reference.images is not None and (reference.features is None or len(reference.images) <= KEPT)


def _moments(statistics: FeatureStatistics) -> Moments:
    return statistics.mean, statistics.covariance


def _few(measured: Measured, allowed: bool, what: str = "samples") -> list[str]:
    if measured.count < 2:
        raise ValueError(f"{measured.description} holds {measured.count} image; a distance needs at least 2")
    width = len(measured.features.mean)
    if measured.count > width:
        return []
    problem = f"{measured.count} {what} for {width} features: the covariance is singular and the distance far too large"
    if not allowed:
        raise ValueError(f"{measured.description}: {problem} (--allow-few measures all the same)")
    return [problem]


def _result(metrics, skipped, notes, facts, extractor, metadata) -> dict:
    missing = [key for key in STATED if key not in metadata]
    if missing:
        notes = [*notes, f"not stated by whoever made the images: {', '.join(missing)}"]
    stated = {key: metadata.get(key, NOT_STATED) for key in STATED}
    name = getattr(extractor, "name", None) or getattr(extractor, "__name__", type(extractor).__name__)
    used = {} if extractor is None else {"features": name}
    measured = {"metrics": metrics, **facts, **used, "skipped": skipped, "notes": notes}
    # What was measured stands, whatever the metadata say.
    return measured | {key: value for key, value in (metadata | stated).items() if key not in measured}


class Reconstructions:
    """Images that a tokenizer encodes and decodes, as an image source in the order of the originals.

    Args:
        originals: images whose sides are multiples of the tokenizer's down-sampling.
        tokenizer: in evaluation mode, on its device.
        posterior: `sample` (as latents are stored; the noise depends on the seed and the image's index only) or `mode`.
    """

    def __init__(self, originals: ImageSource, tokenizer: AutoencoderKL, *, posterior: str = "sample", seed: int = 0):
        if posterior not in ("sample", "mode"):
            raise ValueError(f"posterior {posterior!r} is not known: sample, mode")
        ratio = tokenizer.config.downsample_ratio
        if any(side % ratio for side in image_sides(originals)):
            raise ValueError(
                f"{originals.description} holds images of {image_size(originals)}; the tokenizer takes "
                f"multiples of {ratio} (--image-size crops those of folders)"
            )
        self.originals, self.tokenizer, self.posterior, self.seed = originals, tokenizer, posterior, seed
        self.description = f"{originals.description}, decoded"

    def __len__(self) -> int:
        return len(self.originals)

    @torch.no_grad()
    def batches(self, size: int) -> Iterator[Tensor]:
        start, device = 0, next(self.tokenizer.parameters()).device
        for images in self.originals.batches(size):
            encoding = self.tokenizer.encode(to_float_batch(images).to(device))
            z = encoding.mode()
            if self.posterior == "sample":
                z = encoding.sample(noise=self._noise(start, z).to(device))
            yield to_uint8(self.tokenizer.decode(z).float()).permute(0, 2, 3, 1).contiguous().cpu()
            start += len(images)

    def _noise(self, start: int, z: Tensor) -> Tensor:
        draws = [
            torch.randn(z.shape[1:], generator=generator(self.seed, seeds.POSTERIOR_NOISE, start + i))
            for i in range(len(z))
        ]
        return torch.stack(draws)


def perceptual_distance(
    weights: str | Path | None, device: torch.device | str = "cpu"
) -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS (VGG-16) between two batches of uint8 images, `[B]`; raises where the backbone's weights cannot be had."""
    net = Perceptual(None if weights is None else str(weights)).to(device)

    @torch.no_grad()
    def distance(a: Tensor, b: Tensor) -> Tensor:
        return net(to_float_batch(a).to(device), to_float_batch(b).to(device)).flatten().double().cpu()

    return distance


def evaluate_reconstructions(
    originals: ImageSource,
    reconstructions: ImageSource,
    *,
    extractor: Extractor | None,
    lpips: Callable[[Tensor, Tensor], Tensor] | None,
    metadata: Mapping[str, Any],
    batch_size: int = 64,
    allow_few: bool = False,
    skipped: Mapping[str, str] | None = None,
) -> dict:
    """`rfid`, `psnr` (dB), `lpips` and `ssim` of 8-bit reconstructions: means over the images, in the originals' order.

    Args:
        extractor, lpips: None leaves their figures out; `skipped` says why.

    Raises:
        ValueError: another number or size of images, or too few of them for `rfid`.
    """
    require_pairs(originals, reconstructions)
    _require_sides(originals, *(("LPIPS", 16) if lpips else ("SSIM", 11)))
    pairs = _Pairs(originals, reconstructions, lpips)
    skipped = dict(skipped or {})
    if extractor is None:
        skipped.setdefault("rfid", "no network was given to compare by")
        for _ in pairs.batches(batch_size):
            pass
        metrics, notes = {}, []
    else:
        real, decoded = measure(originals, extractor, batch_size), measure(pairs, extractor, batch_size)
        notes = _few(real, allow_few, "images")
        names = reconstructions.description, originals.description
        metrics = {"rfid": _distance(_moments(decoded.features), _moments(real.features), names)}
    if lpips is None:
        skipped.setdefault("lpips", "no network was given to compare by")
    metrics |= {name: torch.cat(values).mean().item() for name, values in pairs.values.items() if values}
    if equal := int(torch.cat(pairs.values["psnr"]).isinf().sum()):
        del metrics["psnr"]
        skipped["psnr"] = f"infinite: {equal} of {len(originals)} reconstructions are equal to their originals"
    facts = {
        "images": len(originals),
        "originals": originals.description,
        "reconstructions": reconstructions.description,
    }
    return _result(metrics, skipped, notes, facts, extractor, metadata)


def require_pairs(originals: ImageSource, reconstructions: ImageSource) -> None:
    """Raise ValueError where two sources hold different numbers of images, or images of different sizes."""
    if len(originals) != len(reconstructions):
        raise ValueError(
            f"{originals.description} holds {len(originals)} images, {reconstructions.description} "
            f"{len(reconstructions)}: they do not pair"
        )
    require_one_size(originals, reconstructions)


def _require_sides(images: ImageSource, figure: str, least: int) -> None:
    if min(image_sides(images)) < least:
        raise ValueError(
            f"{images.description} holds images of {image_size(images)}; {figure} needs at least {least} pixels a side"
        )


class _Pairs:
    """The reconstructions; going through them once also takes the figures of each pair."""

    def __init__(self, originals: ImageSource, reconstructions: ImageSource, lpips):
        self.originals, self.reconstructions = originals, reconstructions
        self.description = reconstructions.description
        self.figures = {"psnr": psnr, "ssim": ssim} | ({"lpips": lpips} if lpips else {})
        self.values: dict[str, list[Tensor]] = {}

    def __len__(self) -> int:
        return len(self.originals)

    def batches(self, size: int) -> Iterator[Tensor]:
        self.values = {name: [] for name in self.figures}
        pairs = zip(self.originals.batches(size), self.reconstructions.batches(size), strict=True)
        for original, decoded in pairs:
            for name, figure in self.figures.items():
                self.values[name].append(figure(original, decoded))
            yield decoded
