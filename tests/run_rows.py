"""The log of a run as tests compare it: rows of values, and events apart."""

import json
from pathlib import Path
from typing import Any

from launch.training.progress import TIMING

Row = dict[str, Any]


def read_lines(directory: Path) -> list[Row]:
    """All lines of a run's `metrics.jsonl`."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def rows(directory: Path) -> list[Row]:
    """The rows of values, without what no two runs share, such as rates."""
    values = (line for line in read_lines(directory) if "event" not in line)
    return [{key: value for key, value in row.items() if key not in TIMING} for row in values]


def events(directory: Path, kind: str) -> list[Row]:
    """The events of a kind, such as `saved`."""
    return [line for line in read_lines(directory) if line.get("event") == kind]
