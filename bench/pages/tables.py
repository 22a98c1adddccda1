"""Tables of training, ops and targets over all GPUs, for the README, and of ops, ceilings and revisions of one GPU."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import kernels
from bench.gate import compare
from bench.measure.comparison import coverage_text
from bench.measure.rows import Row
from bench.pages.comparison_tables import SPREAD, STEP_FIGURES, hours
from bench.pages.markdown import Cell, cells, row_table, table, text
from bench.pages.measured import NOT_YET, Measured, peers, representative, tflops
from bench.pages.targets import TARGETS, Target, verdict

GOALS = {target.name: target for target in TARGETS}
DIRECTIONS = ("forward", "backward", "both")


def training(results: list[Measured]) -> str:
    """The trainer's own steps of the headline model on every GPU, and the targets."""
    lines = []
    for gpu in results:
        for row in (row for row in gpu.headline() if row["features"]["engine"] == "trainer"):
            covered = f" ({text})" if (text := coverage_text(row)) else ""
            lines.append([gpu.gpu, row["variant"] + covered, *cells(row, STEP_FIGURES)])
    lines = lines or [[NOT_YET] + [""] * (len(STEP_FIGURES) + 1)]
    for level in ("target", "moonshot"):
        rate, *ratios = (getattr(GOALS[name], level) for name in ("training", "plain-eager", "plain-compile"))
        lines.append([f"{level}, one H200", "", f"{rate:g}", "", "", *map("{:g}".format, ratios), "", hours(rate)])
    return table(["GPU", "trained by", *STEP_FIGURES], lines)


def ops(results: list[Measured]) -> str:
    """Every op in its representative case: the fraction of the limit, and the ratio to the fastest other provider."""
    head = ["op", "GPU", "forward, of the limit", "× fastest other", "backward, of the limit", "× fastest other"]
    lines = [
        [f"`{name}` {representative(name).names['case']}", gpu.gpu, *_forward_backward(gpu, name)]
        for name in kernels.OPS
        for gpu in results
        if gpu.comparisons
    ]
    return table(head, lines or [[NOT_YET, "", "", "", "", ""]])


def backends(results: list[Measured]) -> str:
    """Every op, what its docstring says first, and the backends it has beside the reference."""
    columns = {"triton": "Triton", "cuda": "CUDA", "library": "library"}
    lines = [
        [f"`{name}`", re.split(r": |\.?\n", op.doc)[0], *("✓" if key in op.backends else "" for key in columns)]
        for name, op in kernels.OPS.items()
    ]
    return table(["op", "computes", *columns.values()], lines)


def _forward_backward(gpu: Measured, name: str) -> Iterator[str]:
    for direction in ("forward", "backward"):
        if direction == "backward" and not kernels.OPS[name].differentiable:
            yield from ("–", "–")
        elif row := gpu.representative(name, direction):
            yield from (text("{fraction:.1%} {bound} ({provider})", row), _fastest_other(row))
        else:
            yield from (NOT_YET, "")


def _fastest_other(row: Row) -> str:
    return next((f"{ratio:.2f} {name}" for name, ratio in peers(row).items()), "")


def targets(results: list[Measured], names: Iterable[str] = tuple(GOALS)) -> str:
    """Targets of these names, and what each GPU reaches."""

    def reached(target: Target, gpu: Measured) -> str:
        value = target.read(gpu)
        return NOT_YET if value is None else f"{target.text(value)}, {verdict(target, value)}"

    lines = []
    for target in map(GOALS.__getitem__, names):
        found = [reached(target, gpu) for gpu in results] or [NOT_YET]
        lines.append([target.metric, target.text(target.target), target.text(target.moonshot), target.limit, *found])
    return table(["", "target", "moonshot", "limit", *([gpu.gpu for gpu in results] or ["measured"])], lines)


def log(gpu: Measured) -> str:
    """When rows were committed, of which revision, and why."""
    columns = {"committed": "{date}", "revision": "{revision:.12}", "torch": "{torch}", "triton": "{triton}"}
    return row_table(gpu.of("baseline"), columns | {"CUDA": "{cuda}", "driver": "{driver}", "reason": "{reason}"})


def ceilings(gpu: Measured) -> str:
    columns = {"ceiling": "{ceiling}", "measured": "{rate:.2f} {unit}", **SPREAD, "data sheet": "{sheet:g} {unit}"}
    return row_table(
        gpu.of("ceiling"), columns | {"source": lambda row: row["source"] or "", "": lambda row: row.get("note", "")}
    )


def every_op(gpu: Measured) -> str:
    """Every case of every op, our backends only."""

    def rate(row: Row) -> str:
        if row["bound"] == "compute" or row["op"] == "rope_attention":
            return f"{tflops(row):.0f} TFLOP/s"
        return f"{row['bytes'] / row['p50_us'] / 1e6:.2f} TB/s"

    rows = (row for comparison in _ordered(gpu) for row in gpu.comparisons[comparison].values() if compare.mine(row))
    columns: dict[str, Cell] = {
        "op": "{op}",
        "case": "{case}",
        "dtype": "{dtype}",
        "direction": "{direction}",
        "backend": "{provider}",
        "µs": "{p50_us:,.1f}",
        **SPREAD,
        "of the limit": "{fraction:.1%} {bound}",
        "": rate,
        "× eager": "{times_faster_than[eager]:.2f}",
        "× compile": "{times_faster_than[compile]:.2f}",
        "× fastest other": _fastest_other,
    }
    return row_table(rows, columns)


def _ordered(gpu: Measured) -> list[tuple[str, ...]]:
    place = {name: number for number, name in enumerate(kernels.OPS)}
    return sorted(gpu.comparisons, key=lambda c: (place.get(c[0], len(place)), *c[:3], DIRECTIONS.index(c[3])))


def every_peer(gpu: Measured) -> str:
    """Every other provider of an op in its representative case, next to the best of ours."""
    cases = {tuple(representative(name).names.values()) for name in kernels.OPS}
    lines = []
    for comparison in _ordered(gpu):
        if comparison[:3] in cases and (ours := gpu.best(*comparison)):
            for name, ratio in peers(ours).items():
                row = gpu.comparisons[comparison].get(name, {})
                lines.append(
                    [
                        comparison[0],
                        comparison[3],
                        name,
                        row.get("version") or "",
                        f"{ratio:.2f}",
                        ours["provider"],
                        row.get("includes") or "",
                    ]
                )
    return table(["op", "direction", "provider", "version", "× slower than ours", "ours", "its time covers"], lines)


def lacking(gpu: Measured) -> str:
    """Providers without a number: how many rows of each reason."""
    counted = Counter(
        (row["op"], row["provider"], row["status"], row["reason"]) for row in gpu.of("op") if row["status"] != "ok"
    )
    lines = [[op, provider, status, str(count), why] for (op, provider, status, why), count in sorted(counted.items())]
    return table(["op", "provider", "status", "rows", "reason"], lines)


#: Name of a marker in the README → its table.
BLOCKS: dict[str, Callable[[list[Measured]], str]] = {
    "backends": backends,
    "training": training,
    "ops": ops,
    "others": partial(targets, names=("gemm", "sampling", "encode", "decode", "vavae")),
}
