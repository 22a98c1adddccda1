"""Tables as text: Markdown that is aligned for a terminal too, and plain columns that fit one."""

from collections.abc import Sequence
from unicodedata import combining, east_asian_width

from common.text import printable

Rows = Sequence[Sequence[str]]


def markdown(head: Sequence[str], rows: Rows, *, left: int = 1) -> str:
    """A Markdown table with columns of equal width, the first `left` of them aligned to the left."""
    cells = [[_escaped(cell) for cell in row] for row in (head, *rows)]
    widths = [max(3, *map(width, column)) for column in zip(*cells, strict=True)]
    lines = [f"| {' | '.join(_aligned(row, widths, left))} |" for row in cells]
    rule = [f"{'-' * (w - 1)}:" if i >= left else "-" * w for i, w in enumerate(widths)]
    return "\n".join([lines[0], f"| {' | '.join(rule)} |", *lines[1:]])


def columns(head: Sequence[str], rows: Rows, *, left: int = 1, gap: str = "  ") -> list[str]:
    """Lines of plain columns, the first `left` of them aligned to the left."""
    cells = [[printable(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(width, column)) for column in zip(*cells, strict=True)]
    return [gap.join(_aligned(row, widths, left)).rstrip() for row in cells]


def width(text: str) -> int:
    """Columns that a text takes in a terminal."""
    return sum(0 if combining(c) else 2 if east_asian_width(c) in "WF" else 1 for c in text)


def cut(text: str, limit: int) -> str:
    """`text` in at most `limit` columns, its beginning left out where it is longer."""
    if width(text) <= limit:
        return text
    while text and width(text) > limit - 1:
        text = text[1:]
    return f"…{text}"


def _aligned(row: Sequence[str], widths: Sequence[int], left: int) -> list[str]:
    spaces = [" " * (w - width(cell)) for cell, w in zip(row, widths, strict=True)]
    return [cell + s if i < left else s + cell for i, (cell, s) in enumerate(zip(row, spaces, strict=True))]


def _escaped(cell: str) -> str:
    return printable(cell).replace("|", "\\|")
