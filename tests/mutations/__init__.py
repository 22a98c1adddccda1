"""Realistic mistakes of one line, and the tests that ought to find each: `python -m tests.mutations` plants them.

A file for each package, or for a part of one, holds its part of the one table, `table.MISTAKES`.
"""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Mistake:
    """`old`, found once in `file`, becomes `new`; one of `tests` then fails.

    Fields:
        file: relative to the repository.
        tests: node ids relative to `tests/`, separated by spaces, such as "test_x.py::test_y"; few and short ones.
    """

    file: str
    old: str
    new: str
    tests: str


@dataclass(frozen=True)
class KernelMistake:
    """A mistake in a source of csrc; `test_csrc_mutations.py` plants it in the emulation's library and finds it.

    Fields:
        op: whose cases then fail.
        report: what their error says, if that matters.
    """

    op: str
    file: str
    old: str
    new: str
    report: str | None = None


def mutated(mistake: Mistake | KernelMistake, root: Path = ROOT) -> str:
    """The content of the file below `root` with the mistake in it; raises ValueError where `old` is there not once."""
    text = (root / mistake.file).read_text()
    if text.count(mistake.old) != 1:
        raise ValueError(f"{mistake.file} holds {mistake.old!r} {text.count(mistake.old)} times, not once")
    return text.replace(mistake.old, mistake.new)
