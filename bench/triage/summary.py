"""What a person reads first: what is right, how fast it is, what is lacking, and what to do next."""

from collections.abc import Iterable, Iterator, Sequence

from bench.measure.rows import Row
from bench.triage.tasks import FILES, MODEL
from bench.triage.verdicts import CUT_SHORT, OK, SKIPPED, WRONG, bad

#: A batch and variants whose absence leaves a table of the README empty.
HEADLINE = ("trainer", "bare", "plain-eager", "plain-compile")
RIGHT = {OK: "right", SKIPPED: "not checked"}


def text(rows: Sequence[Row], known: Sequence[Row] | None = None) -> str:
    """summary.txt, of these rows; known: those that say what to do next, an earlier run's too."""
    sections = (
        ("", _machine(rows)),
        ("Next", [next_step(rows if known is None else known)]),
        ("Ops: forward, gradients, the same bits twice", _checks(rows)),
        (f"Training steps of {MODEL}, each alone in a process", _steps(rows)),
        ("Matrix products of a step", _products(rows)),
        ("Parts of the limit, the worst first", _fractions(rows)),
        ("Sampling and tokenizer", _others(rows)),
        ("Not as it should be", _failures(rows)),
        (
            "Skipped",
            [
                f"{_label(row)}: {row['reason']}"
                for row in _told(rows)
                if row["verdict"] == SKIPPED or (row["verdict"] == OK and CUT_SHORT.match(row["reason"]))
            ],
        ),
    )
    filled = [(head, list(lines)) for head, lines in sections]
    blocks = ["\n".join([*([f"== {head}"] if head else []), *lines]) for head, lines in filled if lines]
    return "\n\n".join(blocks) + "\n"


def next_step(rows: Sequence[Row]) -> str:
    """The single most useful thing to do."""
    told = {_label(row): row for row in _told(rows)}
    again = "bash bench/gpu.sh OUT 3"
    if machine := told.get("machine/machine"):
        if machine["verdict"] != OK and "no device" in machine["reason"]:
            return f"find out why there is no GPU: {machine['reason']}"
        if machine.get("collectives"):
            return f"NCCL: no training step runs without it: {'; '.join(machine['collectives'])}"
    if (row := worst_check(rows)) is not None:
        if looked := _looked(told, "sanitizer/", f"{row['op']} {row['backend']}"):
            return f"read what the sanitizer says of {row['op']} on {row['backend']}: {', '.join(looked)} in logs.tgz"
        return (f"{row['op']} on {row['backend']}: {row['verdict']}, {row['reason'][:200]}; {again} --second runs it "
                "under compute-sanitizer (with these rows in OUT, or --from ROWS)")  # fmt: skip
    measured = {row["variant"].split("+")[0] for row in _ok(rows, "step")}
    for name in HEADLINE:
        failed = [row for label, row in told.items() if label.startswith(f"{name}/") and row["verdict"] != OK]
        if failed and (name not in measured or failed[-1]["verdict"] == WRONG):
            return f"{name}: {failed[-1]['verdict']}, {failed[-1]['reason'][:200]}; then {again} --only {name}"
    if failed := [row for row in told.values() if bad(row["verdict"])]:
        return f"{_label(failed[0])}: {failed[0]['verdict']}, {failed[0]['reason'][:200]}"
    if skipped := [row["part"] for row in told.values() if row["reason"].startswith("no time")]:
        return f"what there was no time for: {again}{''.join(f' --only {part}' for part in dict.fromkeys(skipped))}"
    if (row := slowest(rows)) is not None:
        if looked := _looked(told, "ncu/", f"{row['op']} {row['provider']} {row['direction']}"):
            return f"read why {_op(row)} is at {row['fraction']:.1%} of its limit: {looked[0]} in logs.tgz"
        return f"{_op(row)} is farthest from its limit, at {row['fraction']:.1%}: {again} --second runs it under ncu"
    return f"everything measured is well: {again} --second measures CUDA graphs"


def _looked(told: dict[str, Row], part: str, about: str) -> list[str]:
    """Children that have looked at something with a tool."""
    return [label for label, row in told.items()
            if label.startswith(part) and label.endswith(about) and row["verdict"] != SKIPPED]  # fmt: skip


def worst_check(rows: Iterable[Row]) -> Row | None:
    """The first op and backend that came to no result; else the first with a wrong one."""
    checks = [row for row in _told(rows) if row["part"] == "ops" and bad(row["verdict"])]
    return min(checks, key=lambda row: row["verdict"] == WRONG, default=None)


def slowest(rows: Iterable[Row]) -> Row | None:
    """The op and direction whose best backend is farthest from its limit."""
    best: dict[tuple, Row] = {}
    for row in _ours(rows):
        where = row["op"], row["direction"]
        if where not in best or row["fraction"] > best[where]["fraction"]:
            best[where] = row
    return min(best.values(), key=lambda row: row["fraction"], default=None)


def _machine(rows: Sequence[Row]) -> Iterator[str]:
    facts = next((row for row in reversed(rows) if row.get("device")), None)
    if facts is not None:
        yield (f"{facts['gpu'] or facts['device']}, driver {facts['driver']}, torch {facts['torch']}, "
               f"Triton {facts['triton']}, Python {facts['python']}, revision {facts['revision']}")  # fmt: skip
    for row in _told(rows):
        if row["part"] == "machine" and (missing := [n for n, v in row.get("packages", {}).items() if v is None]):
            yield f"not installed: {', '.join(missing)}"


def _checks(rows: Sequence[Row]) -> Iterator[str]:
    found: dict[str, dict[str, Row]] = {}
    for row in _told(rows):
        if row["part"] == "ops":
            found.setdefault(row["op"], {})[row["backend"]] = row
    for op, by_backend in found.items():
        words = [f"{name} {RIGHT.get(by_backend[name]['verdict'], by_backend[name]['verdict'].upper())}"
                 for name in FILES if name in by_backend]  # fmt: skip
        yield f"{op:30} {', '.join(words)}"
        yield from (f"    {name}: {row['reason']}" for name, row in by_backend.items() if row["verdict"] != OK)


def _steps(rows: Sequence[Row]) -> Iterator[str]:
    for row in sorted(_ok(rows, "step"), key=lambda row: -row["images_per_second"]):
        ratios = "".join(f", {row['times_faster_than'][name]:.2f}x {name}" for name in ("plain-eager", "plain-compile")
                         if name in row["times_faster_than"])  # fmt: skip
        share = f", {row['fraction']:.1%} of a large matmul" if row["fraction"] else ""
        memory = f", {row['peak_gb']:.1f} GB" if row["peak_gb"] else ""
        cut = ", cut off" if (row.get("coverage") or {}).get("cut_off") else ""
        note = f" ({row['note']})" if row.get("note") else ""
        yield (f"{row['variant']:28} batch {row['batch']:3} {row['images_per_second']:7.1f} images/s{share}{memory}"
               f"{ratios}{cut}{note}")  # fmt: skip


def _products(rows: Sequence[Row]) -> Iterator[str]:
    """The mean is that of all FLOPs over all their time."""
    for name in dict.fromkeys(row["provider"] for row in _ok(rows, "gemm")):
        mine = sorted((row for row in _ok(rows, "gemm") if row["provider"] == name), key=lambda row: row["tflops"])
        mean = sum(row["flops"] for row in mine) / sum(row["p50_ms"] for row in mine) / 1e9
        slow = mine[0]
        yield (f"{mean:.1f} TFLOP/s mean of {len(mine)} products, {name}; the slowest: {slow['layer']} "
               f"{slow['direction']}, {slow['tflops']:.1f}")  # fmt: skip


def _fractions(rows: Sequence[Row]) -> Iterator[str]:
    for row in sorted(_ours(rows), key=lambda row: row["fraction"]):
        eager = row["times_faster_than"].get("eager")
        beside = f", {eager:.2f}x eager" if eager else ""
        yield f"{row['fraction']:6.1%} of the {row['bound']} limit, {row['p50_us']:8.1f} µs  {_op(row)}{beside}"


def _others(rows: Sequence[Row]) -> Iterator[str]:
    for row in (*_ok(rows, "sampling"), *_ok(rows, "tokenizer")):
        part = row.get("part", "sampling")
        share = f", {row['fraction']:.1%} of a large matmul" if row["fraction"] else ""
        yield f"{part:10} {row['provider']:28} {row['images_per_second']:8.2f} images/s{share}"


def _failures(rows: Sequence[Row]) -> Iterator[str]:
    for row in _told(rows):
        if bad(row["verdict"]) and row["part"] != "ops":
            yield f"{_label(row)}: {row['verdict']}: {row['reason']}"


def _told(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row["kind"] == "triage"]


def _ok(rows: Iterable[Row], kind: str) -> list[Row]:
    return [row for row in rows if row["kind"] == kind and row["status"] == "ok"]


def _ours(rows: Iterable[Row]) -> list[Row]:
    return [row for row in _ok(rows, "op") if row["provider"] in FILES and row["fraction"]]


def _op(row: Row) -> str:
    return f"{row['op']} {row['case']} {row['direction']} {row['provider']}"


def _label(row: Row) -> str:
    return f"{row['part']}/{row['name']}"
