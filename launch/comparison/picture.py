"""The picture of a comparison: one loss over steps and over hours."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.files import atomic_write, make_directory
from common.text import printable
from launch.comparison.curves import Curve
from launch.pictures import running_median

#: Okabe and Ito's colours, which the colour-blind tell apart (https://jfly.uni-koeln.de/color/); the black is for the
#: published curve, and the yellow darkened to be seen on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#6C4A9E", "#7A6C00")
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
MOST = len(COLOURS)
INK, MUTED = "#202124", "#5f6368"


def draw(curves: Sequence[Curve], loss: str, path: Path) -> None:
    """Write the picture, a PNG or an SVG by its name. Of a run: its values faintly, and a running median of them."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "comparison", "text.parse_math": False}):
        figure = Figure(figsize=(11, 4.6), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, 2, sharey=True)
        _panel(panels[0], curves, [curve.steps.astype(float) for curve in curves], "step")
        factor, unit = _unit(curves)
        _panel(panels[1], curves, [curve.hours * factor for curve in curves], f"{unit} of training")
        panels[0].set_ylabel(printable(loss), color=INK)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(curves), 4), frameon=False, fontsize=9)
        make_directory(path.parent)
        with atomic_write(path) as file:
            kind = path.suffix.removeprefix(".")
            metadata = {"Date": None} if kind == "svg" else {"Software": None}
            figure.savefig(file, format=kind, dpi=130, metadata=metadata)


def _unit(curves: Sequence[Curve]) -> tuple[int, str]:
    """How many of the unit an hour has, and the unit that the longest curve takes at least one of."""
    ends = [curve.hours[-1] for curve in curves if np.isfinite(curve.hours[-1])]
    longest = max(ends, default=1.0)
    return (1, "hours") if longest >= 1 else (60, "minutes") if longest * 60 >= 1 else (3600, "seconds")


def _panel(axes, curves: Sequence[Curve], places: Sequence[np.ndarray], title: str) -> None:
    number = 0
    for curve, x in zip(curves, places, strict=True):
        known = np.isfinite(x) & np.isfinite(curve.values) & (x > 0)
        label = printable(curve.name)
        if curve.interpolated:
            axes.plot(x[known], curve.values[known], "o:", color="black", lw=1.2, ms=4.5, label=label, zorder=5)
            continue
        colour, dashes = COLOURS[number % MOST], DASHES[number % len(DASHES)]
        number += 1
        axes.plot(x[known], curve.values[known], color=colour, alpha=0.25, lw=0.8)
        axes.plot(
            x[known], running_median(x[known], curve.values[known], 1.1), color=colour, ls=dashes, lw=1.9, label=label
        )
    axes.set_xlabel(title, color=INK)
    _logarithmic(axes, "x", np.concatenate(list(places)))
    _logarithmic(axes, "y", np.concatenate([curve.values for curve in curves]))
    axes.grid(True, which="major", color="#e4e6e9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#b5b9bf")
    axes.tick_params(colors=MUTED, labelsize=9, which="both")


def _logarithmic(axes, name: str, values: np.ndarray) -> None:
    """A logarithmic axis with the labels that its length takes; a linear one where there is nothing to spread."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    positive = values[np.isfinite(values) & (values > 0)]
    if not len(positive) or (values < 0).any() or positive.max() < 1.5 * positive.min():
        return
    axis = axes.xaxis if name == "x" else axes.yaxis
    (axes.set_xscale if name == "x" else axes.set_yscale)("log")
    decades = math.log10(positive.max() / positive.min())
    subs = (1,) if decades > 3.5 else (1, 2, 5) if decades > 1.2 else (1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)
    axis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
