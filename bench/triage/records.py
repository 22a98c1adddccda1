"""The rows of a triage, later ones in the place of earlier ones with the same names, and comparisons between steps."""

from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from bench.measure.losses import wrong_losses
from bench.measure.rows import MACHINE, Key, Row, complete, key, line, parse
from bench.triage.verdicts import SKIPPED
from common.files import write_text


class Records:
    """`rows` are those of the file, earlier runs' too, without those that a later one has replaced.

    `facts` are those of the machine, from the first row that has them: this process has no torch to ask.
    """

    def __init__(self, path: Path):
        self._path = path
        self.facts: Row = {}
        self._rows: dict[Key, Row] = {key(row): row for row in read_rows(path)}

    @property
    def rows(self) -> list[Row]:
        return list(self._rows.values())

    def learn(self, facts: Row) -> None:
        """Take the facts of the machine from a row that has them."""
        if not self.facts and facts.get("device"):
            self.facts = {name: facts.get(name) for name in MACHINE}

    def add(self, row: Row) -> Row:
        """Keep and write a row at once, completed by what all rows of the run say.

        A skipped task does not take the place of a verdict that an earlier run came to.
        """
        self.learn(row)
        full = complete(row, dict.fromkeys(MACHINE) | self.facts)
        known = self._rows.get(key(full), {})
        if full.get("verdict") == SKIPPED and known.get("verdict", SKIPPED) != SKIPPED:
            return full
        self._rows[key(full)] = full
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line(full))
        return full

    def settle(self) -> None:
        """Write the file anew: one row of each name, with the facts of the machine that came after it."""
        for row in self._rows.values():
            if "device" in row and row["device"] is None:
                row.update(self.facts)
        write_text(self._path, "".join(map(line, self._rows.values())))

    def of(self, kind: str) -> list[Row]:
        return [row for row in self._rows.values() if row["kind"] == kind]


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, as far as its lines are whole; none if there is no file."""
    if not path.exists():
        return []
    found = []
    for text in path.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):  # cut off, or of another format
            found.append(parse(text))
    return found


def compare_steps(rows: Iterable[Row]) -> list[Row]:
    """Rows of steps that change when they are compared: wrong first losses, and ratios of times.

    Each step was timed in a process of its own. Only steps of the same model, batch and objective on the same machine
    are compared: others see other latents, and times of other images.
    """
    groups: dict[tuple, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        if row["status"] == "ok":
            objective = row.get("features", {}).get("objective", "flow")
            groups[row["model"], row["batch"], objective, row["gpu"], row["revision"]][row["variant"]] = row
    changed = []
    for steps in groups.values():
        wrong = wrong_losses({name: row.get("loss") for name, row in steps.items()})
        right = {name: row for name, row in steps.items() if name not in wrong}
        for name, row in steps.items():
            ratios = {other: there["p50_ms"] / row["p50_ms"] for other, there in right.items() if other != name}
            if name in wrong:
                changed.append(row | {"status": "incorrect", "reason": wrong[name], "times_faster_than": {}})
            elif ratios != row["times_faster_than"]:
                changed.append(row | {"times_faster_than": ratios})
    return changed
