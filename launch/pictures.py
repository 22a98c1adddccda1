"""Pictures to look at: grids of samples, reconstructions, similarity maps; loss curves. Pillow and matplotlib only.

Images are uint8 `[N, H, W, 3]`. Small ones are enlarged by whole pixels, so that a picture shows them as they are.
"""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from common.files import atomic_write, make_directory

INK, PAPER, MUTED = (32, 33, 36), (255, 255, 255), (120, 124, 130)
SERIES = (
    "#2563a8",
    "#d1622b",
    "#2f8f5b",
    "#8a4fa3",
    "#b58a00",
    "#5c6672",
)  # told apart in grey and by the colour-blind
GAP = 4  # pixels between two images


def sample_grid(
    images: Tensor, labels: Tensor, path: str | Path, *, columns: int = 10, names: Sequence[str] = ()
) -> None:
    """One row for each class, its name at the left, the first `columns` images of the class in order.

    Args:
        images: uint8 `[N, H, W, 3]`.
        labels: int `[N]`.
        path: the PNG to write.
        names: class names; the label itself where there is none.
    """
    _require(images, labels)
    classes = labels.unique(sorted=True).tolist()
    captions = [names[c] if c < len(names) else str(c) for c in classes]
    rows = [images[labels == c][:columns] for c in classes]
    image_rows(rows, captions, path)


def reconstruction_pairs(
    originals: Tensor, reconstructions: Tensor, path: str | Path, *, columns: int = 10, rows: int = 4
) -> None:
    """Originals and, right below each, its reconstruction; `rows` such double rows of `columns` images."""
    _require(originals, reconstructions)
    if originals.shape != reconstructions.shape:
        raise ValueError(
            f"originals {tuple(originals.shape)} and reconstructions {tuple(reconstructions.shape)} differ"
        )
    first = slice(rows * columns)
    comparison({"original": originals[first], "decoded": reconstructions[first]}, path, columns=columns)


def comparison(rows: Mapping[str, Tensor], path: str | Path, *, columns: int = 8) -> None:
    """Rows of one image for each sample below each other, their captions at the left; a new group of all rows after
    every `columns` samples.

    Args:
        rows: caption → uint8 images `[N, H, W, 3]`, or maps `[N, h, w]` of values in [−1, 1], drawn as large as the
            images in colours from dark blue to yellow; the first are images.
        path: the PNG to write.
    """
    first = next(iter(rows.values()))
    for row in rows.values():
        _require(first, row)
    images = [row if row.ndim == 4 else _colours(row) for row in rows.values()]
    lines = [row[start : start + columns] for start in range(0, len(first), columns) for row in images]
    image_rows(lines, list(rows) * (len(lines) // len(rows)), path, group=len(rows))


def _colours(maps: Tensor) -> Tensor:
    """Maps `[N, h, w]` of values in [−1, 1] as uint8 `[N, h, w, 3]`, in matplotlib's viridis."""
    from matplotlib import colormaps

    shades = colormaps["viridis"]((maps.float().cpu().numpy() + 1) / 2, bytes=True)
    return torch.from_numpy(shades[..., :3].copy())


def _require(images: Tensor, partner: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3 or len(images) == 0:
        raise ValueError(f"a picture is made of uint8 [N, H, W, 3] images, got {images.dtype} {tuple(images.shape)}")
    if len(partner) != len(images):
        raise ValueError(f"{len(images)} images do not go with {len(partner)} labels or images")


def image_rows(
    rows: Sequence[Tensor], captions: Sequence[str], path: str | Path, group: int = 1, heads: Sequence[str] = ()
) -> None:
    """Rows of uint8 images `[N, H, W, 3]` with a caption each, of any lengths; more space after every `group` rows.

    heads: captions above the first row, one for each of its images.
    """
    height, width = rows[0].shape[1:3]
    zoom = max(1, math.ceil(64 / max(height, width)))
    height, width = height * zoom, width * zoom
    font = ImageFont.load_default(size=max(13, min(height // 4, 26)))
    left = 3 * GAP + max(math.ceil(font.getlength(c)) for c in captions)
    small = max(10, min(width // 6, 16))
    tops, y = [], 2 * GAP + (small + GAP if heads else 0)
    for i in range(len(rows)):
        tops.append(y)
        y += height + (GAP if (i + 1) % group else max(GAP, GAP * 3 * (group > 1)))
    canvas_width = left + max(map(len, rows)) * (width + GAP) + GAP
    canvas = Image.new("RGB", (canvas_width, tops[-1] + height + 2 * GAP), PAPER)
    draw = ImageDraw.Draw(canvas)
    for i, head in enumerate(heads):
        draw.text(
            (left + i * (width + GAP) + width / 2, GAP),
            head,
            fill=MUTED,
            font=ImageFont.load_default(size=small),
            anchor="ma",
        )
    for row, caption, top in zip(rows, captions, tops, strict=True):
        draw.text((left - 2 * GAP, top + height / 2), caption, fill=INK, font=font, anchor="rm")
        for i, image in enumerate(row):
            tile = Image.fromarray(image.cpu().numpy()).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(tile, (left + i * (width + GAP), top))
    _save(canvas, path)


def _save(canvas: Image.Image, path: str | Path) -> None:
    make_directory(Path(path).parent)
    with atomic_write(path) as file:
        canvas.save(file, format="png", optimize=True)


def read_metrics(path: str | Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Metric → (steps, values) of a JSON-lines log; rows without a `step` and values that are no numbers are left out.

    Raises ValueError for a line that is not JSON, but for a last one that was cut off while being written.
    """
    series: dict[str, list[tuple[float, float]]] = {}
    lines = Path(path).read_text("utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as e:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number} is not JSON: {e}") from None
        for key, value in row.items():
            if key != "step" and "step" in row and isinstance(value, int | float) and not isinstance(value, bool):
                series.setdefault(key, []).append((row["step"], value))
    return {
        key: tuple(np.array(column, dtype=np.float64) for column in zip(*pairs, strict=True))
        for key, pairs in series.items()
    }


def loss_curves(
    panels: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]], path: str | Path, *, log_steps: bool = True
) -> None:
    """One panel for each entry of `panels` (title → curve name → (steps, values)), side by side.

    The measured values are drawn faintly, a running median on top: a loss at a random time is noise around a trend.
    Steps are on a logarithmic axis, where the first steps do not hide the rest.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not panels:
        raise ValueError("no curves to draw")
    figure = Figure(figsize=(5.2 * len(panels), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for color, (name, (steps, values)) in zip(cycle(SERIES), curves.items(), strict=False):
            axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
            axes.plot(steps, running_median(steps, values), color=color, linewidth=1.8, label=name)
        _style(axes, title, curves, log_steps)
    make_directory(Path(path).parent)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120, metadata={"Software": None})


def running_median(steps: np.ndarray, values: np.ndarray, factor: float = 1.25) -> np.ndarray:
    """Median of the finite values whose step is within `factor` of each step: equally wide on a logarithmic axis.

    `steps` ascend. nan where no value near is finite.
    """
    first = np.searchsorted(steps, steps / factor, side="left")
    last = np.searchsorted(steps, steps * factor, side="right")
    near = (values[a:b] for a, b in zip(first, last, strict=True))
    finite = (v[np.isfinite(v)] for v in near)
    return np.array([np.median(v) if len(v) else np.nan for v in finite])


def _style(axes, title: str, curves: Mapping, log_steps: bool) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=_hex(INK))
    axes.set_xlabel("step", color=_hex(MUTED))
    if log_steps:
        axes.set_xscale("log")
        _label_logarithmic(axes.xaxis, "{x:,.0f}")
    finite = [v[np.isfinite(v) & (v > 0)] for _, v in curves.values()]
    finite = np.concatenate(finite) if finite else np.empty(0)
    if len(finite) and finite.max() > 20 * finite.min():
        axes.set_yscale("log")
        _label_logarithmic(axes.yaxis, "{x:,g}")
    axes.grid(True, which="major", color="#e4e6e9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#b5b9bf")
    axes.tick_params(colors=_hex(MUTED), labelsize=9)
    axes.legend(frameon=False, fontsize=9)


def _label_logarithmic(axis, text: str) -> None:
    """Labels at 1, 2 and 5 of each decade, and none between: they would run into one another."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(text)
    axis.set_minor_formatter(NullFormatter())


def _hex(color: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)
