"""The log of a run: means of values that stay on the device until a row is due, and what is said and written of it."""

import logging
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from launch.training.wandb_writer import WandbWriter
from launch.training.watch import in_short
from launch.training.writers import JsonLinesWriter, Row, TensorBoardWriter, Writer

logger = logging.getLogger(__name__)

CHECK_SECONDS = 10.0  # between looks at whether the run's directory is still there


class Meter:
    """Means of device scalars since the last reading, over micro-batches, steps and processes; of integers the sums.

    Non-finite values are left out: they belong to steps that were skipped, and those are counted elsewhere.
    """

    def __init__(self):
        self._sums: dict[str, torch.Tensor] = {}  # name → [weighted sum of finite values, sum of their weights]
        self._counts: set[str] = set()  # names of integers

    def add(self, values: dict[str, torch.Tensor], weight: float = 1.0) -> None:
        """Add one micro-batch's values; nothing is copied to the host.

        values: scalars, or one number for each sample that has it (`[B]`, NaN for the others).
        weight: of the micro-batch in a mean, such as its part of a step; integers have none.
        """
        for name, value in values.items():
            if not value.is_floating_point():
                self._counts.add(name)
            counted = 1.0 if name in self._counts else weight
            value = value.detach().double()
            finite = torch.isfinite(value)
            entry = counted * torch.stack([torch.where(finite, value, 0.0), finite.double()])
            if value.ndim:
                entry = entry.sum(1)
            self._sums[name] = self._sums[name] + entry if name in self._sums else entry

    def read(self) -> dict[str, float | None]:
        """Means and sums over all processes, one copy to the host, and start anew; None where nothing was finite.

        Every process must call it.
        """
        if not self._sums:
            return {}
        sums = torch.stack(list(self._sums.values()))
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(sums)
        row = {}
        for name, (total, count) in zip(self._sums, sums.tolist(), strict=True):
            row[name] = int(total) if name in self._counts else total / count if count else None
        self._sums = {}
        return row

    def state_dict(self) -> dict:
        """The sums of this process since the last reading, exact, for a checkpoint."""
        sums = torch.stack(list(self._sums.values())).tolist() if self._sums else []
        return {"sums": dict(zip(self._sums, sums, strict=True)), "counts": sorted(self._counts & self._sums.keys())}

    def load_state_dicts(self, states: Sequence[dict], rank: int, world_size: int, device: torch.device) -> None:
        """Take back what the processes of a run had added; of another number of them, the first process takes all."""
        names = states[0]["sums"]
        self._counts = set(names) & set(states[0]["counts"])
        sums = [[state["sums"][name] for name in names] for state in states]
        parts = torch.tensor(sums, dtype=torch.float64, device=device).view(len(states), len(names), 2)
        if len(states) != world_size:
            parts = torch.cat([parts.sum(0, keepdim=True), parts.new_zeros(world_size - 1, *parts.shape[1:])])
        self._sums = dict(zip(names, parts[rank], strict=True))


class RunLog:
    """Rows, events and pictures of a run: to its writers, and a line for each to the screen.

    Rows and events of `metrics.jsonl` after `step` are cut: they belong to steps that a run resuming from that
    checkpoint makes again. Raises WriteError, naming the file, where one in the run's directory cannot be written.

    Args:
        tensorboard: whether TensorBoard's files are written.
        wandb: the project of Weights & Biases, or None.
        run: the run file, for wandb.
    """

    def __init__(
        self,
        directory: Path,
        step: int,
        last_step: int,
        *,
        tensorboard: bool = True,
        wandb: str | None = None,
        run: Mapping[str, Any] | None = None,
    ):
        self._directory, self.path = directory, directory / "metrics.jsonl"
        lines = JsonLinesWriter(self.path, step)
        self._file = lines.file
        self._writers: list[Writer] = [lines]
        if tensorboard:
            self._writers.append(TensorBoardWriter(directory / "tensorboard", step + 1))
        if wandb is not None:
            self._writers.append(WandbWriter(directory, wandb, _name(directory, run), run or {}))
        self._next_check = time.monotonic() + CHECK_SECONDS
        self._bar = tqdm(total=last_step, initial=step, unit="step", disable=not sys.stderr.isatty(), leave=False)

    def step(self) -> None:
        """Count a step, and `check` once in a while: rows may be far apart."""
        self._bar.update()
        if (now := time.monotonic()) >= self._next_check:
            self._next_check = now + CHECK_SECONDS
            self.check()

    def write_row(self, row: Row) -> None:
        """Write the values of a step, `row["step"]`."""
        for writer in self._writers:
            writer.write_row(row)
        self._print(describe(row))

    def write_event(self, event: Row) -> None:
        """Write what happened at a step, `event["step"]`, with the time; `event["event"]` is its kind."""
        event = {**event, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        for writer in self._writers:
            writer.write_event(event)
        self._print(describe_event(event))

    def write_picture(self, name: str, step: int, draw: Callable[[Path], None]) -> None:
        """Have the PNG `<name>/step_<step>.png` of the run's directory drawn, and hand it to the writers."""
        path = self._directory / name / f"step_{step:07d}.png"
        draw(path)
        for writer in self._writers:
            writer.write_picture(name, step, path)

    def warn(self, text: str) -> None:
        """Log a warning without breaking into the progress bar."""
        with self._bar.external_write_mode():
            logger.warning("%s", text)

    def _print(self, text: str) -> None:
        with self._bar.external_write_mode():
            print(text, flush=True)

    def check(self) -> None:
        """Raise WriteError where the run's directory is no longer in its place: a checkpoint would make another."""
        self._file.check()

    def close(self) -> None:
        self._bar.close()
        for writer in self._writers:
            writer.close()


def _name(directory: Path, run: Mapping[str, Any] | None) -> str:
    return (run or {}).get("train", {}).get("exp_name") or directory.name


#: Keys of a row that its line says in its head and tail, or not at all.
_UNSAID = {"step", "last_step", "epoch", "images", "global_batch_size", "seconds_per_step", "hours", "wall_hours"}
_OF_EVENTS = {"step", "event", "time"}
#: What is measured of single blocks, and losses by time: too many for a line.
_DETAILS = re.compile(r".*/loss_t\d")
_SHORT = {"grad_norm": "grad", "cos_loss": "cos"}
#: Key → how it is said, behind the values; nothing where it is None.
_FIGURES: dict[str, Callable[[float], str]] = {
    "images_per_second": lambda rate: f"{_format_value(rate)} img/s",
    "mfu": lambda share: f"MFU {share:.1%}",
    "data_wait": lambda share: f"data wait {share:.1%}",
    "memory_gb": lambda peak: f"{peak:.1f} GB",
    "ahead_hours": lambda hours: f"{_format_duration(abs(3600 * hours))} {'behind' if hours < 0 else 'ahead'}",
    "eta_seconds": lambda seconds: f"eta {_format_duration(seconds)}",
}


def describe(row: Row) -> str:
    """One line for a person: step, epoch, images, global batch, what was measured, how fast, the time left."""
    head = f"step {row['step']:>7,}/{row['last_step']:,}  epoch {row['epoch']:.2f}  images {row['images']:,}"
    head += f"  (batch {row['global_batch_size']})"
    counts = {name for name in ("skipped", "loss_spikes") if not row.get(name)}
    values = [
        f"{_short(name)} {_format_value(value)}"
        for name, value in in_short(row).items()
        if name not in _UNSAID | _FIGURES.keys() | counts and not _DETAILS.match(name)
    ]
    figures = [say(row[name]) for name, say in _FIGURES.items() if row.get(name) is not None]
    return "  ".join([head, *values, *figures])


def describe_event(event: Row) -> str:
    """One line for a person: step, what happened, and the rest of what is known of it."""
    rest = (f"{name} {_format_value(value)}" for name, value in event.items() if name not in _OF_EVENTS)
    return "  ".join([f"step {event['step']:>7,}  {event['event']}", *rest])


def _short(name: str) -> str:
    group, slash, last = name.rpartition("/")
    return f"{group}{slash}{_SHORT.get(last, last)}"


def _format_value(value: Any) -> str:
    if value is None:
        return "not finite"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _format_duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
