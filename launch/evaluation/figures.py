"""Figures of samples by name: which way is better, whose features they compare, and how they are computed.

    FIGURES["fid"].lower_is_better, FIGURES["fid"].features      # True, "inception"
    FIGURES["fid"].compute(made, known)                          # of two sets of features

The same names serve a sweep over settings and whatever else ranks samples. A figure of a few thousand samples ranks
settings; it is no figure to publish: the Fréchet distances shrink as N grows (arXiv 1911.07023), KID does not.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor

from common.text import nearest
from launch.evaluation.inception_score import inception_score
from launch.evaluation.kid import kernel_distance
from launch.evaluation.known_features import KnownFeatures
from launch.evaluation.one_pass import ImageFeatures
from launch.evaluation.precision_recall import precision_recall
from launch.evaluation.runner import DISTANCES, NEAREST_K, named_distance

#: Who gives the features: Inception, or a foundation model in its place; DINOv2; a classifier of digits.
Features = Literal["inception", "dinov2", "digits"]


@dataclass(frozen=True)
class Figure:
    """A figure and how it ranks. needs: what of the reference: nothing, its statistics, or its images' features."""

    name: str
    lower_is_better: bool
    features: Features
    needs: Literal["nothing", "statistics", "images"]
    meaning: str
    compute: Callable[[ImageFeatures, KnownFeatures], float] | None  # None: `judge` computes it from images and labels

    @property
    def direction(self) -> str:
        return "lower is better" if self.lower_is_better else "higher is better"


def choose_figures(names: Iterable[str]) -> tuple[Figure, ...]:
    """The figures of these names, each once; raises ValueError for none, one that is unknown or one given twice."""
    found: dict[str, Figure] = {}
    for name in names:
        if name not in FIGURES:
            raise ValueError(f"no figure {name!r}{nearest(name, FIGURES)}; known: {', '.join(FIGURES)}")
        if name in found:
            raise ValueError(f"figure {name!r} is given twice")
        found[name] = FIGURES[name]
    if not found:
        raise ValueError(f"no figure is named; known: {', '.join(FIGURES)}")
    return tuple(found.values())


def require_known(figure: Figure, known: KnownFeatures) -> None:
    """Raise ValueError where a reference has not what a figure compares samples with."""
    if figure.needs == "images":
        _kept(known.description, known.kept, figure.name)
    if figure.needs == "statistics" and (kind := DISTANCES[figure.name]) not in known.moments:
        raise ValueError(f"{figure.name}: {known.description} has no {kind} features")


def _distance(made: ImageFeatures, known: KnownFeatures, *, figure: str, kind: str) -> float:
    """The Fréchet distance in features of a kind."""
    if kind not in known.moments or kind not in made.moments:
        who = known.description if kind in made.moments else "the network to compare by"
        raise ValueError(f"{figure}: {who} has no {kind} features")
    return named_distance(made.moments[kind].moments, known.moments[kind], (made.description, known.description))


def _inception_score(made: ImageFeatures, known: KnownFeatures) -> float:
    if made.logits is None:
        raise ValueError("inception_score: the network to compare by gives no class scores; Inception does")
    return inception_score(made.logits)


def _precision(made: ImageFeatures, known: KnownFeatures) -> float:
    return precision_recall(*_both_kept(made, known, "precision"), NEAREST_K)[0]


def _recall(made: ImageFeatures, known: KnownFeatures) -> float:
    return precision_recall(*_both_kept(made, known, "recall"), NEAREST_K)[1]


def _kid(made: ImageFeatures, known: KnownFeatures) -> float:
    real, fake = _both_kept(made, known, "kid")
    return kernel_distance(fake, real).mean


def _both_kept(made: ImageFeatures, known: KnownFeatures, figure: str) -> tuple[Tensor, Tensor]:
    """Features of the reference and of the samples, both float32 `[N, D]`."""
    return _kept(known.description, known.kept, figure), _kept(made.description, made.kept, figure)


def _kept(name: str, kept: Tensor | None, figure: str) -> Tensor:
    if kept is None:
        raise ValueError(f"{figure} needs the features of single images, and {name} gives statistics alone")
    if len(kept) <= NEAREST_K:
        raise ValueError(f"{figure} needs more than {NEAREST_K} images, and {name} holds {len(kept)}")
    return kept


def _of(figure: str, kind: str) -> Callable[[ImageFeatures, KnownFeatures], float]:
    return partial(_distance, figure=figure, kind=kind)


_ALL = (
    Figure("fid", True, "inception", "statistics", "Fréchet distance in Inception's features", _of("fid", "features")),
    Figure("sfid", True, "inception", "statistics", "the same in spatial features", _of("sfid", "spatial")),
    Figure("inception_score", False, "inception", "nothing", "Inception score", _inception_score),
    Figure("kid", True, "inception", "images", "kernel distance in Inception's features", _kid),
    Figure("precision", False, "inception", "images", "share of samples among real images", _precision),
    Figure("recall", False, "inception", "images", "share of real images among samples", _recall),
    Figure("fdd", True, "dinov2", "statistics", "Fréchet distance in DINOv2's class token", _of("fdd", "dinov2")),
    Figure("recognised", False, "digits", "nothing", "share of digits that a classifier recognises", None),
)
FIGURES = {figure.name: figure for figure in _ALL}
