"""`metrics.jsonl` of a run: rows of training and validation, and events, of any version and cut off anywhere."""

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from common.files import FileError, open_regular, path_exists

NAME = "metrics.jsonl"
#: What keys of figures of samples begin with.
SAMPLES = "samples/"
#: What a row says beside measured values.
POSITION = ("step", "last_step", "epoch", "images", "global_batch_size")
Row = dict[str, Any]
_MOST = 2**62  # steps; a line that says more is damaged, and no array would hold it


@dataclass(frozen=True)
class RunRows:
    """The rows of a run, each list in the order of its steps.

    Fields:
        training: means over the steps since the row before; steps ascend.
        validation: rows with `valid…/` keys.
        samples: rows with `samples/` keys, figures of samples.
        events: rows with an `event`, such as "resumed", in the order they were written.
        unreadable: lines that are no JSON object with a step; a last line that a kill or a copy cut short is none.
    """

    training: list[Row]
    validation: list[Row]
    events: list[Row]
    samples: list[Row] = field(default_factory=list)
    unreadable: int = 0

    @property
    def last(self) -> Row | None:
        """The row of the highest step, of training if there is one."""
        rows = self.training or self.validation
        return rows[-1] if rows else None

    def hours(self) -> np.ndarray:
        """Hours of training at each row of training, float64 `[rows]`, NaN from where they are not known.

        As the rows say (`hours`); rows of earlier versions tell the seconds of each step, which do not count saves
        and validation.
        """
        total, before, found = 0.0, None, []
        for step, row in zip([0, *(r["step"] for r in self.training)], self.training, strict=False):
            own, seconds = number(row.get("hours")), number(row.get("seconds_per_step"))
            if own >= (total if before is None else before):
                total = own if before is None else total + own - before
            else:  # unknown, or begun anew by a version that went on from rows of an earlier one
                total += seconds * (row["step"] - step) / 3600
            before = None if math.isnan(own) else own
            found.append(total)
        return np.array(found, dtype=np.float64)

    def hours_at(self, steps: np.ndarray) -> np.ndarray:
        """Hours of training at some steps, float64 `[steps]`: those of the last row of training up to each; NaN where
        there is none at all."""
        if not self.training:
            return np.full(len(steps), math.nan)
        before = np.searchsorted(self.steps(), steps, side="right") - 1
        return np.where(before >= 0, self.hours()[np.maximum(before, 0)], 0.0)

    def of(self, key: str) -> list[Row]:
        """The rows, of training, validation or samples, that have a value; those of training where none has."""
        kinds = (self.training, self.validation, self.samples)
        return next((rows for rows in kinds if any(key in row for row in rows)), self.training)

    def series(self, key: str) -> np.ndarray:
        """A value of each row of training, float64 `[rows]`; NaN where a row has no such number."""
        return np.array([number(row.get(key)) for row in self.training], dtype=np.float64)

    def steps(self) -> np.ndarray:
        """The step of each row of training, int64 `[rows]`."""
        return np.array([row["step"] for row in self.training], dtype=np.int64)


def number(value: Any) -> float:
    """A row's value as a float; NaN for what is no finite number."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else math.nan


def read_rows(path: Path) -> RunRows:
    """The rows of a JSON-lines log; no file has none. Raises FileError, naming it, where it cannot be read.

    Where a step comes again, as after a resume of an earlier version, the later row counts, and rows of later steps
    that stand before it belong to what was made again.
    """
    if not path_exists(path):
        return RunRows([], [], [])
    try:
        with open_regular(path) as f:
            lines = f.readlines()
    except OSError as e:
        raise FileError(f"cannot read {path}: {e.strerror or e}") from None
    found, unreadable = RunRows([], [], []), 0
    for number_of_line, line in enumerate(lines, 1):
        row = _parse(line)
        if row is None:
            unreadable += number_of_line < len(lines) or line.endswith(b"\n")
        elif "event" in row:
            found.events.append(row)
        else:
            kept = getattr(found, _kind(row))
            while kept and kept[-1]["step"] >= row["step"]:
                kept.pop()
            kept.append(row)
    return replace(found, unreadable=unreadable)


def _parse(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return row if isinstance(step, int) and not isinstance(step, bool) and 0 <= step < _MOST else None


def _kind(row: Row) -> str:
    """The list that a row belongs to."""
    if "lr" in row:
        return "training"
    if any(key.startswith(SAMPLES) for key in row):
        return "samples"
    return "validation" if any(key.startswith(("valid/", "valid_")) for key in row) else "training"
