"""What two or more curves say beside each other, as Markdown."""

import math
from collections.abc import Sequence

import numpy as np

from launch.comparison.curves import PUBLISHED_HOURS, PUBLISHED_SOURCE, Curve
from launch.text_tables import markdown, width
from launch.training.restore import config_changes

MAX_ROWS, WIDTH = 14, 130
#: Keys of the run file that differ from run to run, and change no number.
PLACES = {"train.exp_name", "train.output_dir"}


def common_window(curves: Sequence[Curve]) -> int:
    """Steps that each compared value is the mean of: the longest that one curve's values are means of.

    A published curve's only where every run is as long.
    """
    longest = max(curve.window for curve in curves)
    runs = [curve for curve in curves if not curve.interpolated]
    if longest <= min(int(curve.steps[-1]) for curve in runs):
        return longest
    return max(curve.window for curve in runs)


def common_steps(curves: Sequence[Curve], window: int) -> list[int]:
    """Steps to compare at: those of a published curve, else 1, 2, 5, 10, …; and the last that each run has reached."""
    ends = [int(curve.steps[-1]) for curve in curves if not curve.interpolated]
    known = [curve for curve in curves if curve.interpolated]
    grid = {base * 10**exponent for base in (1, 2, 5) for exponent in range(10)}
    steps = {int(s) for curve in known for s in curve.steps} if known else grid
    steps |= {end // window * window or end for end in ends}
    return sorted(s for s in steps if min(window, *ends) <= s <= max(ends))[-MAX_ROWS:]


def reference_of(curves: Sequence[Curve]) -> Curve:
    """The curve that the others are compared with: the published one, else the first."""
    return next((curve for curve in curves if curve.interpolated), curves[0])


def values_at(curve: Curve, steps: Sequence[int], window: int) -> np.ndarray:
    """float64 `[steps]`: means over the window, of a published curve only where it has a point."""
    at = np.array(steps, dtype=np.int64)
    if not curve.interpolated:
        return curve.means(at, window)
    points = dict(zip(curve.steps.tolist(), curve.values.tolist(), strict=True))
    return np.array([points.get(step, math.nan) for step in steps])


def of_other_steps(curve: Curve, window: int) -> bool:
    """Whether the points of a published curve are means of other spans than the window: nothing lies between them."""
    return curve.interpolated and curve.window != window


def losses(curves: Sequence[Curve], steps: Sequence[int], window: int) -> str:
    """Losses at common steps, each with its difference to the reference where both are means of as many steps."""
    reference = reference_of(curves)
    base = values_at(reference, steps, window)
    cells = []
    for curve in curves:
        values, alone = values_at(curve, steps, window), curve is reference or of_other_steps(reference, window)
        cells.append([_loss(v, None if alone else b) for v, b in zip(values, base, strict=True)])
    rows = [[f"{step:,}", *row] for step, *row in zip(steps, *cells, strict=True) if set(row) != {"–"}]
    return markdown(["step", *labels(curves).values()], rows, left=0)


def labels(curves: Sequence[Curve]) -> dict[str, str]:
    """Name → what columns of the tables call it: the name, or a letter where the names are too long side by side."""
    names = [curve.name for curve in curves]
    if sum(max(map(width, (name, "0.0000 (+0.0%)"))) + 3 for name in names) <= WIDTH:
        return {name: name for name in names}
    letters = iter("ABCDEFGH")
    return {c.name: c.name if c.interpolated else next(letters) for c in curves}


def _loss(value: float, base: float | None) -> str:
    if math.isnan(value):
        return "–"
    if base is None or math.isnan(base) or base == 0:
        return f"{value:.4f}"
    return f"{value:.4f} ({value / base - 1:+.1%})"


def speeds(curves: Sequence[Curve]) -> str:
    """Of each run: how far it is, its batch, images per second."""
    rows, called = [], labels(curves)
    for curve in curves:
        rate, gpus = curve.images_per_second, curve.gpus
        rows.append(
            [
                curve.name if called[curve.name] == curve.name else f"{called[curve.name]}: {curve.name}",
                f"{curve.steps[-1]:,}",
                "–" if curve.batch is None else f"{curve.batch:,}",
                duration(curve.hours[-1]),
                _number(rate, ",.0f" if rate >= 100 else ",.3g"),
                "–" if gpus is None else f"{gpus}",
                _number(rate / gpus if gpus else math.nan, ",.3g"),
            ]
        )
    head = ["run", "steps", "batch", "trained for", "images/s", "processes", "images/s each"]
    return markdown(head, rows)


def default_levels(curves: Sequence[Curve], steps: Sequence[int], window: int, count: int = 4) -> list[float]:
    """Losses to reach: the reference's at the last steps of the table, rounded up, so that it reaches them itself."""
    curve = reference_of(curves)
    values = values_at(curve, steps, window)
    if not np.isfinite(values).any():  # no run has come to the first published point
        values = values_at(next(each for each in curves if not each.interpolated), steps, window)
    levels = {math.ceil(v * 1e4) / 1e4 for v in values[np.isfinite(values)][-count:]}
    return sorted(levels, reverse=True)


def reaching(curves: Sequence[Curve], levels: Sequence[float], window: int) -> str:
    """Hours, and steps, that each run took to a loss."""
    rows = []
    for level in levels:
        cells = []
        for curve in curves:
            step, hours = curve.reached(level, window)
            cells.append("–" if math.isnan(step) else f"{duration(hours)} (step {step:,.0f})")
        rows.append([f"{level:.4g}", *cells])
    return markdown(["loss at most", *labels(curves).values()], rows, left=0)


def duration(hours: float) -> str:
    """Hours, or minutes or seconds where they are less than one."""
    for factor, unit in ((1, "h"), (60, "min"), (3600, "s")):
        if hours * factor >= 1 or unit == "s":
            return "–" if math.isnan(hours) else f"{hours * factor:.3g} {unit}"
    raise AssertionError("the last unit takes every number")


def _number(value: float, text: str) -> str:
    return "–" if math.isnan(value) else format(value, text)


def differing_keys(curves: Sequence[Curve]) -> list[str]:
    """Lines on the keys in which the runs' files differ from the first run's."""
    runs = [curve for curve in curves if not curve.interpolated]
    first, lines = runs[0], []
    for other in runs[1:]:
        if first.config is None or other.config is None:
            lacking = first if first.config is None else other
            lines.append(f"* {other.name}: not known, {lacking.name} has no whole checkpoint")
            continue
        changes = config_changes(first.config, other.config)
        changes = [change for change in changes if change.partition(":")[0] not in PLACES]
        lines += [f"* {other.name}: {change}" for change in changes] or [f"* {other.name}: none"]
    return lines


def report(curves: Sequence[Curve], loss: str, levels: Sequence[float], picture: str | None) -> str:
    """All of it as a page of Markdown. picture: name of the file beside it."""
    window = common_window(curves)
    steps, reference = common_steps(curves, window), reference_of(curves)
    levels = levels or default_levels(curves, steps, window)
    runs = [curve for curve in curves if not curve.interpolated]
    parts = [f"# Runs compared by `{loss}`\n"]
    parts += [f"![{loss} over steps and over hours]({picture})\n"] if picture else []
    against = f"; in brackets the difference to {reference.name}" if len(curves) > 1 else ""
    if of_other_steps(reference, window):
        against = (
            f", of {reference.name} of {reference.window:,}, so that no difference is told: that needs runs of at "
            f"least {reference.window:,} steps that log as often or more (train.log_every)"
        )
    parts += [f"Each value is the mean of the {window:,} steps up to its step{against}.\n"]
    parts += [losses(curves, steps, window), "", speeds(curves), "", reaching(curves, levels, window), ""]
    parts += [f"* {curve.name}: {remark}" for curve in curves for remark in curve.remarks]
    if len({curve.batch for curve in curves if curve.batch is not None}) > 1:
        parts.append("* The batches differ: the same step is another number of images.")
    if reference.interpolated:
        parts += [f"* published: {PUBLISHED_SOURCE}.", f"* Its hours: {PUBLISHED_HOURS}."]
    parts.append("* Hours are of training: as the rows count them, else the seconds of their steps, without saves.")
    if len(runs) > 1:
        parts += [f"\nKeys of the run file that differ from those of {runs[0].name}:\n", *differing_keys(curves)]
    return "\n".join(parts) + "\n"
