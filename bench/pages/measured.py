"""The committed rows of one GPU, as tables and pictures ask for them."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import kernels
from bench.gate import baseline, compare
from bench.measure.rows import Row
from bench.ops import OpJob, jobs

HEADLINE = ("LightningDiT-XL/1", 128)
NOT_YET = "not measured yet"


def representative(name: str) -> OpJob:
    """The case and dtype that stand for an op in short tables."""
    return min(jobs([kernels.OPS[name]]), key=lambda job: job.rank)


@dataclass(frozen=True)
class Measured:
    """Rows of one file; `slug` is the file's name, and that of its pictures."""

    slug: str
    rows: tuple[Row, ...]

    @cached_property
    def gpu(self) -> str:
        """Its name; that of the CPU where only loaders were measured."""
        if all(row["device"] == "cpu" for row in self.rows):
            return f"{self.rows[-1]['cpu']}, {self.rows[-1]['cores']} cores"
        return baseline.gpu_of(self.rows)

    @cached_property
    def _by_key(self) -> dict[compare.Key, Row]:
        return {key: compare.typical(rows) for key, rows in compare.grouped(self.rows).items()}

    def of(self, kind: str) -> list[Row]:
        """One row of each name, in the order of names."""
        return [row for key, row in self._by_key.items() if key[0] == kind]

    def numbers(self, kind: str) -> list[Row]:
        """Those of them that have a number."""
        return [row for row in self.of(kind) if row["status"] == "ok"]

    def ordered(self, kind: str, *names: str) -> list[Row]:
        """One row of each name, by these names, those with a number first and the fastest before the others."""

        def place(row: Row) -> tuple:
            return (*(row[name] for name in names), row["status"] != "ok", -(row.get("images_per_second") or 0))

        return sorted(self.of(kind), key=place)

    def step(self, variant: str) -> Row | None:
        """That of the headline model and batch, if it has a number."""
        return next((row for row in self.headline() if row["variant"] == variant), None)

    def headline(self) -> list[Row]:
        """The steps of the headline model, batch and objective that have a number, the fastest first."""
        steps = [
            row
            for row in self.numbers("step")
            if (row["model"], row["batch"]) == HEADLINE and row["features"].get("objective", "flow") == "flow"
        ]
        return sorted(steps, key=lambda row: -row["images_per_second"])

    @cached_property
    def comparisons(self) -> dict[tuple[str, ...], dict[str, Row]]:
        """(op, case, dtype, direction) → provider → row with a number."""
        found: dict[tuple[str, ...], dict[str, Row]] = {}
        for row in self.numbers("op"):
            found.setdefault(compare.key(row)[1:5], {})[row["provider"]] = row
        return found

    def best(self, *comparison: str) -> Row | None:
        """The fastest of our backends in an (op, case, dtype, direction)."""
        rows = [row for row in self.comparisons.get(comparison, {}).values() if compare.mine(row)]
        return min(rows, key=lambda row: row["p50_us"], default=None)

    def representative(self, op: str, direction: str) -> Row | None:
        """The best of ours in the case that stands for an op."""
        names = representative(op).names
        return self.best(op, names["case"], names["dtype"], direction)


def peers(row: Row) -> dict[str, float]:
    """Provider that is not ours → how many times faster this row is, the fastest provider first."""
    others = {
        name: ratio for name, ratio in row["times_faster_than"].items() if not compare.mine(row | {"provider": name})
    }
    return dict(sorted(others.items(), key=lambda item: item[1]))


def tflops(row: Row) -> float:
    return row["flops"] / row["p50_us"] / 1e6


def load(folder: Path) -> list[Measured]:
    """Every committed file of rows in a folder that has any."""
    found = [Measured(path.stem, tuple(baseline.rows_of(path))) for path in sorted(folder.glob("*.jsonl"))]
    return [measured for measured in found if measured.rows]
