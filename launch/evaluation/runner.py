"""The figures of samples against a reference set, by one pass over the images of each."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from launch.evaluation.features import Extractor, facts_of, giver
from launch.evaluation.frechet import frechet_distance
from launch.evaluation.image_source import ImageSource
from launch.evaluation.inception_score import inception_score
from launch.evaluation.kid import SUBSET_SIZE, SUBSETS, kernel_distance
from launch.evaluation.labels import Labels
from launch.evaluation.moments import Moments
from launch.evaluation.notes import check_count, count_notes, image_notes, network_notes
from launch.evaluation.one_pass import MAX_KEPT, ImageFeatures, measure_together
from launch.evaluation.precision_recall import precision_recall
from launch.evaluation.reference import Reference, require_comparable
from launch.evaluation.result import REQUIRED_OF_SAMPLES, make_result, with_guidance
from launch.evaluation.self_test import check_extractor, self_test
from launch.evaluation.shares import ALONE
from launch.runtime.processes import Processes

NEAREST_K = 3  # of precision and recall
#: Figure → the features that it compares, each a Fréchet distance.
DISTANCES = {"fid": "features", "sfid": "spatial", "fdd": "dinov2"}
_MISSING = {
    "fid": "needs Inception's features, or a foundation model's in their place",
    "sfid": "needs Inception's spatial features of the samples and of the reference",
    "fdd": "needs DINOv2's features of the samples and of the reference (--dinov2-weights)",
}


def evaluate_samples(
    samples: ImageSource,
    reference: Reference,
    extractor: Extractor,
    *,
    metadata: Mapping[str, Any],
    batch_size: int = 64,
    allow_few: bool = False,
    labels: Labels | None = None,
    processes: Processes = ALONE,
) -> dict:
    """Fréchet distance `fid` of samples to the reference, and what else the extractor and the reference allow:
    `sfid`, `inception_score`, `precision`, `recall`, `kid` (and `kid_std`), `fdd`. A self-test comes first.

    Args:
        extractor: one, or several as a `TogetherFeatures`.
        metadata: what the samples were made by; of `REQUIRED_OF_SAMPLES` those that are missing are said to be.
        allow_few: measure even with no more samples than features, where the covariance is singular and the distance
            far too large.
        labels: of the samples, as `read_labels` finds them.
        processes: that measure together; its device is where distances are computed.

    Returns:
        On every process, a JSON-ready dict: `metrics`, `basis` (figure → of how many images, by what), `samples` (their
        number), `samples_sha256`, `reference`, `features`, `networks`, `self_test`, the metadata, `skipped` (figure →
        reason), `notes`.

    Raises:
        ValueError: images of another size than the reference's, too few samples, features of another width or network
            than the reference's, non-finite features, a self-test that fails.
    """
    tested = self_test(str(processes.device))
    require_comparable(samples, reference, extractor)
    check_extractor(extractor, next(iter(samples.batches(2))))
    got = measure_together(samples, extractor, batch_size, processes)
    real = None
    # Statistics beside images spare a pass over a large set; one small enough for precision and recall is used.
    if reference.images is not None and (not _has_all(reference, extractor) or len(reference.images) <= MAX_KEPT):
        real = measure_together(reference.images, extractor, batch_size, processes, keep=("features",))

    def result() -> dict:
        assert got is not None
        compared = _Comparison(got, real, reference, extractor, processes.device)
        notes = check_count(got, allow_few)
        if real is not None and reference.features is None:
            notes += check_count(real, allow_few, "reference images")
        compared.measure()
        notes += [*count_notes(got.count), *image_notes(got, real), *(labels.notes() if labels else [])]
        notes += [*compared.notes, *network_notes(extractor)]
        about: dict[str, Any] = {"path": reference.description, "images": None, "sha256": reference.sha256}
        if real is not None:
            about |= {"images": real.count, "sha256": reference.sha256 or real.sha256}
            about["files"] = real.seen | getattr(reference.images, "facts", {})
        facts = {
            "basis": compared.basis,
            "samples": got.count,
            "samples_sha256": got.sha256,
            "reference": about | {"statistics": reference.facts},
            "self_test": dict(tested),
        }
        if labels is not None:
            facts["labels"] = labels.facts
        return make_result(
            compared.metrics,
            compared.skipped,
            notes,
            facts,
            extractor,
            with_guidance(metadata),
            required=REQUIRED_OF_SAMPLES,
        )

    return processes.on_main(result)


def _has_all(reference: Reference, extractor: Extractor) -> bool:
    """Whether the statistics of a reference serve all distances that the extractor allows, but the optional ones."""
    wanted = {"dinov2"} if giver(extractor, "dinov2") else set()
    return {"features", *wanted} <= reference.moments.keys()


@dataclass
class _Comparison:
    """Samples beside a reference, and the figures of the two."""

    got: ImageFeatures
    real: ImageFeatures | None
    reference: Reference
    extractor: Extractor
    device: torch.device
    metrics: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    basis: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def measure(self) -> None:
        """Take all figures that can be taken; say why of the others."""
        for figure in ("fid", "sfid"):
            self._distance(figure)
        if self.got.logits is None:
            self.skipped["inception_score"] = "needs Inception's class scores"
        else:
            self._add("inception_score", inception_score(self.got.logits), "logits", None)
        self._of_single_images()
        self._distance("fdd")

    def _distance(self, figure: str) -> None:
        kind = DISTANCES[figure]
        made, stated = self.got.moments.get(kind), self.reference.moments.get(kind)
        own = self.real.moments.get(kind) if self.real is not None else None
        of: str | int
        if stated is not None:
            known, images = stated, self.reference.facts.get("images")
            of = f"statistics of {images:,}" if isinstance(images, int) else "statistics"
        elif own is not None:
            known, of = own.moments, own.count
        else:
            made = None
        if made is None:
            self.skipped[figure] = _MISSING[figure]
            return
        if stated is None and self.reference.moments:
            self.notes.append(f"{figure} is to the {of:,} images of the reference, which has no statistics of {kind}")
        names = self.got.description, self.reference.description
        self._add(figure, named_distance(made.moments, known, names), kind, of)

    def _of_single_images(self) -> None:
        """Precision, recall and KID."""
        real, fake = (found.kept if found is not None else None for found in (self.real, self.got))
        if real is None or fake is None:
            reason = f"need at most {MAX_KEPT:,} samples and as many reference images, not statistics alone"
            self.skipped |= {"precision, recall": reason, "kid": reason}
            return
        if min(len(real), len(fake)) <= NEAREST_K:
            self.skipped["precision, recall"] = f"need more than {NEAREST_K} samples and reference images"
        else:
            precision, recall = precision_recall(real, fake, NEAREST_K, device=self.device)
            self._add("precision", precision, "features", len(real), f"k = {NEAREST_K}")
            self._add("recall", recall, "features", len(real), f"k = {NEAREST_K}")
        size = min(SUBSET_SIZE, len(real), len(fake))
        kid = kernel_distance(fake, real, device=self.device)
        subsets = f"{SUBSETS if len({size, len(real), len(fake)}) > 1 else 1} subsets of {size:,}"
        self._add("kid", kid.mean, "features", len(real), subsets)
        self._add("kid_std", kid.std, "features", len(real), subsets)

    def _add(self, figure: str, value: float, kind: str, reference: Any, how: str | None = None) -> None:
        self.metrics[figure] = value
        by = giver(self.extractor, kind) or facts_of(self.extractor)[0]
        about = {"images": self.got.count, "reference": reference, "network": by["name"], "features": kind}
        self.basis[figure] = about | {"resize": by.get("resize", "")} | ({"how": how} if how else {})


def named_distance(made: Moments, real: Moments, names: tuple[str, str]) -> float:
    """The Fréchet distance of generated features to real ones; errors name where each of them is from."""
    try:
        return frechet_distance(*made, *real)
    except ValueError as e:
        raise ValueError(f"no distance of {names[0]} (mu1, sigma1) to {names[1]} (mu2, sigma2): {e}") from None
