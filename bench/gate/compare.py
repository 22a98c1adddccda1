"""Comparison of a run with a baseline, row by row: fractions of the limit, each measured in its own run."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from statistics import median, median_low

import kernels
from bench.measure.rows import Key, Row, key
from bench.workloads.providers import ours

#: Kind of row → the part of its fraction that may be lost. Products are a library's, loaders have no limit.
TOLERANCE = {"op": 0.05, "step": 0.03, "sampling": 0.03, "tokenizer": 0.03}
#: How often a suspect is measured again; the median of all its measurements counts.
RERUNS = 2
WRONG = ("incorrect", "failed")
FAILURES = ("broken", "fell", "missing")

Again = Callable[[Row], list[Row]]


class NotMeasured(RuntimeError):
    """A row could not be measured again; the message says why."""


@dataclass(frozen=True)
class Finding:
    """The comparison of one row.

    Attributes:
        key: kind and names of the row.
        verdict: one of FAILURES, or "improved", "unchanged", "new", "left out".
        before, after: fractions of the limit, medians of all measurements.
    """

    key: Key
    verdict: str
    before: float | None = None
    after: float | None = None
    note: str = ""

    @property
    def failure(self) -> bool:
        return self.verdict in FAILURES


def mine(row: Row) -> bool:
    """Whether a row is of our own code, not of a baseline's, and of a kind that has a limit."""
    if row["kind"] not in TOLERANCE:
        return False
    if row["kind"] == "step":
        return row["features"]["engine"] != "plain"
    if "ours" in row:
        return row["ours"]
    backends = {name for op in kernels.OPS.values() for name in ours(op)}
    return row["kind"] == "op" and row["provider"] in backends | {"all"}


def counts(row: Row) -> bool:
    """Whether a row has a number to compare."""
    return row["status"] == "ok" and bool(row["fraction"])


def grouped(rows: Iterable[Row]) -> dict[Key, list[Row]]:
    """Rows by key, in the order in which keys come first."""
    found = defaultdict(list)
    for row in rows:
        found[key(row)].append(row)
    return dict(found)


def typical(rows: list[Row]) -> Row:
    """Of several measurements of one row the one in the middle; a wrong one goes before all others."""
    wrong = [row for row in rows if row.get("status") in WRONG]
    numbers = [row for row in rows if row.get("fraction") or row.get("rate")]
    if wrong or not numbers:
        return (wrong or rows)[-1]
    value = {id(row): row.get("fraction") or row["rate"] for row in numbers}
    middle = median_low(value.values())
    return next(row for row in numbers if value[id(row)] == middle)


def covering(name: Key) -> list[Key]:
    """Keys of rows that speak for this one: of all its directions, and of its whole case."""
    if name[0] != "op":
        return [name]
    return [name, (*name[:4], None, name[5]), (*name[:4], None, "all")]


def compare(baseline: Iterable[Row], run: Iterable[Row], again: Again, partial: Collection[str] = ()) -> list[Finding]:
    """A finding for each row of ours, failures first.

    again: measures one row anew; raises `NotMeasured` where it cannot.
    partial: kinds of rows of which the run measured a part only; of other kinds a row that it lacks is a failure.
    """
    known, found = grouped(filter(mine, baseline)), grouped(filter(mine, run))
    findings, used = [], set()
    for name, rows in sorted(known.items(), key=lambda item: _change(item[1], found.get(item[0], []))):
        if measured := [row for row in rows if counts(row)]:
            place = next((k for k in covering(name) if k in found), None)
            used.add(place)
            if place is not None:
                findings.append(_verdict(name, measured, found[place], again))
            elif name[0] in partial:
                findings.append(Finding(name, "left out", fraction(measured), None, "not in this run"))
            else:
                findings.append(Finding(name, "missing", fraction(measured), None, "no such row and no reason for it"))
    findings += [_fresh(name, known.get(name, []), rows) for name, rows in found.items() if name not in used]
    order = (*FAILURES, "improved", "left out", "new", "unchanged")
    return sorted(findings, key=lambda finding: order.index(finding.verdict))


def fraction(rows: Iterable[Row]) -> float:
    return median(row["fraction"] for row in rows if counts(row))


def _change(known: list[Row], rows: list[Row]) -> float:
    """After over before: the most suspect are measured again first, as there may not be time for all."""
    both = any(map(counts, known)) and any(map(counts, rows))
    return fraction(rows) / fraction(known) if both else 1.0


def _verdict(name: Key, known: list[Row], rows: list[Row], again: Again) -> Finding:
    """One row that both have; measured again where it seems slower, or where its noise hides whether it is."""
    before, tolerance, note = fraction(known), TOLERANCE[name[0]], ""
    if (early := _without_number(name, before, rows)) is not None:
        return early
    if fraction(rows) < before * (1 - tolerance) or _noisy(known, rows, tolerance):
        try:
            rows = rows + [row for _ in range(RERUNS) for row in again(typical(rows))]
            note = f"median of {sum(map(counts, rows))} runs"
        except NotMeasured as error:
            note = f"not measured again: {error}"
        if (early := _without_number(name, before, rows)) is not None:
            return early
    after = fraction(rows)
    verdict = "fell" if after < before * (1 - tolerance) else "improved" if after > before * (1 + tolerance) else None
    return Finding(name, verdict or "unchanged", before, after, note)


def _noisy(known: list[Row], rows: list[Row], tolerance: float) -> bool:
    """Whether samples of a row, or several measurements of the baseline, are wider apart than what may be lost."""
    values = [row["fraction"] for row in known]
    drift = (max(values) - min(values)) / median(values)
    return drift > tolerance or any(row["spread"] > tolerance for row in rows if counts(row))


def _without_number(name: Key, before: float, rows: list[Row]) -> Finding | None:
    for row in rows:
        if row["status"] in WRONG:
            return Finding(name, "broken", before, None, f"{row['status']}: {row['reason']}")
    if not any(map(counts, rows)):
        return Finding(name, "left out", before, None, f"{rows[-1]['status']}: {rows[-1]['reason']}")
    return None


def _fresh(name: Key, known: list[Row], rows: list[Row]) -> Finding:
    """A row that the baseline has no number for. One that was wrong there may still be wrong here."""
    row = typical(rows)
    if row["status"] in WRONG:
        verdict = "unchanged" if row["status"] in {old["status"] for old in known} else "broken"
        return Finding(name, verdict, note=f"{row['status']}: {row['reason']}")
    if counts(row):
        return Finding(name, "new", None, fraction(rows))
    return Finding(name, "left out", note=f"{row['status']}: {row['reason']}")


def text(finding: Finding) -> str:
    """A finding as a line to read."""
    kind, *names = finding.key
    before, after = ("-" if value is None else f"{value:.1%}" for value in (finding.before, finding.after))
    change = f"{finding.after / finding.before - 1:+.1%}" if finding.before and finding.after else ""
    name = " ".join(str(part) for part in names if part is not None)
    return f"{finding.verdict:10} {kind:9} {name:64} {before:>7} → {after:>7} {change:>7}  {finding.note}".rstrip()
