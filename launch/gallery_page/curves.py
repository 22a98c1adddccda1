"""Curves of the logs of runs as JSON for the page: thinned, with a running median, in a few charts."""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launch.run_directory.rows import POSITION, SAMPLES, Row, RunRows, number

BUCKETS = 500  # of a curve; of each its least and its greatest value are kept
FEW_BUCKETS = 100  # of values of which there are many, such as those of single blocks
MEDIAN_POINTS = 300
FAR = 50  # times the median
FEWEST_FOR_A_MEDIAN = 40  # rows; with fewer the values themselves are read as easily
REMARK = (
    f"Curves of more than {2 * BUCKETS:,} rows are thinned to the least and the greatest value in each of {BUCKETS} "
    f"parts of equally many rows (of single blocks and times in {FEW_BUCKETS}). The bold line is a running median over "
    "steps within 10 %, drawn for orientation; values under the pointer are those of the log."
)
#: Values of rows that say how fast a run was.
SPEED = ("images_per_second", "seconds_per_step", "mfu", "data_wait", "memory_gb", "ahead_hours")
_UNITS = {
    "images_per_second": "images/s",
    "seconds_per_step": "s",
    "mfu": "share",
    "data_wait": "share",
    "memory_gb": "10⁹ bytes",
    "ahead_hours": "h",
}
_NOT_DRAWN = {*POSITION, "hours", "wall_hours", "eta_seconds"}
_DETAIL = re.compile(r"watch/|.*/?loss_t\d|.*/blocks?[./]")
_OTHER = re.compile(r"(.*/)?(lr|grad_norm|skipped|loss_spikes|.*_weight|.*_std(_min)?|dead_channels)$")
_VALIDATION = re.compile(r"(valid(?:_ema)?)[/_](.+)")
_PREFERRED = ("mse", "rec", "loss")  # the loss that is shown first


def thin(values: NDArray[np.float64], buckets: int) -> NDArray[np.int64]:
    """Places of the least and the greatest finite value in each of `buckets` parts of equally many values, of the first
    of a part where none is finite, and of the first and the last value; all places where they are not more.

    Args:
        values: float64 `[N]`.
    """
    if len(values) <= 2 * buckets:
        return np.arange(len(values))
    kept = {0, len(values) - 1}
    for places in np.array_split(np.arange(len(values)), buckets):
        finite = places[np.isfinite(values[places])]
        if len(finite):
            kept |= {int(finite[values[finite].argmin()]), int(finite[values[finite].argmax()])}
        else:
            kept.add(int(places[0]))
    return np.array(sorted(kept))


def curves(runs: Mapping[str, RunRows]) -> dict[str, Any]:
    """All that the page's charts are drawn from, ready for JSON; `series` is by the name of the value."""
    series: dict[str, list[dict[str, Any]]] = {}
    factor, unit = _time_unit(runs)
    for place, rows in enumerate(runs.values()):
        steps, hours = rows.steps(), rows.hours() * factor
        for key in _keys(rows.training):
            found = _series(key, steps, hours, rows.series(key))
            series.setdefault(key, []).append({"run": place, "variant": "", **found})
        for key in _keys(rows.validation):
            if (parts := _VALIDATION.fullmatch(key)) is not None:
                found = _of_rows(rows.validation, key, rows, factor)
                series.setdefault(parts[2], []).append({"run": place, "variant": parts[1], **found})
        for key in _keys(rows.samples):
            if key.startswith(SAMPLES):
                found = _of_rows(rows.samples, key, rows, factor)
                series.setdefault(key, []).append({"run": place, "variant": "", **found})
    events = [
        {"run": place, "step": event["step"], "event": str(event["event"])}
        for place, rows in enumerate(runs.values())
        for event in rows.events
        if event["event"] not in ("saved", "evaluation")
    ]
    return {"runs": list(runs), "time_unit": unit, "charts": _charts(series), "series": series, "events": events}


def _keys(rows: list[dict[str, Any]]) -> list[str]:
    """Names of finite numbers in the rows, in the order in which they come."""
    found = {key: None for row in rows for key, value in row.items() if not math.isnan(number(value))}
    return [key for key in found if key not in _NOT_DRAWN]


def _series(key: str, steps, hours, values) -> dict[str, Any]:
    known = np.isfinite(values)
    first = int(np.argmax(known))  # a value that only later rows have begins there
    steps, hours, values = steps[first:], hours[first:], values[first:]
    detail = _DETAIL.match(key) is not None
    kept = thin(values, FEW_BUCKETS if detail else BUCKETS)
    found = {"x": _whole(steps[kept]), "h": _short(hours[kept]), "y": _short(values[kept])}
    if detail or np.isfinite(values).sum() < FEWEST_FOR_A_MEDIAN:
        return found
    places = np.unique(np.linspace(0, len(steps) - 1, MEDIAN_POINTS).round().astype(int))
    median = _medians(steps, values, places)
    return found | {"mx": _whole(steps[places]), "mh": _short(hours[places]), "my": _short(median)}


def _medians(steps, values, places, factor: float = 1.1) -> NDArray[np.float64]:
    """Of each of some places the median of the finite values whose step is within `factor`."""
    first = np.searchsorted(steps, steps[places] / factor, side="left")
    last = np.searchsorted(steps, steps[places] * factor, side="right")
    near = (values[a:b][np.isfinite(values[a:b])] for a, b in zip(first, last, strict=True))
    return np.array([np.median(found) if len(found) else math.nan for found in near])


def _of_rows(rows: list[Row], key: str, run: RunRows, factor: float) -> dict[str, Any]:
    """A value of rows of a run that are not of training; factor: of the page's unit of time, how many an hour has."""
    at = np.array([row["step"] for row in rows], dtype=np.int64)
    values = np.array([number(row.get(key)) for row in rows])
    kept = thin(values, BUCKETS)
    return {"x": _whole(at[kept]), "h": _short(run.hours_at(at)[kept] * factor), "y": _short(values[kept])}


def _whole(values) -> list[int]:
    return [int(value) for value in values]


def _short(values) -> list[float | None]:
    """Numbers of six digits, for a smaller page; None for what is not finite."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values]


def _time_unit(runs: Mapping[str, RunRows]) -> tuple[float, str]:
    """How many of the unit an hour has, and the unit that the longest run takes at least one of."""
    ends = [hours[-1] for rows in runs.values() if len(hours := rows.hours()) and math.isfinite(hours[-1])]
    longest = max(ends, default=1.0)
    return (1.0, "hours") if longest >= 1 else (60.0, "minutes") if longest * 60 >= 1 else (3600.0, "seconds")


def _charts(series: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The charts that have something to show: which values each of them offers, and which it shows first."""
    speed = [key for key in SPEED if key in series]
    details = [key for key in series if key not in SPEED and _DETAIL.match(key)]
    other = [key for key in series if key not in SPEED and key not in details and _OTHER.match(key)]
    seconds = SAMPLES + "seconds"
    figures = [key for key in series if key.startswith(SAMPLES) and key != seconds]
    other += [seconds] if seconds in series else []
    losses = [key for key in series if key not in {*speed, *details, *other, *figures}]
    losses.sort(key=lambda key: _PREFERRED.index(key) if key in _PREFERRED else len(_PREFERRED))
    found = [
        {"name": "loss", "title": "Losses", "keys": losses, "details": []},
        {"name": "samples", "title": "Figures of samples", "keys": figures, "details": []},
        {"name": "speed", "title": "Throughput", "keys": speed, "details": []},
        {"name": "other", "title": "Gradients and other values", "keys": other, "details": details},
    ]
    units = {key: _UNITS.get(key, "s" if key == seconds else "") for key in series}
    shown = [chart for chart in found if chart["keys"] or chart["details"]]
    first = {chart["name"]: [*chart["keys"], *chart["details"]][0] for chart in shown}
    return [chart | {"units": units, "logarithmic": _spans(series[first[chart["name"]]])} for chart in shown]


def _spans(series: list[dict[str, Any]]) -> bool:
    """Whether values are better read on a logarithmic axis: all above 0, the greatest far above the median."""
    values = np.array([value for each in series for value in each["y"] if value is not None])
    return bool(values.min() > 0 and values.max() > FAR * np.median(values))
