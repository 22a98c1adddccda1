"""Loss curves of runs, and the published one: values over steps and over hours."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launch.config_files import ConfigError
from launch.run_directory.checkpoints import list_checkpoints, stored_state
from launch.run_directory.find import CHECKPOINTS
from launch.run_directory.rows import NAME, RunRows, number, read_rows

#: The loss that is compared unless another is asked for.
LOSSES = {"lightningdit": "mse", "vavae": "rec"}

PUBLISHED_SOURCE = (
    "training log of the published LightningDiT (hustvl/LightningDiT, docs/log.txt): XL/1, global batch 1024, VA-VAE "
    "f16d32 latents; the mean squared error alone, each value a mean over 100 steps"
)
PUBLISHED_HOURS = "80,000 steps in 10 hours on 8 H800, as arXiv 2501.01423 claims: a claim, not a measurement of ours"
PUBLISHED_MSE = {
    100: 1.2133,
    500: 0.4186,
    1_000: 0.3854,
    2_000: 0.3604,
    5_000: 0.3379,
    10_000: 0.3270,
    20_000: 0.3175,
    40_000: 0.3109,
    80_000: 0.3045,
}
_PUBLISHED_STEPS_PER_HOUR = 80_000 / 10
_PUBLISHED_BATCH, _PUBLISHED_GPUS = 1024, 8


@dataclass(frozen=True)
class Curve:
    """A loss over steps, and what is told beside it.

    Fields:
        steps, values, hours: int64, float64, float64 `[points]`; steps ascend, NaN where unknown or not finite.
        window: steps that a value is the mean of.
        interpolated: whether there are values between the points: a few of a published curve, not all rows of a run.
        config: the run file, from the newest checkpoint that is whole.
        remarks: what else its rows and checkpoints tell.
    """

    name: str
    steps: NDArray[np.int64]
    values: NDArray[np.float64]
    hours: NDArray[np.float64]
    window: int
    batch: int | None = None
    images_per_second: float = math.nan
    gpus: int | None = None
    interpolated: bool = False
    config: dict[str, Any] | None = None
    remarks: tuple[str, ...] = ()

    def means(self, at: NDArray[np.int64], window: int) -> NDArray[np.float64]:
        """Mean of the values whose step is among the `window` steps up to each of `at`.

        NaN where none is finite, after the last step, and where rows tell of fewer than `window` steps; what a row is
        late by, as rows do not come at every step, may be lacking.
        """
        spans = np.minimum(np.diff(self.steps, prepend=0), window)
        weights = np.where(np.isfinite(self.values), spans, 0).astype(np.float64)
        sums = np.concatenate([[0.0], np.cumsum(np.where(weights > 0, self.values, 0.0) * weights)])
        counts, told = (np.concatenate([[0.0], np.cumsum(each)]) for each in (weights, spans))
        first = np.searchsorted(self.steps, at - window, side="right")
        last = np.searchsorted(self.steps, at, side="right")
        total, count = sums[last] - sums[first], counts[last] - counts[first]
        whole = (at <= self.steps[-1]) & (told[last] - told[first] > window - self.window)
        return np.divide(total, count, out=np.full(len(at), np.nan), where=whole & (count > 0))

    def reached(self, level: float, window: int) -> tuple[float, float]:
        """(step, hours) at which the mean over `window` steps is first at most `level`; NaN where it never is."""
        values = self.values if self.interpolated else self.means(self.steps, window)
        below = np.flatnonzero(values <= level)
        if not len(below):
            return math.nan, math.nan
        i = int(below[0])
        step, hours = float(self.steps[i]), float(self.hours[i])
        if self.interpolated and i:
            share = (values[i - 1] - level) / (values[i - 1] - values[i])  # between two points on a logarithmic axis
            between = self.steps[i - 1] * (self.steps[i] / self.steps[i - 1]) ** share
            step, hours = float(between), hours * float(between / self.steps[i])
        return step, hours


def published() -> Curve:
    """The published curve, with the hours that are claimed for it."""
    steps = np.array(list(PUBLISHED_MSE), dtype=np.int64)
    rate = _PUBLISHED_STEPS_PER_HOUR
    return Curve(
        "published",
        steps,
        np.array(list(PUBLISHED_MSE.values())),
        steps / rate,
        100,
        _PUBLISHED_BATCH,
        _PUBLISHED_BATCH * rate / 3600,
        _PUBLISHED_GPUS,
        interpolated=True,
    )


@dataclass(frozen=True)
class LoggedRun:
    """A run's directory as it was read. kind: None where neither a checkpoint nor its rows tell."""

    path: Path
    rows: RunRows
    kind: str | None
    state: dict[str, Any] | None

    def curve(self, name: str, loss: str) -> Curve:
        """The curve of one value of the rows, of training, validation or samples; raises ConfigError where they have no
        number of that name."""
        rows, found = self.rows, self.rows.of(loss)
        values = np.array([number(row.get(loss)) for row in found])
        if not np.isfinite(values).any():
            if any(loss in row for row in found):
                raise ConfigError(f"{self.path / NAME} has no finite {loss!r} in its {len(found):,} rows")
            every = (*rows.training, *rows.validation, *rows.samples)
            known = sorted({k for row in every for k, v in row.items() if not math.isnan(number(v))})
            raise ConfigError(f"{self.path / NAME} has no {loss!r}; its rows have {', '.join(known) or 'no numbers'}")
        steps, rates = np.array([row["step"] for row in found], dtype=np.int64), rows.series("images_per_second")
        batch = number(rows.training[-1].get("global_batch_size"))
        state = self.state or {}
        gpus = state.get("world_size")
        return Curve(
            name,
            steps,
            values,
            rows.hours_at(steps),
            int(np.median(np.diff(steps, prepend=0))),
            None if math.isnan(batch) else int(batch),
            float(np.nanmedian(rates)) if np.isfinite(rates).any() else math.nan,
            gpus if isinstance(gpus, int) else None,
            config=state.get("config"),
            remarks=tuple(self._remarks()),
        )

    def _remarks(self) -> list[str]:
        skipped = number(self.rows.training[-1].get("skipped"))
        happened = [event["event"] for event in self.rows.events]
        found = [f"resumed: {_times(n)}"] if (n := happened.count("resumed")) else []
        found += [f"rolled back: {_times(n)}"] if (n := happened.count("rollback")) else []
        found += [f"{skipped:,.0f} steps skipped"] if skipped > 0 else []
        found += [f"{n} lines of {NAME} could not be read"] if (n := self.rows.unreadable) else []
        return found


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count:,} times"


def read_run(path: Path) -> LoggedRun:
    """Read a run's directory; raises ConfigError where there is no such run, or it has logged nothing."""
    if not path.is_dir():
        what = "is no directory, which a run is" if path.exists() else "does not exist"
        raise ConfigError(f"{path} {what}")
    rows = read_rows(path / NAME)
    if not rows.training:
        raise ConfigError(f"{path} is no run, or has logged nothing yet: {NAME} there has no row of training")
    state = stored_state(list_checkpoints(path / CHECKPOINTS))
    return LoggedRun(path, rows, state["kind"] if state else _kind_by(rows), state)


def _kind_by(rows: RunRows) -> str | None:
    last = rows.training[-1]
    return next((kind for kind, loss in LOSSES.items() if loss in last), None)


def read_curves(paths: Sequence[Path], loss: str | None = None) -> tuple[list[Curve], str, str | None]:
    """The curves of runs of one kind → them, the name of the loss, the kind; raises ConfigError, naming the run."""
    for i, path in enumerate(paths):
        if path.resolve() in {other.resolve() for other in paths[:i]}:
            raise ConfigError(f"{path} is given twice")
    runs = [read_run(path) for path in paths]
    kinds = {run.kind: run.path for run in runs if run.kind is not None}
    if len(kinds) > 1:
        raise ConfigError(f"runs of different kinds: {', '.join(f'{path} is {kind}' for kind, path in kinds.items())}")
    kind = next(iter(kinds), None)
    loss = loss or LOSSES.get(kind or "", "loss")
    return [run.curve(name, loss) for run, name in zip(runs, short_names(paths), strict=True)], loss, kind


def short_names(paths: Sequence[Path]) -> list[str]:
    """The ends of paths, as short as they can be and yet differ."""
    parts = [path.resolve().parts for path in paths]
    length = 1
    while len({p[-length:] for p in parts}) < len(parts) and length < max(map(len, parts)):
        length += 1
    return ["/".join(p[-length:]).replace("//", "/") for p in parts]
