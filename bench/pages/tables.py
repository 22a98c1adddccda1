"""Markdown tables from committed rows: the README's, and those of `bench/results/README.md`."""

from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial

import kernels
from bench.gate import compare
from bench.measure.breakdown import KINDS, OTHER
from bench.measure.comparison import coverage_text
from bench.measure.rows import Row
from bench.pages.measured import HEADLINE, NOT_YET, Measured, backlog, peers, representative, tflops
from bench.pages.targets import TARGETS, Target, verdict
from bench.step import IMAGES

GOAL = next(target for target in TARGETS if target.name == "training")
DIRECTIONS = ("forward", "backward", "both")
STEP_HEAD = ["GPU", "trained by", "images/s per GPU", "of a large matmul", "MFU", "× plain, eager", "× plain, compiled",
             "peak memory", "64 epochs on 8 GPUs, extrapolated"]  # fmt: skip


def table(head: list[str], lines: Iterable[list[str]]) -> str:
    """A table; words that would end a cell are kept from doing so."""
    safe = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *safe])


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}".replace("%", " %")


def times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def microseconds(value: float) -> str:
    return f"{value:,.1f}"


def hours(images_per_second: float) -> str:
    """For 64 epochs on 8 GPUs that lose nothing."""
    return f"{IMAGES / (8 * images_per_second) / 3600:.1f} h"


def training(results: list[Measured]) -> str:
    """The headline: the trainer's own steps of every GPU, and what is aimed at."""
    lines = [[gpu.gpu, *_step(gpu, row)] for gpu in results
             for row in gpu.headline() if row["features"]["engine"] == "trainer"]  # fmt: skip
    aims = [[f"{label}, one H200", "", f"{value:g}", "", "", *ratios, "", hours(value)] for label, value, ratios in (
        ("target", GOAL.target, _ratios("target")), ("moonshot", GOAL.moonshot, _ratios("moonshot")))]  # fmt: skip
    return table(STEP_HEAD, [*(lines or [[NOT_YET] + [""] * 8]), *aims])


def _ratios(which: str) -> list[str]:
    return [f"{getattr(t, which):g}" for t in TARGETS if t.name in ("plain-eager", "plain-compile")]


def _step(gpu: Measured, row: Row) -> list[str]:
    ratio = row["times_faster_than"]
    memory = f"{row['peak_gb']:.1f} GB" if row["peak_gb"] else ""
    rests = f" ({why})" if (why := coverage_text(row)) else ""
    rate = f"{row['images_per_second']:.0f} (±{percent(row['spread'] / 2)})"
    return [row["variant"] + rests, rate, percent(row["fraction"]), percent(row["mfu"]),
            times(ratio.get("plain-eager")), times(ratio.get("plain-compile")), memory,
            hours(row["images_per_second"])]  # fmt: skip


def ops(results: list[Measured]) -> str:
    """Every op in the case that stands for it: part of the limit, and the ratio to the fastest of all others."""
    head = ["op", "GPU", "forward, of the limit", "× fastest other", "backward, of the limit", "× fastest other"]
    lines = [[f"`{name}` {representative(name).names['case']}", gpu.gpu, *_both(gpu, name)]
             for name in kernels.OPS for gpu in results if gpu.comparisons]  # fmt: skip
    empty = [[f"`{name}` {representative(name).names['case']}", NOT_YET, "", "", "", ""] for name in kernels.OPS]
    return table(head, lines or empty)


def _both(gpu: Measured, name: str) -> list[str]:
    cells = []
    for direction in DIRECTIONS[:2]:
        if direction == "backward" and not kernels.OPS[name].differentiable:
            cells += ["–", "–"]
        elif row := gpu.representative(name, direction):
            cells += [f"{percent(row['fraction'])} {row['bound']} ({row['provider']})", _fastest(row)]
        else:
            cells += [NOT_YET, ""]
    return cells


def _fastest(row: Row) -> str:
    return next((f"{ratio:.2f} {name}" for name, ratio in peers(row).items()), "")


def targets(results: list[Measured], names: Iterable[str] = ()) -> str:
    """What is aimed at (all of it unless targets are named), and what each GPU reaches."""
    wanted = [target for target in TARGETS if not names or target.name in names]

    def cell(target: Target, gpu: Measured) -> str:
        value = target.read(gpu)
        return NOT_YET if value is None else f"{target.text(value)}, {verdict(target, value)}"

    head = ["", "target", "moonshot", "limit", *([gpu.gpu for gpu in results] or ["measured"])]
    return table(head, [[t.metric, t.text(t.target), t.text(t.moonshot), t.limit,
                         *([cell(t, gpu) for gpu in results] or [NOT_YET])] for t in wanted])  # fmt: skip


def log(gpu: Measured) -> str:
    """When rows were committed, of what, and why."""
    return table(["committed", "revision", "torch", "triton", "CUDA", "driver", "reason"], [
        [row["date"], row["revision"][:12], *(str(row[name]) for name in ("torch", "triton", "cuda", "driver")),
         row["reason"]] for row in backlog(gpu)])  # fmt: skip


def ceilings(gpu: Measured) -> str:
    return table(["ceiling", "seen", "spread", "data sheet", "source"], [
        [row["ceiling"], f"{row['rate']:.2f} {row['unit']}", percent(row["spread"]),
         f"{row['sheet']:g} {row['unit']}" if row["sheet"] else "", row["source"] or ""]
        for row in gpu.of("ceiling")])  # fmt: skip


def steps(gpu: Measured) -> str:
    """Every model, batch and way to train it; what could not run with its reason."""
    rows = sorted(gpu.of("step"), key=lambda row: (row["model"], row["batch"], row["status"] != "ok",
                                                   -(row.get("images_per_second") or 0)))  # fmt: skip
    return table(["model", "batch", *STEP_HEAD[1:]], [
        [row["model"], str(row["batch"]), *(_step(gpu, row) if row["status"] == "ok" else
         [row["variant"], f"{row['status']}: {row['reason']}", *[""] * 6])] for row in rows])  # fmt: skip


def breakdown(gpu: Measured) -> str:
    """Milliseconds of a step by kind of kernel, by profiler, for the headline model."""
    kinds = [*KINDS, OTHER, "idle"]
    lines = [[row["variant"], f"{row['p50_ms']:.1f}", *(f"{row['breakdown_ms'][kind]:.1f}" for kind in kinds)]
             for row in gpu.headline() if row.get("breakdown_ms")]  # fmt: skip
    return table([f"{HEADLINE[0]}, batch {HEADLINE[1]}, ms", "whole step", *kinds], lines)


def longest(gpu: Measured) -> str:
    """The kernels that take most of the headline step."""
    row = gpu.step("trainer") or gpu.step("bare") or {}
    return table(["kernel", "kind", "calls in a step", "ms"], [
        [f"`{item['kernel']}`", item["kind"], f"{item['calls']:g}", f"{item['ms']:.2f}"]
        for item in row.get("longest", [])])  # fmt: skip


def every_op(gpu: Measured) -> str:
    """Every case of every op, our backends only."""
    head = ["op", "case", "dtype", "direction", "backend", "µs", "spread", "of the limit", "", "× eager", "× compile",
            "× fastest other"]  # fmt: skip
    lines = []
    for comparison in _ordered(gpu):
        for row in filter(compare.mine, gpu.comparisons[comparison].values()):
            rate = f"{tflops(row):.0f} TFLOP/s" if row["bound"] == "compute" or row["op"] == "rope_attention" else (
                f"{row['bytes'] / row['p50_us'] / 1e6:.2f} TB/s")  # fmt: skip
            others = row["times_faster_than"]
            lines.append([*comparison, row["provider"], microseconds(row["p50_us"]), percent(row["spread"]),
                          f"{percent(row['fraction'])} {row['bound']}", rate, times(others.get("eager")),
                          times(others.get("compile")), _fastest(row)])  # fmt: skip
    return table(head, lines)


def _ordered(gpu: Measured) -> list[tuple[str, ...]]:
    place = {name: number for number, name in enumerate(kernels.OPS)}
    return sorted(gpu.comparisons, key=lambda c: (place.get(c[0], len(place)), *c[:3], DIRECTIONS.index(c[3])))


def every_peer(gpu: Measured) -> str:
    """Whoever else computes an op, in the case that stands for it, next to the best of ours."""
    lines = []
    for comparison in _ordered(gpu):
        ours = gpu.best(*comparison)
        if (
            ours
            and comparison[0] in kernels.OPS
            and comparison[1:3] == tuple(representative(comparison[0]).names.values())[1:]
        ):
            for name, ratio in peers(ours).items():
                row = gpu.comparisons[comparison].get(name, {})
                lines.append([comparison[0], comparison[3], name, row.get("version") or "", f"{ratio:.2f}",
                              ours["provider"], row.get("includes") or ""])  # fmt: skip
    return table(["op", "direction", "provider", "version", "× slower than ours", "ours", "its time covers"], lines)


def loaders(gpu: Measured) -> str:
    """Latents of the loader and of the published way to read them, by processes that read."""
    return table(["provider", "workers", "latents/s", "spread", "GB/s", "cores", "× slower than the fastest"], [
        [row["provider"], str(row["workers"]), f"{row['latents_per_second']:,.0f}", percent(row["spread"]),
         f"{row['latents_per_second'] * row['bytes'] / 1e9:.2f}", str(row["cores"]),
         times(1 / min([1.0, *row["times_faster_than"].values()]))] for row in gpu.numbers("data")])  # fmt: skip


def lacking(gpu: Measured) -> str:
    """Providers without a number: how many rows of each reason."""
    counted = Counter((row["op"], row["provider"], row["status"], row["reason"])
                      for row in gpu.of("op") if row["status"] != "ok")  # fmt: skip
    return table(["op", "provider", "status", "rows", "reason"],
                 [[op, provider, status, str(count), why] for (op, provider, status, why), count
                  in sorted(counted.items())])  # fmt: skip


OTHERS = ("gemm", "sampling", "encode", "decode", "vavae")
BLOCKS: dict[str, Callable[[list[Measured]], str]] = {
    "training": training, "ops": ops, "others": partial(targets, names=OTHERS)}  # fmt: skip
