"""The rows of a triage: added as they come, later ones in the place of earlier ones with the same names."""

import json
import os
from pathlib import Path

from bench.measure.rows import FORMAT, NAMES, Key, Row, key, now
from bench.triage.verdicts import SKIPPED

#: What all rows of a run say of the machine.
FACTS = ("device", "gpu", "capability", "driver", "python", "torch", "cuda", "triton", "revision")


class Records:
    """`rows` are those of the file, earlier runs' too, without those that a later one has replaced.

    `facts` are those of the machine, from the first row that has them: whoever writes verdicts has no torch to ask.
    """

    def __init__(self, path: Path):
        self._path = path
        self.facts: Row = {}
        self._rows: dict[Key, Row] = {_name(row): row for row in read_rows(path)}

    @property
    def rows(self) -> list[Row]:
        return list(self._rows.values())

    def learn(self, facts: Row) -> None:
        """Take the facts of the machine from what has them."""
        if not self.facts and facts.get("device"):
            self.facts = {name: facts.get(name) for name in FACTS}

    def add(self, row: Row) -> Row:
        """Keep and write a row at once, completed by what all rows of the run say.

        What was skipped says nothing: it does not take the place of a verdict that an earlier run came to.
        """
        self.learn(row)
        full = {"format": FORMAT, "kind": row["kind"], "date": now(), **self._facts(), **row}
        known = self._rows.get(_name(full), {})
        if full.get("verdict") == SKIPPED and known.get("verdict", SKIPPED) != SKIPPED:
            return full
        self._rows[_name(full)] = full
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line(full))
        return full

    def settle(self) -> None:
        """Write the file anew: one row of each name, with the facts of the machine that came after it."""
        lines = []
        for row in self._rows.values():
            if "device" in row and row["device"] is None:
                row.update(self._facts())
            lines.append(_line(row))
        partial = self._path.with_suffix(".partial")
        partial.write_text("".join(lines), encoding="utf-8")
        os.replace(partial, self._path)

    def of(self, kind: str) -> list[Row]:
        return [row for row in self._rows.values() if row["kind"] == kind]

    def _facts(self) -> Row:
        return self.facts or dict.fromkeys(FACTS)


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, as far as its lines are whole; none if there is no file."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # cut off
            continue
        if isinstance(row, dict) and row.get("format") == FORMAT and "kind" in row:
            found.append(row)
    return found


def _name(row: Row) -> Key:
    if row["kind"] == "triage":
        return "triage", row["part"], row["name"]
    return key(row) if row["kind"] in NAMES else (row["kind"], _line(row))


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
