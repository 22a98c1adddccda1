"""Verdicts on children that have ended, from their exit status, rows, log and report."""

import re
import signal
from collections.abc import Iterable, Sequence

from bench.measure.rows import Row
from bench.triage.processes import Ended

OK, WRONG, MEMORY, TIMEOUT, FAILED, SKIPPED = "ok", "wrong", "out of memory", "timeout", "failed", "skipped"
#: Exit status of children of this package that found wrong results.
FOUND_WRONG = 3
OUT_OF_MEMORY = re.compile(r"OutOfMemoryError|CUDA out of memory|CUDA error: out of memory|cudaErrorMemoryAllocation")
#: Printed by a bench that ended by itself, at its own time limit, before it had measured everything.
CUT_SHORT = re.compile(r"(the )?time is up, not measured: ")
#: The last line of a traceback.
EXCEPTION = re.compile(r"^(\w+\.)*\w*(Error|Exception|Exit|Interrupt|Unavailable)\b.*")


def outcomes(rows: Iterable[Row]) -> list[Row]:
    """The rows that state a verdict on a child."""
    return [row for row in rows if row["kind"] == "triage"]


def bad(verdict: str) -> bool:
    """Whether it is a failure of the program that ran."""
    return verdict not in (OK, SKIPPED)


def crashed(verdict: str) -> bool:
    """Whether the backend has to be left out of later children: it gave no result, right or wrong."""
    return bad(verdict) and verdict not in (WRONG, MEMORY)


def classify(ended: Ended, rows: Sequence[Row] | None, log: Sequence[str], report: Row) -> tuple[str, str]:
    """The verdict and its reason.

    Args:
        rows: measured by the child; None for a child that measures nothing.
        log: lines that it printed.
        report: its result file: "verdict" and "reason", if it got that far.
    """
    if ended.why == "timeout":
        return TIMEOUT, f"no end after {ended.seconds:.1f} s"
    if ended.why:
        return SKIPPED, f"the run was stopped when it had run for {ended.seconds:.1f} s"
    if ended.status < 0:
        names = {known.value: known.name for known in signal.Signals}  # most real-time signals have none
        return f"signal {names.get(-ended.status, -ended.status)}", _error_line(log)
    if ended.status in (0, FOUND_WRONG) and report.get("verdict"):
        return report["verdict"], report.get("reason", "")
    if found := _worst(rows or ()):
        return found
    if ended.status:
        return (MEMORY if any(map(OUT_OF_MEMORY.search, log)) else FAILED), _error_line(log)
    if rows is not None and not rows:
        return FAILED, ": ".join(filter(None, ("it has measured nothing", _error_line(log))))
    return OK, next((line for line in log if CUT_SHORT.match(line)), "")


def _worst(rows: Sequence[Row]) -> tuple[str, str] | None:
    """Verdict and reason by the statuses of the rows; None where none of them is bad."""
    measured = [row for row in rows if "status" in row]
    for status, verdict in (("incorrect", WRONG), ("failed", FAILED)):
        if found := [row for row in measured if row["status"] == status]:
            if verdict == FAILED and all(OUT_OF_MEMORY.search(row["reason"]) for row in found):
                verdict = MEMORY
            return verdict, "; ".join(f"{_names(row)}{row['reason']}" for row in found[:3])
    if measured and all(row["status"] in ("unavailable", "unsupported") for row in measured):
        return SKIPPED, measured[0]["reason"]
    return None


def _names(row: Row) -> str:
    """The names of an op's row, to stand before its reason; empty for other rows, which the child's name identifies."""
    if row["kind"] != "op":
        return ""
    return " ".join(str(row[key]) for key in ("op", "case", "direction", "provider") if row[key]) + ": "


def _error_line(log: Sequence[str]) -> str:
    """The last line that names an exception, else the last line."""
    lines = [line.strip() for line in log if line.strip()]
    named = [line for line in lines if EXCEPTION.match(line)]
    return (named or lines or [""])[-1][:300]
