"""A judge of samples: the figures that are asked for, by networks loaded once and a reference measured once.

    source = JudgeSource(choose_figures(["fid"]), reference=Path("imagenet.npz"), inception_weights=Path("…"))
    judge = source.open(device="cuda", cache=Path("sweep/reference"))
    judge.measure(images, labels)                    # {"fid": 12.3}

The reference's features are kept below `cache`, by a hash of its files and of the network, so that they are computed
once for all processes and all starts.
"""

import hashlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from common.files import sha256
from common.records import read_record
from launch.digits_demo import dataset
from launch.digits_demo.classifier import DigitClassifier
from launch.evaluation.dinov2 import ClassTokenFeatures
from launch.evaluation.features import Extractor, FoundationFeatures, InceptionFeatures
from launch.evaluation.figures import Figure, require_known
from launch.evaluation.image_source import image_sides, image_size
from launch.evaluation.inception import SHA256
from launch.evaluation.known_features import (
    CachedReference,
    KnownFeatures,
    files_hash,
    known_features,
    read_cached,
    write_cached,
)
from launch.evaluation.one_pass import ImageFeatures, measure, measure_together
from launch.evaluation.reference import Reference, open_reference, require_comparable
from launch.evaluation.self_test import self_test
from launch.evaluation.shares import ALONE, rows_on_main
from launch.runtime.processes import Processes

log = logging.getLogger(__name__)
DIGIT_SIDE = dataset.SCALE * 8  # pixels
Network = InceptionFeatures | FoundationFeatures | ClassTokenFeatures


class TensorImages:
    """Images in memory, uint8 `[N, H, W, 3]`, as a source; of `total` images those from `first` on."""

    def __init__(self, images: Tensor, first: int = 0, total: int | None = None, description: str = "the samples"):
        self.images, self.description = images, description
        self._first, self._total = first, len(images) if total is None else total

    def __len__(self) -> int:
        return self._total

    def batches(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        stop = self._total if stop is None else stop
        assert self._first <= start and stop <= self._first + len(self.images), "not all of these are here"
        yield from self.images[start - self._first : stop - self._first].split(size)


@dataclass(frozen=True)
class JudgeSource:
    """What samples are judged by: figures, reference, and where the networks are.

    Args:
        reference: as `open_reference` takes it.
        image_size: side of the samples; images of folders are cropped to it (ADM's centre crop).
        inception_weights: torch-fidelity's file; None downloads it, unless it was before, where `download` says so.
        inception_sha256: of another file that is accepted in its place.
        foundation: a foundation model's weights, compared by in Inception's place.
        dinov2_weights: DINOv2's.
        section: of a run file whose keys name all this, for messages; else options do.

    Raises:
        ValueError: a file that a figure needs is not named or not there, or one is named that no figure reads.
    """

    figures: tuple[Figure, ...]
    reference: Path | None = None
    image_size: int | None = None
    inception_weights: Path | None = None
    download: bool = False
    foundation: Path | None = None
    batch_size: int = 64
    dinov2_weights: Path | None = None
    inception_sha256: str | None = None
    section: str | None = None

    def __post_init__(self):
        kinds, named = self.kinds, self.named
        networks = self.inception_weights, self.foundation
        if "inception" in kinds and networks == (None, None) and not self.download:
            download = "" if self.section else "let them be downloaded (--download), "
            raise ValueError(
                f"{self._users('inception')}: name Inception's weights ({named('inception_weights')} FILE, "
                f"torch-fidelity's), {download}or name a foundation model in its place ({named('foundation')} FILE)"
            )
        if None not in networks:
            both = f"{named('inception_weights')} and {named('foundation')}"
            raise ValueError(f"{both}: one network gives the features of these figures")
        alone = [figure.name for figure in self.figures if figure.name in ("sfid", "inception_score")]
        if alone and self.foundation is not None:
            raise ValueError(f"{', '.join(alone)}: of Inception alone, not of {named('foundation')} {self.foundation}")
        if "dinov2" in kinds and self.dinov2_weights is None:
            raise ValueError(f"{self._users('dinov2')}: name DINOv2's weights ({named('dinov2_weights')} FILE)")
        needed = [figure.name for figure in self.figures if figure.needs != "nothing"]
        if needed and self.reference is None:
            where = f"{named('reference')}, or data.fid_reference_file" + ("" if self.section else " of a config")
            raise ValueError(f"{', '.join(needed)}: no reference ({where})")
        if "digits" in kinds and self.image_size not in (None, DIGIT_SIDE):
            size = f"{self.image_size}×{self.image_size}"
            raise ValueError(
                f"{self._users('digits')}: of digits of {DIGIT_SIDE}×{DIGIT_SIDE}, not of images of {size}"
            )
        given = {
            "inception_weights": (self.inception_weights, "inception" in kinds),
            "foundation": (self.foundation, "inception" in kinds),
            "dinov2_weights": (self.dinov2_weights, "dinov2" in kinds),
            "reference": (self.reference, needed),
        }
        for key, (path, used) in given.items():
            if path is not None and not used:
                figures = ", ".join(figure.name for figure in self.figures)
                raise ValueError(f"{named(key)} {path}: no figure reads it ({figures})")
            if path is not None and not path.exists():
                raise ValueError(f"{named(key)} {path} does not exist")

    def named(self, key: str) -> str:
        """How a message names what says a field: an option, or the key of a section."""
        return f"{self.section}.{key}" if self.section else f"--{key.replace('_', '-')}"

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of features, in the order of the figures."""
        return tuple(dict.fromkeys(figure.features for figure in self.figures))

    def _users(self, kind: str) -> str:
        return ", ".join(figure.name for figure in self.figures if figure.features == kind)

    @cached_property
    def facts(self) -> dict:
        """What a figure depends on beside the samples: {"figures", "features", "reference"}, by hashes of files."""
        features = {kind: self._features_facts(kind) for kind in self.kinds}
        facts = {"figures": [figure.name for figure in self.figures], "features": features}
        if self.reference is not None:
            facts["reference"] = {"files_sha256": files_hash(self.reference), "image_size": self.image_size}
        return facts

    def kept_facts(self, cache: Path) -> dict:
        """{"path", "images", "sha256"} of the reference, once it was measured: as a result of evaluate has them."""
        kind = next(figure.features for figure in self.figures if figure.needs != "nothing")
        path = self._cached_at(cache, kind).with_suffix(".json")
        known = read_record(path, CachedReference) if path.exists() else None
        digest = known.sha256 if known else self.facts["reference"]["files_sha256"]
        return {"path": str(self.reference), "images": known.count if known else None, "sha256": digest}

    def _cached_at(self, cache: Path, kind: str) -> Path:
        text = repr((self.facts["reference"], self.facts["features"][kind]))
        return cache / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"

    def _features_facts(self, kind: str) -> dict:
        if kind == "digits":
            return {
                "name": "support vector classifier on scikit-learn's digits",
                "version": metadata.version("scikit-learn"),
            }
        if kind == "dinov2":
            assert self.dinov2_weights is not None
            return {"name": f"class token, {self.dinov2_weights.name}", "sha256": sha256(self.dinov2_weights)}
        if self.foundation is not None:
            return {"name": f"foundation model {self.foundation.name}", "sha256": sha256(self.foundation)}
        own = SHA256 if self.inception_weights is None else sha256(self.inception_weights)
        return {"name": InceptionFeatures.name, "sha256": own}

    def open(self, *, device: torch.device | str = "cpu", cache: Path | None = None, compares: bool = True) -> "Judge":
        """Load the networks, and measure the reference where `cache` has not kept it; a self-test comes first.

        compares: whether this process compares with the reference, as one of several alone need; else it does neither.

        Raises ValueError for weights of other networks, and where the self-test fails.
        """
        if compares and self.kinds != ("digits",):
            self_test(str(device))
        extractors = {kind: self._extractor(kind, device) for kind in self.kinds if kind != "digits"}
        known, reference = {}, None
        if compares and self.reference is not None:
            reference = open_reference(self.reference, self.image_size)
            known = {kind: self._known(kind, reference, extractor, cache) for kind, extractor in extractors.items()}
            for figure in self.figures:
                if figure.features in known:
                    require_known(figure, known[figure.features])
        classifier = None
        if "digits" in self.kinds:
            digits = dataset.source()
            classifier = DigitClassifier(digits["train"], digits["heldout"])
        judge = Judge(self, extractors, known, classifier, reference)
        if self.image_size is not None:  # what does not fit is said before anything is sampled
            judge.require_comparable(TensorImages(torch.zeros(1, self.image_size, self.image_size, 3).byte()))
        return judge

    def _extractor(self, kind: str, device: torch.device | str) -> Network:
        if kind == "dinov2":
            assert self.dinov2_weights is not None
            return ClassTokenFeatures.from_file(self.dinov2_weights, device)
        if self.foundation is not None:
            return FoundationFeatures.from_file(self.foundation, device)
        return InceptionFeatures(self.inception_weights, device, sha256=self.inception_sha256, download=self.download)

    def _known(self, kind: str, reference: Reference, extractor: Extractor, cache: Path | None) -> KnownFeatures:
        images = reference.images
        needs_images = any(figure.needs == "images" and figure.features == kind for figure in self.figures)
        there = ("dinov2" if kind == "dinov2" else "features") in reference.moments
        if there and not (needs_images and images is not None):
            assert reference.sha256 is not None
            return KnownFeatures(reference.description, None, reference.sha256, reference.moments)
        if images is None:
            lacking = f"{reference.description} has neither statistics of those features nor images"
            raise ValueError(f"{self._users(kind)}: {lacking}")
        if self.image_size is not None and image_sides(images) != (self.image_size, self.image_size):
            size = f"{self.image_size}×{self.image_size}"
            raise ValueError(f"{reference.description} holds images of {image_size(images)}, the samples are {size}")
        path = None if cache is None else self._cached_at(cache, kind)
        kept = None if path is None else read_cached(path, reference.description)
        if kept is None:
            kept = known_features(measure(images, extractor, self.batch_size))
            if path is not None:
                write_cached(path, kept)
        return kept


class Judge:
    """Measures samples; made by `JudgeSource.open`."""

    def __init__(
        self,
        source: JudgeSource,
        extractors: dict[str, Network],
        known: dict[str, KnownFeatures],
        classifier: DigitClassifier | None,
        reference: Reference | None,
    ):
        self.source, self.known = source, known
        self._extractors, self._classifier, self._reference = extractors, classifier, reference
        self._compared = False

    def to(self, device: torch.device | str) -> None:
        """Move the networks."""
        for extractor in self._extractors.values():
            extractor.to(device)

    def require_comparable(self, samples: TensorImages) -> None:
        """Raise ValueError where the reference is of images of another size or of another network; looked at once."""
        if self._reference is not None and not self._compared:
            for extractor in self._extractors.values():
                require_comparable(samples, self._reference, extractor)
            self._compared = True

    def measure(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Figure → its value, of samples uint8 `[N, H, W, 3]` with labels int `[N]`; raises ValueError.

        No more samples than features are taken, too: then a Fréchet distance ranks samples of the same N alone.
        """
        return self.compare(self.describe(TensorImages(images), labels, self.source.batch_size, ALONE))

    def describe(
        self, samples: TensorImages, labels: Tensor, batch_size: int, processes: Processes
    ) -> "DescribedSamples":
        """What the figures compare of samples, of which each process has its `Share.of(len(samples), batch_size,
        processes)` and their labels; all of it is on the main process."""
        sides, wanted = tuple(samples.images.shape[1:3]), self.source.image_size
        if wanted is not None and sides != (wanted, wanted):
            raise ValueError(f"the samples are of {sides[1]}×{sides[0]}, to be judged as images of {wanted}×{wanted}")
        self.require_comparable(TensorImages(samples.images))
        made = {}
        for kind, extractor in self._extractors.items():
            made[kind] = measure_together(samples, extractor, batch_size, processes)
        right = None
        if self._classifier is not None:
            none = torch.empty(0, dtype=torch.float64)  # of a process without a share
            own = self._classifier.recognised(samples.images, labels) if len(labels) else none
            right = rows_on_main(processes, own)
        return DescribedSamples(made, right)

    def compare(self, samples: "DescribedSamples") -> dict[str, float]:
        """Figure → its value, on the main process; raises ValueError where it cannot be taken of these samples."""
        return {figure.name: self._value(figure, samples) for figure in self.source.figures}

    def _value(self, figure: Figure, samples: "DescribedSamples") -> float:
        if figure.compute is None:
            assert samples.recognised is not None
            return samples.recognised.mean().item()
        known = self.known.get(figure.features)
        return figure.compute(samples.features[figure.features], known)  # type: ignore[arg-type]


@dataclass(frozen=True)
class DescribedSamples:
    """What figures compare of samples, on the main process: features by their kind, and whether each sample is seen as
    its label, float64 `[N]`, where a figure asks."""

    features: Mapping[str, ImageFeatures | None]
    recognised: Tensor | None


def pixels_hash(images: Tensor) -> str:
    """SHA-256 of the hashes of uint8 images `[N, H, W, 3]` in order, as a result of evaluate has it."""
    hashes = [hashlib.sha256(image.contiguous().numpy().tobytes()).digest() for image in images]
    return hashlib.sha256(b"".join(hashes)).hexdigest()
