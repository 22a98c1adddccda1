"""Where one run stands, from what lies in its directory. Nothing is written, and no lock is taken."""

import math
import time
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from common.files import FileError, path_exists, read_json
from launch.run_directory import rows
from launch.run_directory.checkpoints import CheckpointList, list_checkpoints, stored_state
from launch.run_directory.find import CHECKPOINTS, LAST_EXIT
from launch.run_directory.rows import SAMPLES, RunRows, number
from launch.runtime.run_lock import LockState, read_lock

#: Exit statuses of a run that was asked to stop, after a checkpoint: SIGTERM and SIGUSR1, and by signal.
_STOPPED = {75, 128 + 2, 128 + 10, 128 + 15}
_MADE_BEFORE = 60  # seconds by which the log may be younger than the exit that it belongs to


@dataclass(frozen=True)
class RunSummary:
    """One run, ready for JSON: seconds since 1970 for times, None for what is not known.

    Fields:
        state: "running", "finished" (at its last step), "stopped" (asked to, after a checkpoint), "failed" (ended with
            an error), "killed" (its process left without a word), "unknown" (nothing tells, such as on another host).
        process: who holds the lock, or held it last. reason: why it ended, in its own words.
        losses: of the last row of training, and of the last validation. samples: figures of the last samples that were
            measured, and their `step`. updated: when the last row was written.
        checkpoint: step of the newest whole one. damaged: name → why; temporary: what is, or was, being written.
        resumed: "from … at step N" of each time. rollbacks: steps that were gone back from. redrawn: [first, last,
            seed] of steps that were drawn anew. problems: what could not be read.
    """

    path: str
    kind: str | None
    state: str
    process: str | None
    exit_status: int | None
    reason: str | None
    step: int | None
    last_step: int | None
    epoch: float | None
    losses: dict[str, float]
    samples: dict[str, float]
    images_per_second: float | None
    eta_seconds: float | None
    updated: float | None
    ended: float | None
    checkpoint: int | None
    damaged: dict[str, str]
    temporary: list[str]
    resumed: list[str]
    skipped: int
    rollbacks: list[int]
    redrawn: list[Any]
    problems: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def summarize(directory: Path, *, verify: bool = False, now: float | None = None) -> RunSummary:
    """Where a run stands. verify: also compare the checksums of its checkpoints. now: seconds since 1970."""
    now = time.time() if now is None else now
    found, problems = _rows(directory / rows.NAME)
    checkpoints = list_checkpoints(directory / CHECKPOINTS, verify=verify)
    stored, lock = stored_state(checkpoints) or {}, read_lock(directory)
    updated = _modified(directory / rows.NAME)
    exit_, problem = _last_exit(directory / LAST_EXIT)
    problems += [problem] if problem else []
    if exit_ and (_modified(directory / LAST_EXIT) or 0.0) < (updated or 0.0) - _MADE_BEFORE:
        exit_ = None  # of an earlier start
    last = found.last or {}
    step = max([last.get("step", -1), *(each.step for each in checkpoints.whole)])
    last_step = _whole(last.get("last_step", stored.get("last_step")))
    state = _state(lock, exit_, step, last_step)
    running = state in ("running", "unknown")
    eta = number(last.get("eta_seconds")) - (now - updated if updated is not None else 0.0)
    return RunSummary(
        path=str(directory),
        kind=stored.get("kind") or _kind(found),
        state=state,
        process=str(lock.owner) if lock and lock.owner else None,
        exit_status=_whole(exit_.get("status")) if exit_ and not running else None,
        reason=str(exit_["reason"]) if exit_ and not running and exit_.get("reason") else None,
        step=step if step >= 0 else None,
        last_step=last_step,
        epoch=_number(last.get("epoch")),
        losses=_losses(found),
        samples=_samples(found),
        images_per_second=_number(found.training[-1].get("images_per_second")) if found.training else None,
        eta_seconds=max(eta, 0.0) if running and not math.isnan(eta) else None,
        updated=updated,
        ended=None if running else _time_of(exit_, directory) if exit_ else updated,
        checkpoint=checkpoints.newest.step if checkpoints.newest else None,
        damaged=dict(checkpoints.damaged),
        temporary=list(checkpoints.temporary),
        resumed=_resumed(found, stored),
        skipped=_skipped(found, stored),
        rollbacks=[event["step"] for event in found.events if event["event"] == "rollback"],
        redrawn=redrawn if isinstance(redrawn := stored.get("redrawn"), list) else [],
        problems=problems + _unread(found, checkpoints),
    )


def _state(lock: LockState | None, exit_: dict | None, step: int, last_step: int | None) -> str:
    if lock is not None and lock.held is not False:
        return "running" if lock.held else "unknown"
    status = _whole(exit_.get("status")) if exit_ else 0
    if last_step is not None and step >= last_step and status == 0:
        return "finished"
    if lock is not None:
        return "killed"
    return "stopped" if status in {0} | _STOPPED else "failed"


def _rows(path: Path) -> tuple[RunRows, list[str]]:
    try:
        return rows.read_rows(path), []
    except FileError as e:
        return RunRows([], [], []), [str(e)]


def _last_exit(path: Path) -> tuple[dict[str, Any] | None, str | None]:
    """What the last process of the run said when it ended, or why that cannot be read."""
    try:
        content = read_json(path) if path_exists(path) else None
    except (FileError, OSError) as e:
        return None, str(e)
    if content is None or isinstance(content, dict):
        return content, None
    return None, f"{path} holds no JSON object"


def _time_of(exit_: dict[str, Any], directory: Path) -> float:
    """When a process ended, in seconds since 1970: as it says (a number or ISO 8601), else as the file's time says."""
    said = exit_.get("time")
    if not math.isnan(value := number(said)):
        return value
    if isinstance(said, str):
        try:
            return datetime.fromisoformat(said).timestamp()
        except (ValueError, OverflowError, OSError):
            pass
    return _modified(directory / LAST_EXIT) or 0.0


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _kind(found: RunRows) -> str | None:
    last = found.training[-1] if found.training else {}
    return "lightningdit" if "mse" in last else "vavae" if "rec" in last else None


def _losses(found: RunRows) -> dict[str, float]:
    """Losses of the last row of training, and of the last of validation."""
    both = {**(found.training[-1] if found.training else {}), **(found.validation[-1] if found.validation else {})}
    wanted = {"loss", "mse", "rec", "kl"}
    known = {key: _number(value) for key, value in both.items() if key.rpartition("/")[2] in wanted}
    return {key: value for key, value in known.items() if value is not None}


def _samples(found: RunRows) -> dict[str, float]:
    """Figures of the last row of samples, and its step; empty without one."""
    if not found.samples:
        return {}
    last = found.samples[-1]
    figures = {key.removeprefix(SAMPLES): _number(last[key]) for key in last if key.startswith(SAMPLES)}
    return {"step": last["step"]} | {key: value for key, value in figures.items() if value is not None}


def _resumed(found: RunRows, stored: dict[str, Any]) -> list[str]:
    texts = []
    for event in found.events:
        if event["event"] == "resumed":
            source = next((event[key] for key in ("checkpoint", "from", "path", "source") if event.get(key)), None)
            texts.append(f"from {source} at step {event['step']}" if source else f"at step {event['step']}")
    start = (stored.get("config") or {}).get("train", {}).get("ckpt")
    return texts if texts or not start else [f"started from {start} (train.ckpt)"]


def _skipped(found: RunRows, stored: dict[str, Any]) -> int:
    """Steps skipped: by the last row of the log, or by the newest checkpoint where that is all there is."""
    if found.training:
        value = number(found.training[-1].get("skipped"))
        return 0 if math.isnan(value) else int(value)
    return int(sum(number(counters.get("skipped")) for counters in stored.get("counters", {}).values()))


def _unread(found: RunRows, checkpoints: CheckpointList) -> list[str]:
    return [f"{found.unreadable} lines of {rows.NAME} cannot be read"] if found.unreadable else []


def _number(value: Any) -> float | None:
    return None if math.isnan(found := number(value)) else found


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
