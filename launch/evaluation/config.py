"""The `evaluation` section of a LightningDiT file: figures of samples in the course of training."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from common.sections import Count, Float, PathText, Section, Text
from launch.training.config import distinct

#: Those of `launch.evaluation.figures`.
FigureName = Literal["fid", "sfid", "inception_score", "kid", "precision", "recall", "fdd", "recognised"]


def _names(value: Any) -> Any:
    """A single name as a list of it."""
    return distinct([value] if isinstance(value, str) else value)


def _hash(text: str) -> str:
    if len(text) != 64 or set(text.lower()) - set("0123456789abcdef"):
        raise ValueError(f"{text!r} is no SHA-256: 64 hexadecimal digits")
    return text.lower()


class EvaluationConfig(Section):
    """Figures of `samples` samples by the moving average (without one: the weights), every so many steps of training.

    `figures` names them, as `sweep --figure` does; none, the default: nothing is sampled. The samples have the same
    noise and labels every time, from the `sample` section (`seed`, `labels`, guidance, shift), and an ODE solver of
    `num_sampling_steps` points; `cfg_scale` takes the place of that section's. `every`: null: the steps between
    validations, else checkpoints; the last step always has them. `reference`: real images or their statistics; null:
    `data.fid_reference_file`. `inception_weights` is torch-fidelity's file (`inception_sha256` accepts another),
    `foundation` a foundation model in its place, `dinov2_weights` DINOv2's, for "fdd".
    """

    figures: Annotated[tuple[FigureName, ...], BeforeValidator(_names)] = ()
    every: Count | None = None
    samples: Annotated[int, Field(ge=2, le=50_000)] = 1000
    num_sampling_steps: Annotated[int, Field(ge=2, le=1000)] = 25
    cfg_scale: Annotated[Float, Field(ge=1)] | None = None
    reference: PathText | None = None
    inception_weights: PathText | None = None
    inception_sha256: Annotated[Text, AfterValidator(_hash)] | None = None
    foundation: PathText | None = None
    dinov2_weights: PathText | None = None

    def without_effect(self) -> list[str]:
        """Notes on keys that a file sets and that change nothing."""
        if self.figures:
            alone = self.inception_sha256 is not None and self.inception_weights is None
            return ["evaluation.inception_sha256 is given, but evaluation.inception_weights is null"] if alone else []
        given: Mapping[str, Any] = {key: getattr(self, key) for key in sorted(self.model_fields_set - {"figures"})}
        return [f"evaluation.{key} is {value}, but evaluation.figures names none" for key, value in given.items()]
