"""What became of a child: one word, and why."""

import re
import signal
from collections.abc import Sequence

from bench.measure.rows import Row
from bench.triage.processes import Ended

OK, WRONG, MEMORY, TIMEOUT, FAILED, SKIPPED = "ok", "wrong", "out of memory", "timeout", "failed", "skipped"
#: Exit status of our own children that found wrong results.
FOUND_WRONG = 3
OUT_OF_MEMORY = re.compile(r"OutOfMemoryError|CUDA out of memory|CUDA error: out of memory|cudaErrorMemoryAllocation")
#: What a bench prints when it has ended by itself before it was through.
CUT_SHORT = re.compile(r"(the )?time is up, not measured: ")
#: What the last line of a traceback looks like.
EXCEPTION = re.compile(r"^(\w+\.)*\w*(Error|Exception|Exit|Interrupt|Unavailable)\b.*")


def bad(verdict: str) -> bool:
    """Whether it is a failure of what was run."""
    return verdict not in (OK, SKIPPED)


def crashed(verdict: str) -> bool:
    """Whether whoever ran has to be left out of what follows: it came to no result, right or wrong."""
    return bad(verdict) and verdict not in (WRONG, MEMORY)


def verdict(ended: Ended, rows: Sequence[Row] | None, log: Sequence[str], told: Row) -> tuple[str, str]:
    """The word and the reason.

    Args:
        rows: measured by the child; None of one that measures nothing.
        log: lines that it printed.
        told: what it said of itself: "verdict" and "reason", if anything.
    """
    if ended.why == "timeout":
        return TIMEOUT, f"no end after {ended.seconds:.1f} s"
    if ended.why:
        return SKIPPED, f"the run was stopped when it had run for {ended.seconds:.1f} s"
    if ended.status < 0:
        return f"signal {_signal(-ended.status)}", _last(log)
    if ended.status in (0, FOUND_WRONG) and told.get("verdict"):
        return told["verdict"], told.get("reason", "")
    if found := _of_rows(rows or ()):
        return found
    if ended.status:
        return (MEMORY if any(map(OUT_OF_MEMORY.search, log)) else FAILED), _last(log)
    if rows is not None and not rows:
        return FAILED, ": ".join(filter(None, ("it has measured nothing", _last(log))))
    return OK, next((line for line in log if CUT_SHORT.match(line)), "")


def _of_rows(rows: Sequence[Row]) -> tuple[str, str] | None:
    """The worst that the rows say; None where they say nothing bad."""
    measured = [row for row in rows if "status" in row]
    for status, word in (("incorrect", WRONG), ("failed", FAILED)):
        found = [row for row in measured if row["status"] == status]
        if found and word == FAILED and all(OUT_OF_MEMORY.search(row["reason"]) for row in found):
            word = MEMORY
        if found:
            return word, "; ".join(f"{about(row)}{row['reason']}" for row in found[:3])
    if measured and all(row["status"] in ("unavailable", "unsupported") for row in measured):
        return SKIPPED, measured[0]["reason"]
    return None


def about(row: Row) -> str:
    """What a row of an op is about, before its reason; empty for rows that the child's name tells of."""
    if row["kind"] != "op":
        return ""
    return " ".join(str(row[key]) for key in ("op", "case", "direction", "provider") if row[key]) + ": "


def _signal(number: int) -> str:
    known = {one.value: one.name for one in signal.Signals}
    return known.get(number, str(number))  # most real-time signals have no name


def _last(log: Sequence[str]) -> str:
    """The line that tells most of a failure: the last that names an exception, or else the last."""
    lines = [line.strip() for line in log if line.strip()]
    named = [line for line in lines if EXCEPTION.match(line)]
    return (named or lines or [""])[-1][:300]
