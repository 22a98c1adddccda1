"""Markdown tables of rows."""

import re
from collections.abc import Callable, Iterable, Mapping

from bench.measure.comparison import coverage_text
from bench.measure.rows import Row

#: Text of a cell: a format string that names keys of the row, or a function of the row.
Cell = str | Callable[[Row], str]


def table(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A table; bars and line ends within a cell do not end it."""
    head = list(head)
    safe = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *safe])


def cells(row: Row, columns: Mapping[str, Cell]) -> list[str]:
    return [cell(row) if callable(cell) else text(cell, row) for cell in columns.values()]


def text(form: str, row: Row) -> str:
    """A format string filled from a row, with a space before "%"; empty where the row lacks a number."""
    try:
        return re.sub(r"(?<=\d)%", " %", form.format_map(row))
    except (KeyError, TypeError):
        return ""


def row_table(rows: Iterable[Row], columns: Mapping[str, Cell]) -> str:
    """A line for each row, by heads of columns and their cells."""
    return table(columns, (cells(row, columns) for row in rows))


def comparison_table(rows: Iterable[Row], names: Mapping[str, Cell], figures: Mapping[str, Cell]) -> str:
    """A line for each row: its names; its figures where it was measured; why not, or how much of it where cut off."""
    lines = []
    for row in rows:
        measured = row["status"] == "ok"
        found = cells(row, figures) if measured else [""] * len(figures)
        lines.append([*cells(row, names), *found, coverage_text(row) if measured else text("{status}: {reason}", row)])
    return table([*names, *figures, ""], lines)
