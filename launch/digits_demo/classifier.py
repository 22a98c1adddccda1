"""Evaluation of generated and reconstructed digits by a classifier that took no part in making them, and its limits.

All comparisons of strokes happen at the digits' own 8×8, where real images have gone through the same up- and
down-sampling as everything else.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from launch.digits_demo.dataset import CLASSES, HELD_OUT_PER_CLASS, Digits, downsample
from launch.evaluation.frechet import frechet_distance
from launch.evaluation.moments import FeatureStatistics
from launch.evaluation.pixel_figures import psnr

Features = Callable[[Tensor], Tensor]  # uint8 [N, 32, 32, 3] → floating [N, D]
MIN_ACCURACY = 0.97  # of the classifier on held-out digits: below that its verdicts say nothing


@dataclass(frozen=True)
class Limit:
    """One requirement: `value >= least` or `value <= most`."""

    key: str
    meaning: str
    least: float | None = None
    most: float | None = None

    def holds(self, value: float) -> bool:
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)

    def __str__(self) -> str:
        return f"at least {self.least:g}" if self.least is not None else f"at most {self.most:g}"


LIMITS = (
    Limit("reconstruction_psnr", "held-out reconstructions, PSNR in dB", least=32),
    Limit("reconstruction_recognised", "held-out reconstructions an SVC recognises", least=0.96),
    Limit("recognised", "guided samples an SVC recognises as the class asked for", least=0.90),
    Limit("recognised_worst_class", "the same, worst class", least=0.75),
    Limit("frechet_ratio", "Fréchet distance to held-out digits, relative to that of training digits", most=2.0),
    Limit("nearest_ratio", "distance to the nearest training digit, relative to that of held-out digits", least=0.85),
)
_ONE_STEP = {
    "recognised": Limit("recognised", "one-step samples an SVC recognises as the class asked for", least=0.85),
    "frechet_ratio": Limit("frechet_ratio", LIMITS[4].meaning, most=3.0),
}
#: Of samples made in one step, by a model that goes on from the one of those above.
ONE_STEP_LIMITS = tuple(_ONE_STEP.get(limit.key, limit) for limit in LIMITS)


class DigitClassifier:
    """A support vector classifier on real training digits, and the distances from real digits to one another.

    Raises RuntimeError when the classifier itself fails on held-out digits.
    """

    def __init__(self, train: Digits, heldout: Digits):
        from sklearn.svm import SVC

        self._train = _flat(train.images)
        # Radial basis functions of counts 0..16; C and gamma by five-fold cross-validation on the training digits.
        self._svc = SVC(kernel="rbf", C=10.0, gamma=0.001).fit(self._train.numpy(), train.labels.numpy())
        self.accuracy = self.recognised(heldout.images, heldout.labels).mean().item()
        if self.accuracy < MIN_ACCURACY:
            found = f"{self.accuracy:.1%} of held-out digits, not {MIN_ACCURACY:.0%}"
            raise RuntimeError(f"the classifier recognises {found}")
        self._usual_distance = self._nearest(heldout.images).median().item()

    def recognised(self, images: Tensor, labels: Tensor) -> Tensor:
        """Whether each of `images [N, 32, 32, 3]` is seen as its label; `[N]` float64 of 0 and 1."""
        seen = torch.from_numpy(self._svc.predict(_flat(images).numpy()))
        return (seen == labels.cpu()).double()

    def nearest_ratio(self, images: Tensor) -> float:
        """Median distance to the nearest training digit over that of held-out digits; mere copies would give 0."""
        return self._nearest(images).median().item() / self._usual_distance

    def _nearest(self, images: Tensor) -> Tensor:
        return torch.cdist(_flat(images), self._train).min(1).values


def _flat(images: Tensor) -> Tensor:
    return downsample(images).flatten(1)


def samples_report(
    classifier: DigitClassifier, samples: Tensor, labels: Tensor, train: Digits, heldout: Digits, features: Features
) -> dict:
    """Evaluates `samples [N, 32, 32, 3]` uint8 generated for `labels [N]`, all ten classes present.

    The Fréchet distance from samples to held-out digits, in the given features, is put in relation to that of as many
    training digits, 50 of each class (the mean over eight such draws, which differ by a fifth): a perfect generator
    that gave as many of each class would come out near 1.
    """
    right = classifier.recognised(samples, labels)
    missing = sorted(set(range(CLASSES)) - set(labels.tolist()))
    if missing:
        raise ValueError(f"samples of every class are needed; none of class {missing}")
    per_class = [right[labels.cpu() == c].mean().item() for c in range(CLASSES)]

    def distance(made: Tensor) -> float:
        return frechet_distance(*FeatureStatistics().update(made).moments, *target)

    target = FeatureStatistics().update(_features(features, heldout.images)).moments
    known = _features(features, train.images)
    real = sum(distance(known[train.balanced(HELD_OUT_PER_CLASS, seed)]) for seed in range(8)) / 8
    generated = distance(_features(features, samples))
    return {
        "samples": len(samples),
        "judge_accuracy": classifier.accuracy,
        "recognised": right.mean().item(),
        "recognised_per_class": per_class,
        "recognised_worst_class": min(per_class),
        "nearest_ratio": classifier.nearest_ratio(samples),
        "frechet_distance": generated,
        "frechet_distance_of_training_digits": real,
        "frechet_ratio": generated / real,
    }


def reconstruction_report(classifier: DigitClassifier, originals: Digits, reconstructions: Tensor) -> dict:
    """Evaluates uint8 `reconstructions` of `originals`: mean PSNR in dB, share still recognised."""
    return {
        "reconstruction_psnr": psnr(originals.images, reconstructions.cpu()).mean().item(),
        "reconstruction_recognised": classifier.recognised(reconstructions, originals.labels).mean().item(),
    }


def failures(report: dict, limits: Sequence[Limit] = LIMITS) -> list[str]:
    """Those of `limits` that `report` misses, one sentence each; a missing figure is a miss."""
    missed = []
    for limit in limits:
        value = report.get(limit.key)
        if value is None or not limit.holds(value):
            missed.append(f"{limit.meaning}: {'not measured' if value is None else f'{value:.3f}'}, must be {limit}")
    return missed


def _features(features: Features, images: Tensor) -> Tensor:
    return torch.cat([features(batch).double().cpu() for batch in images.split(250)])
