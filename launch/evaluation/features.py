"""Feature extractors of images, each a function from uint8 images `[B, H, W, 3]` to named features.

    features [B, D]      FID, KID, precision, recall: Inception's, or a foundation model's in its place
    spatial [B, D']      sFID, and
    logits [B, classes]  the inception score: of Inception alone
    dinov2 [B, D'']      FDD

An extractor may have a `name`, and `facts` for the result: its weights and their hash, its features, how it resizes.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.files import FileError, read_json, sha256
from common.records import Record, read_record, require_kind
from common.sections import SmallCount
from launch.evaluation.inception import InceptionFeatures
from vavae.config import FoundationConfig
from vavae.foundation import FoundationModel
from vavae.images import to_float_batch

__all__ = [
    "Extractor",
    "FoundationFeatures",
    "FoundationRecord",
    "InceptionFeatures",
    "TogetherFeatures",
    "facts_of",
    "giver",
]

Extractor = Callable[[Tensor], Mapping[str, Tensor]]


class TogetherFeatures:
    """Several extractors as one, so that each image is decoded once for all of them."""

    def __init__(self, *extractors: Extractor):
        self._extractors = extractors
        self.name = ", ".join(facts["name"] for facts in facts_of(self))

    @property
    def parts(self) -> tuple[Extractor, ...]:
        """The extractors."""
        return self._extractors

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for extractor in self._extractors:
            own = extractor(images)
            if both := found.keys() & own.keys():
                raise ValueError(f"two networks give {', '.join(sorted(both))}")
            found |= own
        return found


def facts_of(extractor: Extractor) -> list[dict[str, Any]]:
    """For the result, of each network: `name`, and what else it says of itself: `gives` (features → what they are),
    `resize`, `weights` and their `sha256`, `published`: whether that is the hash of the published file."""
    if isinstance(extractor, TogetherFeatures):
        return [facts for part in extractor.parts for facts in facts_of(part)]
    name = getattr(extractor, "name", None) or getattr(extractor, "__name__", type(extractor).__name__)
    return [{"name": name} | getattr(extractor, "facts", {})]


def giver(extractor: Extractor, kind: str) -> dict[str, Any] | None:
    """The facts of the network that gives features of a kind; None where none says so."""
    return next((facts for facts in facts_of(extractor) if kind in facts.get("gives", {})), None)


class FoundationRecord(Record):
    """The JSON file beside the weights of a foundation model: its section of a run file, and its tokens a side."""

    config: FoundationConfig
    grid: SmallCount


def read_description(path: Path) -> FoundationRecord:
    """The description of a foundation model; raises FileError where there is none, or one of other weights."""
    content = read_json(path)
    if isinstance(content, dict) and content.get("kind", "foundation") != "foundation":
        require_kind(path, "foundation")
    return read_record(path, FoundationRecord)


class FoundationFeatures:
    """Means over the tokens of a frozen vision transformer, `features [B, width]` float32."""

    def __init__(self, model: FoundationModel, name: str = "foundation model", facts: Mapping[str, Any] | None = None):
        self.name = name
        self._model = model
        self.facts = {
            **(facts or {}),
            "gives": {"features": f"means over the tokens, {model.width}"},
            "resize": f"{model.input_size} × {model.input_size}, {model.resize['mode']}",
        }

    @classmethod
    def from_file(cls, path: str | Path, device: torch.device | str = "cpu") -> "FoundationFeatures":
        """From a weights file with a `FoundationRecord` beside it, a `.json` of the same name; raises ValueError."""
        beside = Path(path).with_suffix(".json")
        try:
            facts = read_description(beside)
        except FileError as e:
            raise ValueError(f"{path} needs {beside.name} beside it, with its config and grid: {e}") from None
        model = FoundationModel.from_config(facts.config.model_copy(update={"weights": str(path)}), facts.grid)
        named = {"weights": str(path), "sha256": sha256(path)}
        return cls(model.to(device), f"foundation model {Path(path).name}", named)

    def to(self, device: torch.device | str) -> None:
        """Move the network."""
        self._model.to(device)

    @torch.no_grad()
    def pooled(self, images: Tensor) -> Tensor:
        """uint8 `[B, H, W, 3]` → `[B, width]` float32."""
        return self._model(to_float_batch(images).to(self._model.shift.device)).mean((2, 3)).float()

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        return {"features": self.pooled(images)}
