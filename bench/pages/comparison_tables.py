"""Markdown tables of sampling, of the tokenizer and of matrix products, for one GPU's page."""

from bench import gemms
from bench.measure.comparison import coverage_text
from bench.measure.rows import Row
from bench.pages.measured import Measured
from bench.pages.tables import percent, table, times
from bench.pages.targets import gemm_rate

PARTS = ("guided", "unguided", "decode", "noise")


def remark(row: Row) -> str:
    """Why a row has no number, or what it rests on where the run was cut off."""
    return coverage_text(row) if row["status"] == "ok" else f"{row['status']}: {row['reason']}"


def sampling(gpu: Measured) -> str:
    """Whole samples, extrapolated from calls of each kind."""
    head = ["model", "batch", "dtype", "sampled by", "images/s", "spread", "latents/s, not decoded",
            "of a large matmul", "× plain, eager", "× plain, compiled",
            *(f"{part}, ms" for part in PARTS), ""]  # fmt: skip
    lines = []
    for row in _ordered(gpu, "sampling", "model", "batch", "precision"):
        line = [row["model"], str(row["batch"]), row["precision"], row["provider"], *[""] * 10]
        if row["status"] == "ok":
            parts, ratio = row["extrapolated"]["parts_ms"], row["times_faster_than"]
            line[4:] = [f"{row['images_per_second']:.2f}", percent(row["spread"]), f"{row['latents_per_second']:.2f}",
                        percent(row["fraction"]), times(ratio.get("plain-eager")), times(ratio.get("plain-compile")),
                        *(f"{parts[part]:.2f}" if part in parts else "" for part in PARTS)]  # fmt: skip
        lines.append([*line, remark(row)])
    return table(head, lines)


def tokenizer(gpu: Measured) -> str:
    """Encoding, decoding and training steps; milliseconds by the profiler."""
    head = ["part", "dtype", "batch", "by", "images/s", "spread", "of a large matmul", "peak memory", "× reference",
            "× reference, compiled", "whole, ms", "products, ms", "memory, ms", "idle, ms", ""]  # fmt: skip
    lines = []
    for row in _ordered(gpu, "tokenizer", "part", "precision", "batch"):
        line = [row["part"], row["precision"], str(row["batch"]), row["provider"], *[""] * 10]
        if row["status"] == "ok":
            ratio, spent = row["times_faster_than"], row.get("breakdown_ms", {})
            kinds = (f"{spent[kind]:.1f}" if kind in spent else "" for kind in ("gemm", "memory", "idle"))
            memory = f"{row['peak_gb']:.1f} GB" if row["peak_gb"] else ""
            line[4:] = [f"{row['images_per_second']:,.1f}", percent(row["spread"]), percent(row["fraction"]), memory,
                        times(ratio.get("reference")), times(ratio.get("reference-compile")), f"{row['p50_ms']:.1f}",
                        *kinds]  # fmt: skip
        lines.append([*line, remark(row)])
    return table(head, lines)


def products(gpu: Measured) -> str:
    """Every product of a step, alone, and the mean over the step."""
    head = ["model", "batch", "layer", "product", "M × N × K", "library", "TFLOP/s", "spread", "of a large matmul", ""]
    lines = []
    for row in gpu.of("gemm"):
        line = [row["model"], str(row["batch"]), row["layer"], row["direction"], " × ".join(map(str, row["shape"])),
                row["provider"], "", "", ""]  # fmt: skip
        if row["status"] == "ok":
            line[6:] = [f"{row['tflops']:.1f}", percent(row["spread"]), percent(row["fraction"])]
        lines.append([*line, remark(row)])
    for (model, batch, name), rate in gemms.means(gpu.numbers("gemm")).items():
        lines.append([model, str(batch), "all", "mean over a step", "", name, f"{rate:.1f}", "", "", ""])
    if (rate := gemm_rate(gpu)) is not None:
        lines.append(["", "", "all", "within a step, by the profiler", "", "torch", f"{rate:.1f}", "", "", ""])
    return table(head, lines)


def _ordered(gpu: Measured, kind: str, *names: str) -> list[Row]:
    """Rows by those names, whoever has a number first, the fastest before the others."""
    return sorted(gpu.of(kind), key=lambda row: (*(row[name] for name in names), row["status"] != "ok",
                                                 -(row.get("images_per_second") or 0)))  # fmt: skip
