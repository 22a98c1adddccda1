"""summary.txt of a triage: correctness of ops, speed, failures, and the next thing to do."""

from collections.abc import Iterable, Iterator, Sequence
from math import ceil

from bench.measure.rows import Row
from bench.triage.tasks import FILES, MODEL
from bench.triage.verdicts import CUT_SHORT, OK, SKIPPED, WRONG, bad, outcomes

#: Variants of steps that fill the first table of the README.
HEADLINE = ("trainer", "bare", "plain-eager", "plain-compile")
RIGHT = {OK: "right", SKIPPED: "not checked"}
AGAIN = "bash bench/gpu.sh OUT 3"
#: Seconds for ceilings before parts that read them, and for the end.
START_AND_END = 30


def text(rows: Sequence[Row], known: Sequence[Row] | None = None) -> str:
    """The summary of these rows; the next thing to do is by `known`, which has an earlier run's too."""
    failures = [row for row in outcomes(rows) if bad(row["verdict"]) and row["part"] != "ops"]
    skipped = [
        row
        for row in outcomes(rows)
        if row["verdict"] == SKIPPED or (row["verdict"] == OK and CUT_SHORT.match(row["reason"]))
    ]
    sections = {
        "": _machine(rows),
        "Next": [next_step(rows if known is None else known)],
        "Ops: forward, gradients, the same bits twice": _checks(rows),
        f"Training steps of {MODEL}, each alone in a process": _steps(rows),
        "Matrix products of a step": _products(rows),
        "Fractions of the limit, the lowest first": _fractions(rows),
        "Sampling and tokenizer": _others(rows),
        "Images decoded for training": _images(rows),
        "Failures": [f"{_label(row)}: {row['verdict']}: {row['reason']}" for row in failures],
        "Skipped": [f"{_label(row)}: {row['reason']}" for row in skipped],
    }
    filled = [(head, list(lines)) for head, lines in sections.items()]
    blocks = ["\n".join([*([f"== {head}"] if head else []), *lines]) for head, lines in filled if lines]
    return "\n\n".join(blocks) + "\n"


def next_step(rows: Sequence[Row]) -> str:
    """The most useful thing to do next."""
    by_label = {_label(row): row for row in outcomes(rows)}

    def looked_at(part: str, about: str) -> list[str]:
        """Children that ran this under a tool."""
        return [
            label
            for label, row in by_label.items()
            if label.startswith(part) and label.endswith(about) and row["verdict"] != SKIPPED
        ]

    if machine := by_label.get("machine/machine"):
        if machine["verdict"] != OK and "no device" in machine["reason"]:
            return f"find out why there is no GPU: {machine['reason']}"
        if machine.get("collectives"):
            return f"NCCL: no training step runs without it: {'; '.join(machine['collectives'])}"
    if (row := worst_check(rows)) is not None:
        if looked := looked_at("sanitizer/", f"{row['op']} {row['backend']}"):
            return f"read the sanitizer's report on {row['op']} on {row['backend']}: {', '.join(looked)} in logs.tgz"
        return (
            f"{row['op']} on {row['backend']}: {row['verdict']}, {row['reason'][:200]}; {AGAIN} --second runs it "
            "under compute-sanitizer (with these rows in OUT, or --from ROWS)"
        )
    measured = {row["variant"].split("+")[0] for row in _measured(rows, "step")}
    for name in HEADLINE:
        failed = [row for label, row in by_label.items() if label.startswith(f"{name}/") and row["verdict"] != OK]
        if failed and (name not in measured or failed[-1]["verdict"] == WRONG):
            return f"{name}: {failed[-1]['verdict']}, {failed[-1]['reason'][:200]}; then {AGAIN} --only {name}"
    if failed := [row for row in by_label.values() if bad(row["verdict"])]:
        return f"{_label(failed[0])}: {failed[0]['verdict']}, {failed[0]['reason'][:200]}"
    if skipped := [row for row in by_label.values() if row["reason"].startswith("no time")]:
        minutes = ceil((sum(row["share"] for row in skipped) + START_AND_END) / 60)
        only = "".join(f" --only {part}" for part in dict.fromkeys(row["part"] for row in skipped))
        return f"parts without time: bash bench/gpu.sh OUT {minutes}{only}"
    if (row := slowest(rows)) is not None:
        if looked := looked_at("ncu/", f"{row['op']} {row['provider']} {row['direction']}"):
            return f"read why {_op(row)} is at {row['fraction']:.1%} of its limit: {looked[0]} in logs.tgz"
        return f"{_op(row)} is farthest from its limit, at {row['fraction']:.1%}: {AGAIN} --second runs it under ncu"
    return f"nothing failed: {AGAIN} --second measures CUDA graphs"


def worst_check(rows: Iterable[Row]) -> Row | None:
    """The first op and backend that came to no result; else the first with a wrong one."""
    checks = [row for row in outcomes(rows) if row["part"] == "ops" and bad(row["verdict"])]
    return min(checks, key=lambda row: row["verdict"] == WRONG, default=None)


def slowest(rows: Iterable[Row]) -> Row | None:
    """The op and direction whose best backend is farthest from its limit."""
    best = {(row["op"], row["direction"]): row for row in _by_fraction(rows)}  # the last, which is the best
    return min(best.values(), key=lambda row: row["fraction"], default=None)


def _machine(rows: Sequence[Row]) -> Iterator[str]:
    facts = next((row for row in reversed(rows) if row.get("device")), None)
    if facts is not None:
        yield (
            f"{facts['gpu'] or facts['device']}, driver {facts['driver']}, torch {facts['torch']}, "
            f"Triton {facts['triton']}, Python {facts['python']}, revision {facts['revision']}"
        )
    for row in outcomes(rows):
        if row["part"] == "machine" and (missing := [n for n, v in row.get("packages", {}).items() if v is None]):
            yield f"not installed: {', '.join(missing)}"


def _checks(rows: Iterable[Row]) -> Iterator[str]:
    found: dict[str, dict[str, Row]] = {}
    for row in outcomes(rows):
        if row["part"] == "ops":
            found.setdefault(row["op"], {})[row["backend"]] = row
    for op, by_backend in found.items():
        words = [
            f"{name} {RIGHT.get(by_backend[name]['verdict'], by_backend[name]['verdict'].upper())}"
            for name in FILES
            if name in by_backend
        ]
        yield f"{op:30} {', '.join(words)}"
        yield from (f"    {name}: {row['reason']}" for name, row in by_backend.items() if row["verdict"] != OK)


def _steps(rows: Iterable[Row]) -> Iterator[str]:
    for row in sorted(_measured(rows, "step"), key=lambda row: -row["images_per_second"]):
        ratios = row["times_faster_than"]
        memory = [f"{row['peak_gb']:.1f} GB"] if row["peak_gb"] else []
        faster = [f"{ratios[name]:.2f}x {name}" for name in ("plain-eager", "plain-compile") if name in ratios]
        cut = ["cut off"] if (row.get("coverage") or {}).get("cut_off") else []
        rate = f"{row['images_per_second']:7.1f} images/s{_fraction(row)}"
        note = f" ({row['note']})" if row.get("note") else ""
        yield f"{row['variant']:28} batch {row['batch']:3} {', '.join([rate, *memory, *faster, *cut])}{note}"


def _products(rows: Iterable[Row]) -> Iterator[str]:
    """The mean is that of all FLOPs over all their time."""
    products = sorted(_measured(rows, "gemm"), key=lambda row: row["tflops"])
    for name in dict.fromkeys(row["provider"] for row in products):
        mine = [row for row in products if row["provider"] == name]
        mean = sum(row["flops"] for row in mine) / sum(row["p50_ms"] for row in mine) / 1e9
        yield (
            f"{mean:.1f} TFLOP/s mean of {len(mine)} products, {name}; the slowest: {mine[0]['layer']} "
            f"{mine[0]['direction']}, {mine[0]['tflops']:.1f}"
        )


def _fractions(rows: Iterable[Row]) -> Iterator[str]:
    for row in _by_fraction(rows):
        eager = row["times_faster_than"].get("eager")
        ratio = f", {eager:.2f}x eager" if eager else ""
        yield f"{row['fraction']:6.1%} of the {row['bound']} limit, {row['p50_us']:8.1f} µs  {_op(row)}{ratio}"


def _others(rows: Sequence[Row]) -> Iterator[str]:
    for row in (*_measured(rows, "sampling"), *_measured(rows, "tokenizer")):
        part = row.get("part", "sampling")
        yield f"{part:10} {row['provider']:28} {row['images_per_second']:8.2f} images/s{_fraction(row)}"


def _images(rows: Sequence[Row]) -> Iterator[str]:
    for row in sorted(_measured(rows, "images"), key=lambda row: -row["images_per_second"]):
        name = f"{row['provider']} from {row['source']}, {row['workers']} workers"
        yield f"{name:39} {row['images_per_second']:8.1f} images/s, on {row['device']}"
    absent = {row["provider"]: row["reason"] for row in rows if row["kind"] == "images" and row["status"] != "ok"}
    yield from (f"{name}: {reason}" for name, reason in absent.items())


def _measured(rows: Iterable[Row], kind: str) -> list[Row]:
    return [row for row in rows if row["kind"] == kind and row["status"] == "ok"]


def _by_fraction(rows: Iterable[Row]) -> list[Row]:
    """Rows of our backends, the farthest from their limit first."""
    ours = [row for row in _measured(rows, "op") if row["provider"] in FILES and row["fraction"]]
    return sorted(ours, key=lambda row: row["fraction"])


def _fraction(row: Row) -> str:
    return f", {row['fraction']:.1%} of a large matmul" if row["fraction"] else ""


def _op(row: Row) -> str:
    return f"{row['op']} {row['case']} {row['direction']} {row['provider']}"


def _label(row: Row) -> str:
    return f"{row['part']}/{row['name']}"
