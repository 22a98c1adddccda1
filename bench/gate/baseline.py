"""Committed rows of a GPU, `bench/results/<gpu>.jsonl`: a log of when and why they were written, then the rows."""

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import kernels
from bench.gate import compare
from bench.measure.rows import MACHINE, NAMES, ROOT, Row, complete, line, read
from common.files import make_directory, write_text

RESULTS = ROOT / "bench" / "results"
#: Kinds of rows that count on a CPU, too.
LOADERS = ("data", "images")
#: Kinds of rows that hold no speed: verdicts of `bench.triage` on its children, and quality.
NO_SPEED = ("triage", "vf_study")


def path_for(gpu: str, folder: Path | None = None) -> Path:
    """Where the rows of a GPU of that name lie: "NVIDIA H200" → nvidia-h200.jsonl."""
    return (folder or RESULTS) / (re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".jsonl")


def rows_of(path: Path) -> Iterator[Row]:
    """The rows of speeds of a file that were measured on a GPU, and those of the loaders that feed it."""
    yield from (row for row in read(path) if row["kind"] not in NO_SPEED)
    yield from (row for row in read(path, "cpu") if row["kind"] in LOADERS)


def gpu_of(rows: Iterable[Row]) -> str:
    """The one GPU that rows were measured on.

    Raises:
        ValueError: there are no rows, or they are of several.
    """
    names = sorted({row["gpu"] for row in rows if row["device"] == "cuda"})
    if len(names) != 1:
        raise ValueError(f"rows of one GPU are needed, these are of {', '.join(names) or 'none'}")
    return names[0]


def update(path: Path, rows: list[Row], reason: str) -> Row:
    """Put the rows in the place of the same ones of the baseline; returns the entry of its log.

    Of several measurements of a row the one in the middle stays. Rows of the baseline that were not measured stay,
    unless their op or case is gone.
    """
    old = list(rows_of(path)) if path.exists() else []
    last = next(row for row in reversed(rows) if row["device"] == "cuda")
    entry = complete({"kind": "baseline", "reason": reason}, {name: last[name] for name in MACHINE})
    log = [row for row in old if row["kind"] == "baseline"] + [entry]
    fresh = [compare.typical(same) for same in compare.grouped(rows).values()]
    gone = replaced(fresh)
    kept = [row for row in old if row["kind"] != "baseline" and exists(row) and not gone(row)]
    ordered = sorted(kept + fresh, key=lambda row: tuple(map(str, compare.key(row))))
    make_directory(path.parent)
    write_text(path, "".join(map(line, log + ordered)))
    return entry


def exists(row: Row) -> bool:
    """Whether the op and the case of a row are still here."""
    if row["kind"] != "op":
        return True
    op = kernels.OPS.get(row["op"])
    return op is not None and any(case.production and case.id == row["case"] for case in op.cases)


def replaced(fresh: list[Row]) -> Callable[[Row], bool]:
    """Whether newer rows replace a row: the same one, or one of all its directions, or one of its directions."""
    names, kinds = {compare.key(row) for row in fresh}, {row["kind"] for row in fresh}
    covered = {other for name in names for other in compare.covering(name)}

    def gone(row: Row) -> bool:
        if row["kind"] not in NAMES:
            return row["kind"] in kinds
        name = compare.key(row)
        return name in covered or not names.isdisjoint(compare.covering(name))

    return gone
