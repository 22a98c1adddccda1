"""Tables of steps, sampling, the tokenizer, matrix products, loaders and decoders, for one GPU's page."""

from bench import gemms
from bench.measure.breakdown import KINDS, OTHER
from bench.measure.rows import Row
from bench.pages.markdown import Cell, comparison_table, row_table, text
from bench.pages.measured import HEADLINE, Measured
from bench.pages.targets import gemm_rate
from bench.step import IMAGES

SPREAD, FRACTION = {"spread": "{spread:.1%}"}, {"of a large matmul": "{fraction:.1%}"}


def over_plain_eager(row: Row) -> str:
    """Of a step of MeanFlow, over the plain model's step of MeanFlow."""
    names = ("plain-eager", "plain-meanflow")
    return next(filter(None, (text(f"{{times_faster_than[{name}]:.2f}}", row) for name in names)), "")


RATIOS: dict[str, Cell] = {
    "× plain, eager": over_plain_eager,
    "× plain, compiled": "{times_faster_than[plain-compile]:.2f}",
}
PEAK = {"peak memory": "{peak_gb:.1f} GB"}
MODEL = {"model": "{model}", "batch": "{batch}"}


def hours(images_per_second: float) -> str:
    """For 64 epochs on 8 GPUs that lose nothing."""
    return f"{IMAGES / (8 * images_per_second) / 3600:.1f} h"


STEP_FIGURES: dict[str, Cell] = {
    "images/s per GPU": lambda row: text("{images_per_second:.0f} (±{half:.1%})", row | {"half": row["spread"] / 2}),
    **FRACTION,
    "MFU": "{mfu:.1%}",
    **RATIOS,
    **PEAK,
    "64 epochs on 8 GPUs, extrapolated": lambda row: hours(row["images_per_second"]),
}


def steps(gpu: Measured) -> str:
    """Every model, batch and variant."""
    return comparison_table(gpu.ordered("step", "model", "batch"), MODEL | {"trained by": "{variant}"}, STEP_FIGURES)


def breakdown(gpu: Measured) -> str:
    """Milliseconds of a step by kind of kernel, by profiler, for the headline model."""
    columns = {f"{HEADLINE[0]}, batch {HEADLINE[1]}, ms": "{variant}", "whole step": "{p50_ms:.1f}"}
    columns |= {kind: f"{{breakdown_ms[{kind}]:.1f}}" for kind in (*KINDS, OTHER, "idle")}
    return row_table((row for row in gpu.headline() if row.get("breakdown_ms")), columns)


def longest(gpu: Measured) -> str:
    """The kernels that take most of the headline step."""
    row: Row = gpu.step("trainer") or gpu.step("bare") or {}
    columns = {"kernel": "`{kernel}`", "kind": "{kind}", "calls in a step": "{calls:g}", "ms": "{ms:.2f}"}
    return row_table(row.get("longest", []), columns)


def sampling(gpu: Measured) -> str:
    """Whole samples, extrapolated from calls of each kind."""
    figures: dict[str, Cell] = {
        "images/s": "{images_per_second:.2f}",
        **SPREAD,
        "latents/s, not decoded": "{latents_per_second:.2f}",
    }
    figures |= FRACTION | RATIOS
    for part in ("guided", "unguided", "decode", "noise"):
        figures[f"{part}, ms"] = f"{{extrapolated[parts_ms][{part}]:.2f}}"
    names = MODEL | {"dtype": "{precision}", "sampled by": "{provider}"}
    return comparison_table(gpu.ordered("sampling", "model", "batch", "precision"), names, figures)


def tokenizer(gpu: Measured) -> str:
    """Encoding, decoding and training steps; milliseconds by the profiler."""
    names = {"part": "{part}", "dtype": "{precision}", "batch": "{batch}", "by": "{provider}"}
    figures = {
        "images/s": "{images_per_second:,.1f}",
        **SPREAD,
        **FRACTION,
        **PEAK,
        "× reference": "{times_faster_than[reference]:.2f}",
        "× reference, compiled": "{times_faster_than[reference-compile]:.2f}",
        "× plain, float32": "{times_faster_than[plain]:.2f}",
        "whole, ms": "{p50_ms:.1f}",
        "products, ms": "{breakdown_ms[gemm]:.1f}",
        "memory, ms": "{breakdown_ms[memory]:.1f}",
        "idle, ms": "{breakdown_ms[idle]:.1f}",
    }
    return comparison_table(gpu.ordered("tokenizer", "part", "precision", "batch"), names, figures)


def products(gpu: Measured) -> str:
    """Every product of a step, alone; the mean over the step; their rate within a step."""
    together: Row = {"status": "ok", "layer": "all", "shape": (), "spread": None, "fraction": None}
    rows = gpu.of("gemm")
    for (model, batch, provider), rate in gemms.means(gpu.numbers("gemm")).items():
        about = {"model": model, "batch": batch, "provider": provider, "direction": "mean over a step"}
        rows.append(together | about | {"tflops": rate})
    if (within := gemm_rate(gpu)) is not None:
        about = {"model": "", "batch": "", "provider": "torch", "direction": "within a step, by the profiler"}
        rows.append(together | about | {"tflops": within})
    names: dict[str, Cell] = {**MODEL, "layer": "{layer}", "product": "{direction}"}
    names |= {"M × N × K": lambda row: " × ".join(map(str, row["shape"])), "library": "{provider}"}
    return comparison_table(rows, names, {"TFLOP/s": "{tflops:.1f}", **SPREAD, **FRACTION})


def loaders(gpu: Measured) -> str:
    """Latents of the loader and of the published way to read them, by processes that read."""
    columns: dict[str, Cell] = {
        "provider": "{provider}",
        "workers": "{workers}",
        "latents/s": "{latents_per_second:,.0f}",
        **SPREAD,
        "GB/s": lambda row: f"{row['latents_per_second'] * row['bytes'] / 1e9:.2f}",
        "cores": "{cores}",
        "× slower than the fastest": lambda row: f"{1 / min([1.0, *row['times_faster_than'].values()]):.2f}",
    }
    return row_table(gpu.numbers("data"), columns)


def images(gpu: Measured) -> str:
    """Image files decoded by each decoder and in the published way; PSNR beside Pillow's pixels."""
    names: dict[str, Cell] = {"decoded by": "{provider}", "from": "{source}", "on": "{device}", "workers": "{workers}"}
    figures: dict[str, Cell] = {
        "images/s": "{images_per_second:,.0f}",
        **SPREAD,
        "× slower than the fastest": lambda row: f"{1 / min([1.0, *row['times_faster_than'].values()]):.2f}",
        "PSNR, mean": "{psnr_mean:.1f} dB",
        "least": "{psnr_min:.1f} dB",
        "KB a file": lambda row: f"{row['bytes_per_file'] / 1e3:.0f}",
        "cores": "{cores}",
    }
    return comparison_table(gpu.ordered("images", "device", "source"), names, figures)
