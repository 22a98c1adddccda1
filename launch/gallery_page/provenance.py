"""Where runs come from: state, versions, hashes, seeds, hours, events of their logs; which backend served each op."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.files import FileError
from launch.gallery_page.configs import shown
from launch.run_directory.checkpoints import CheckpointList, list_checkpoints, stored_state
from launch.run_directory.find import CHECKPOINTS
from launch.run_directory.rows import NAME, RunRows, number, read_rows
from launch.run_directory.summary import RunSummary, summarize
from launch.status import remarks

MOST_EVENTS = 200
#: Entries of a checkpoint's state that have a row of their own, or a section elsewhere on the page.
_ELSEWHERE = frozenset(
    [
        "kind",
        "step",
        "last_step",
        "epoch",
        "images",
        "counters",
        "task",
        "ops",
        "config",
        "versions",
        "since_last_row",
        "losses",
        "redrawn",
        "hours",
        "gpu_hours",
        "started",
    ]
)
_OF_EVENTS = ("step", "event", "time")


@dataclass(frozen=True)
class RunOnPage:
    """A run as it was read: its rows, where it stands, its checkpoints, the state in the newest whole one."""

    path: Path
    rows: RunRows
    summary: RunSummary
    checkpoints: CheckpointList
    state: Mapping[str, Any]


def read_run(path: Path, left_out: dict[Path, str]) -> RunOnPage:
    """Read a run's directory; of what cannot be read `left_out` tells."""
    try:
        rows = read_rows(path / NAME)
    except FileError as e:
        rows = RunRows([], [], [])
        left_out[path / NAME] = str(e).removeprefix(f"cannot read {path / NAME}: ")
    if rows.unreadable:
        left_out[path / NAME] = f"{rows.unreadable:,} of its lines cannot be read"
    checkpoints = list_checkpoints(path / CHECKPOINTS)
    left_out |= {path / CHECKPOINTS / name: why for name, why in checkpoints.damaged}
    state = stored_state(checkpoints) or {}
    if not state.get("config"):
        left_out.setdefault(
            path / CHECKPOINTS, "holds no whole checkpoint, which would tell the run's settings and ops"
        )
    return RunOnPage(path, rows, summarize(path), checkpoints, state)


def data_time(run: RunOnPage) -> float | None:
    """When the newest row of a run was written, in Unix time, as its log tells; None where it does not."""
    started = number(run.state.get("started"))
    walls = [number(row.get("wall_hours")) for row in run.rows.training]
    known = [started + 3600 * wall for wall in walls[-1:]] + [_event_time(event) for event in run.rows.events]
    return max((time for time in known if not math.isnan(time)), default=None)


def _event_time(event: Mapping[str, Any]) -> float:
    try:
        return datetime.fromisoformat(str(event.get("time"))).timestamp()
    except (ValueError, OverflowError, OSError):
        return math.nan


def as_date(time: float | None) -> str:
    """A Unix time as a date and minute of UTC."""
    if time is None or not 0 <= time < 2**40:
        return ""
    try:
        return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (ValueError, OverflowError, OSError):
        return ""


def facts_table(runs: Mapping[str, RunOnPage]) -> dict[str, Any]:
    """A row for each fact, a column for each run."""
    by_run = [_facts(run) for run in runs.values()]
    keys = dict.fromkeys(key for facts in by_run for key in facts)
    rows = [[key, *(facts.get(key, "–") for facts in by_run)] for key in keys]
    return {"head": ["", *runs], "rows": rows}


def _facts(run: RunOnPage) -> dict[str, str]:
    summary, state = run.summary, run.state
    last = run.rows.training[-1] if run.rows.training else {}
    facts: dict[str, Any] = {
        "kind": summary.kind,
        "state": summary.state,
        "step": None if summary.step is None else _of(summary.step, summary.last_step),
        "epoch": None if summary.epoch is None else f"{summary.epoch:.2f}",
        "images": _count(last.get("images")),
        "hours of training": _hours(last.get("hours", state.get("hours"))),
        "hours on the clock": _hours(last.get("wall_hours")),
        "GPU hours": _hours(state.get("gpu_hours")),
        "started": as_date(state.get("started")),
        "newest row": as_date(data_time(run)),
    }
    facts |= {key: shown(value) for key, value in state.items() if key not in _ELSEWHERE and _plain(value)}
    facts |= {f"version of {name}": str(version) for name, version in (state.get("versions") or {}).items()}
    facts |= _hashes(run.checkpoints)
    facts["remarks"] = "; ".join(remarks(summary))
    return {key: value for key, value in facts.items() if value}


def _plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool)


def _of(step: int, last: int | None) -> str:
    return f"{step:,}" if last is None else f"{step:,} of {last:,}"


def _count(value: Any) -> str | None:
    return None if math.isnan(number(value)) else f"{number(value):,.0f}"


def _hours(value: Any) -> str | None:
    return None if math.isnan(found := number(value)) else f"{found:.3g}"


def _hashes(checkpoints: CheckpointList) -> dict[str, str]:
    """SHA-256 of the files of the newest whole checkpoint that samples are made of, as its manifest says."""
    if (newest := checkpoints.newest) is None:
        return {}
    wanted = (".model.safetensors", ".ema.safetensors")
    files = {name: entry for name, entry in newest.manifest.files.items() if name.endswith(wanted)}
    return {f"SHA-256 of {name}": entry.sha256 for name, entry in files.items()} | {
        "newest whole checkpoint": newest.path.name
    }


def ops_table(runs: Mapping[str, RunOnPage]) -> dict[str, Any] | None:
    """Op → the backend that served it in each run, and why; None where no checkpoint tells."""
    tables = [run.state.get("ops") or {} for run in runs.values()]
    names = dict.fromkeys(name for table in tables for name in table)
    rows = [[name, *(_backend(table.get(name)) for table in tables)] for name in names]
    return {"head": ["op", *runs], "rows": rows} if rows else None


def _backend(entry: Any) -> dict[str, str]:
    """What is known of an op: `{"backend", "reason"}`; of earlier versions a name alone."""
    if isinstance(entry, Mapping):
        return {"backend": str(entry.get("backend", "–")), "reason": str(entry.get("reason", ""))}
    return {"backend": "–" if entry is None else str(entry), "reason": ""}


def events(run: RunOnPage) -> dict[str, Any]:
    """The last events of a run's log but saves, and how many saves there were."""
    saves = [event for event in run.rows.events if event["event"] == "saved"]
    others: Sequence[Mapping[str, Any]] = [event for event in run.rows.events if event["event"] != "saved"]
    rows = []
    for event in others[-MOST_EVENTS:]:
        rest = ", ".join(f"{key} {shown(value)}" for key, value in event.items() if key not in _OF_EVENTS)
        rows.append([as_date(_event_time(event)), f"{event['step']:,}", str(event["event"]), rest])
    return {"rows": rows, "saves": len(saves), "older": max(len(others) - MOST_EVENTS, 0)}
