"""The picture of a sweep: a curve over one axis, a heat map over two, one map for each combination of further axes."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.files import atomic_write
from common.text import printable
from launch.comparison.picture import COLOURS, INK, MUTED
from launch.evaluation.figures import Figure
from launch.sweeping.axes import Axis, shown
from launch.sweeping.report import Ranked

COLUMNS = 3  # maps beside each other


def draw(ranked: Sequence[Ranked], axes: Sequence[Axis], figure: Figure, path: Path) -> None:
    """Write the picture as a PNG; a failed setting is a gap of the curve, and grey in a map."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    values = grid(ranked, axes)
    with rc_context({"text.parse_math": False}):
        if len(axes) == 1:
            canvas = Canvas(figsize=(6.4, 4.2), layout="constrained")
            FigureCanvasAgg(canvas)
            _curve(canvas.subplots(), values, axes[0], figure)
        else:
            canvas = _maps(Canvas, FigureCanvasAgg, values, axes, figure)
        with atomic_write(path) as file:
            canvas.savefig(file, format="png", dpi=130, metadata={"Software": None})


def grid(ranked: Sequence[Ranked], axes: Sequence[Axis]) -> np.ndarray:
    """Values by the places of settings on their axes, float64; NaN where a setting failed."""
    values = np.full([len(axis.values) for axis in axes], np.nan)
    for row in ranked:
        place = tuple(axis.values.index(row.setting.values[axis.key]) for axis in axes)
        values[place] = np.nan if row.value is None else row.value
    return values


def _curve(panel, values: np.ndarray, axis: Axis, figure: Figure) -> None:
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in axis.values)
    x: Sequence[Any] = axis.values if numbers else range(len(axis.values))
    order = np.argsort(np.asarray(x, dtype=float))
    panel.plot(np.asarray(x, dtype=float)[order], values[order], "o-", color=COLOURS[0], lw=1.8, ms=5)
    if not numbers:
        panel.set_xticks(list(x), [printable(shown(value)) for value in axis.values])
        panel.set_xlim(-0.5, len(axis.values) - 0.5)
    best = _best(values, figure)
    panel.plot([x[best[0]]], [values[best]], "o", ms=11, mfc="none", mec=COLOURS[1], mew=2)
    panel.set_xlabel(printable(axis.key), color=INK)
    panel.set_ylabel(f"{figure.name} ({figure.direction})", color=INK)
    panel.grid(True, color="#e4e6e9", linewidth=0.8)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(colors=MUTED, labelsize=9)


def _best(values: np.ndarray, figure: Figure) -> tuple[int, ...]:
    flat = np.nanargmin(values) if figure.lower_is_better else np.nanargmax(values)
    return tuple(int(i) for i in np.unravel_index(flat, values.shape))


def _maps(canvas_type, agg_type, values: np.ndarray, axes: Sequence[Axis], figure: Figure):
    """A canvas with a map of the first two axes (down, across) for each combination of the others."""
    down, across, *others = axes
    combinations = list(itertools.product(*(range(len(axis.values)) for axis in others)))
    columns = min(COLUMNS, len(combinations))
    rows = -(-len(combinations) // columns)
    width, height = 1.6 + 0.75 * len(across.values), 1.2 + 0.5 * len(down.values)
    canvas = canvas_type(figsize=(max(4.8, width * columns + 1), max(3.2, height * rows)), layout="constrained")
    agg_type(canvas)
    panels = canvas.subplots(rows, columns, squeeze=False).flatten()
    best, drawn = _best(values, figure), None
    maps = values.reshape(len(down.values), len(across.values), -1)
    for number, (panel, places) in enumerate(zip(panels, combinations, strict=False)):
        marked = best[:2] if best[2:] == places else None
        drawn = _map(panel, maps[:, :, number], (down, across), figure, values, marked)
        title = ", ".join(f"{axis.key}={shown(axis.values[i])}" for axis, i in zip(others, places, strict=True))
        panel.set_title(printable(title), fontsize=10, color=INK)
    for panel in panels[len(combinations) :]:
        panel.axis("off")
    bar = canvas.colorbar(drawn, ax=list(panels))
    bar.set_label(f"{figure.name} ({figure.direction})", color=INK)
    return canvas


def _map(panel, part: np.ndarray, axes: tuple[Axis, Axis], figure: Figure, values: np.ndarray, marked):
    """One map with its numbers; the best setting of all maps is framed, bright is good."""
    low, high = np.nanmin(values), np.nanmax(values)
    panel.set_facecolor("#c9ccd1")
    colours = "viridis_r" if figure.lower_is_better else "viridis"
    drawn = panel.imshow(np.ma.masked_invalid(part), cmap=colours, vmin=low, vmax=high, aspect="auto")
    for place in np.ndindex(part.shape):
        value, text = part[place], "–" if np.isnan(part[place]) else f"{part[place]:.4g}"
        dark = (value - low if not figure.lower_is_better else high - value) < 0.5 * (high - low)
        colour = "white" if dark else "black"
        panel.text(place[1], place[0], text, ha="center", va="center", fontsize=8, color=colour)
    if marked is not None:
        from matplotlib.patches import Rectangle

        frame = Rectangle((marked[1] - 0.5, marked[0] - 0.5), 1, 1, fill=False, ec=COLOURS[1], lw=3)
        panel.add_patch(frame)
    for axis, ticks, label in (
        (axes[0], panel.set_yticks, panel.set_ylabel),
        (axes[1], panel.set_xticks, panel.set_xlabel),
    ):
        ticks(range(len(axis.values)), [printable(shown(value)) for value in axis.values])
        label(printable(axis.key), color=INK)
    panel.tick_params(colors=MUTED, labelsize=9)
    return drawn
