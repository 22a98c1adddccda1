"""Pictures of committed rows, as SVG files that are the same bytes for the same rows."""

from collections.abc import Callable
from pathlib import Path

import kernels
from bench.measure.breakdown import KINDS, OTHER
from bench.measure.rows import Row
from bench.pages.measured import HEADLINE, Measured, peers
from bench.pages.targets import TARGETS
from bench.step import IMAGES

TEN_HOURS = IMAGES / (8 * 36_000)  # images/s per GPU
PALETTE = ("#7a5195", "#ef5675", "#003f5c", "#ffa600", "#5aa469", "#cccccc")
COLOURS = dict(zip((*KINDS, OTHER, "idle"), PALETTE, strict=True))
MARKS = "os^vD<>Pp*"


def roofline(gpu: Measured, axes) -> None:
    """Bytes per second over FLOPs per byte: ops without products have a place too, at 0, under the roof of a copy."""
    rates = {row["ceiling"]: row["rate"] for row in gpu.of("ceiling")}
    copy, matmul = rates["copy"], rates["matmul bfloat16"]
    intensity = [0.0] + [10 ** (n / 50) for n in range(-50, 166)]
    axes.plot(intensity, [min(copy, matmul / x) if x else copy for x in intensity], color="black", lw=1)
    axes.annotate(f"copy {copy:.2f} TB/s", (0, copy), (4, 4), textcoords="offset points", fontsize=8)
    axes.annotate(f"matmul {matmul:.0f} TFLOP/s", (matmul / copy, copy), (4, 4), textcoords="offset points", fontsize=8)
    for number, name in enumerate(kernels.OPS):
        for direction, full in (("forward", "full"), ("backward", "none")):
            rows = [
                gpu.best(*comparison)
                for comparison in gpu.comparisons
                if comparison[0] == name and comparison[2:] == ("bfloat16", direction)
            ]
            if not (rows := [row for row in rows if row]):
                continue
            axes.plot(
                [row["flops"] / row["bytes"] for row in rows],
                [row["bytes"] / row["p50_us"] / 1e6 for row in rows],
                MARKS[number % len(MARKS)],
                color=f"C{number}",
                fillstyle=full,
                ms=6,
                label=f"{name} {direction}",
            )
    axes.set(xscale="symlog", yscale="log", xlabel="FLOP per byte (bfloat16 cases)", ylabel="TB/s")
    axes.set_xlim(-0.1, 2e3)
    axes.legend(fontsize=6, ncols=2)


def ratios(gpu: Measured, axes) -> None:
    """How many times faster the best of ours is than each other provider, in an op's representative case."""
    bars = [
        (f"{name} {direction}: {peer}", ratio)
        for name in kernels.OPS
        for direction in ("forward", "backward")
        if (row := gpu.representative(name, direction))
        for peer, ratio in peers(row).items()
    ]
    names, values = zip(*reversed(bars), strict=True)
    axes.barh(range(len(bars)), values, color=["#003f5c" if value >= 1 else "#ef5675" for value in values])
    axes.set_yticks(range(len(bars)), names, fontsize=6)
    axes.axvline(1, color="black", lw=1)
    axes.set(xscale="log", xlabel="times faster than")
    for ticks in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        ticks("{x:g}")
    axes.figure.set_figheight(1 + 0.16 * len(bars))


def breakdown(gpu: Measured, axes) -> None:
    """Milliseconds of a step by kind of kernel."""
    rows = _profiled(gpu)[::-1]
    start = [0.0] * len(rows)
    for kind, colour in COLOURS.items():
        spent = [row["breakdown_ms"][kind] for row in rows]
        axes.barh(range(len(rows)), spent, left=start, color=colour, label=kind)
        start = [a + b for a, b in zip(start, spent, strict=True)]
    axes.set_yticks(range(len(rows)), [row["variant"] for row in rows], fontsize=8)
    axes.set(xlabel=f"ms of a step, {HEADLINE[0]}, batch {HEADLINE[1]}")
    axes.figure.legend(loc="outside lower center", fontsize=8, ncols=len(COLOURS))


def throughput(gpu: Measured, axes) -> None:
    """Images per second and GPU, and the line above which 8 GPUs train 64 epochs within 10 hours."""
    rows = gpu.headline()[::-1]
    axes.barh(range(len(rows)), [row["images_per_second"] for row in rows], color="#003f5c")
    axes.set_yticks(range(len(rows)), [row["variant"] for row in rows], fontsize=8)
    goal = TARGETS[0]
    for value, label in ((TEN_HOURS, "10 hours"), (goal.target, "target"), (goal.moonshot, "moonshot")):
        axes.axvline(value, color="black", lw=1, ls="--")
        axes.annotate(f"{label}, {value:.0f}", (value, len(rows)), rotation=90, va="top", ha="right", fontsize=7)
    axes.set_ylim(-0.6, len(rows) + 0.1)
    axes.set(xlabel=f"images/s per GPU, {HEADLINE[0]}, batch {HEADLINE[1]}; lines: 64 epochs on 8 GPUs, extrapolated")


def _profiled(gpu: Measured) -> list[Row]:
    return [row for row in gpu.headline() if row.get("breakdown_ms")]


#: Name → title, whether there is anything to draw, and the function that draws it.
PICTURES: dict[str, tuple[str, Callable[[Measured], object], Callable]] = {
    "roofline": ("roofline with every op on it", lambda gpu: gpu.comparisons and gpu.of("ceiling"), roofline),
    "ratios": ("ratios to peers", lambda gpu: any(gpu.representative(name, "forward") for name in kernels.OPS), ratios),
    "breakdown": ("time of a step by kind of kernel", _profiled, breakdown),
    "throughput": ("throughput against the line of 10 hours", Measured.headline, throughput),
}


def names(gpu: Measured) -> dict[str, str]:
    """File → title, of the pictures that there are rows for."""
    return {f"{gpu.slug}-{name}.svg": title for name, (title, drawable, _) in PICTURES.items() if drawable(gpu)}


def draw(gpu: Measured, folder: Path) -> list[Path]:
    """Write the pictures; their paths."""
    import matplotlib
    from matplotlib.figure import Figure

    paths = []
    for name, (title, drawable, make) in PICTURES.items():
        if drawable(gpu):
            with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
                figure = Figure(figsize=(9, 5), layout="constrained")
                axes = figure.add_subplot(title=f"{gpu.gpu}: {title}")
                make(gpu, axes)
                paths.append(folder / f"{gpu.slug}-{name}.svg")
                figure.savefig(paths[-1], metadata={"Date": None})
    return paths
