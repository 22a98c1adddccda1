"""The log of a run: JSON lines, TensorBoard, a progress bar. Values stay on the device until a row is due."""

import itertools
import json
import logging
import os
import socket
import struct
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from tqdm import tqdm

from common.files import WriteError, atomic_write, make_directory, write_error
from launch.training.watch import in_short

logger = logging.getLogger(__name__)


class Meter:
    """Means of device scalars since the last reading, over micro-batches, steps and processes; of integers the sums.

    Non-finite values are left out: they belong to steps that were skipped, and those are counted elsewhere.
    """

    def __init__(self):
        self._sums: dict[str, torch.Tensor] = {}  # name → [weighted sum of finite values, sum of their weights]
        self._counts: set[str] = set()  # names of integers

    def add(self, values: dict[str, torch.Tensor], weight: float = 1.0) -> None:
        """Add one micro-batch's scalars; nothing is copied to the host.

        weight: of the micro-batch in a mean, such as its part of a step; integers have none.
        """
        for name, value in values.items():
            if not value.is_floating_point():
                self._counts.add(name)
            counted = 1.0 if name in self._counts else weight
            value = value.detach().double()
            finite = torch.isfinite(value)
            entry = counted * torch.stack([torch.where(finite, value, torch.zeros_like(value)), finite.double()])
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


class Throughput:
    """Images per second since the last reading, and the time left. `now` gives seconds."""

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self._now = now
        self._time, self._step = now(), 0

    def start(self, step: int) -> None:
        """Begin to measure after `step`: what came before, such as saving, does not count."""
        self._time, self._step = self._now(), step

    def read(self, step: int, last_step: int, global_batch_size: int) -> dict[str, float]:
        """Rates over the steps since `start` or the last reading."""
        now = self._now()
        per_step = (now - self._time) / max(step - self._step, 1)
        self._time, self._step = now, step
        return {
            "images_per_second": global_batch_size / per_step,
            "seconds_per_step": per_step,
            "eta_seconds": per_step * (last_step - step),
        }


class AppendOnlyFile:
    """An unbuffered file that is only appended to; `mode`: "a", or "x" for a new one.

    Raises WriteError, naming the file, where a write fails or the file is gone from its path, as after the removal
    of the run's directory.
    """

    def __init__(self, path: Path, mode: str):
        self.path = path
        try:
            self._file = open(path, f"{mode}b", buffering=0)  # noqa: SIM115 — closed by close()
        except OSError as e:
            raise write_error(path, e) from None

    def write(self, content: bytes) -> None:
        try:
            while content:  # a disk that is nearly full takes a part
                content = content[self._file.write(content) :]
        except OSError as e:
            raise write_error(self.path, e) from None
        self.check()

    def check(self) -> None:
        """Raise WriteError where the file is no longer in its place."""
        try:
            there = os.path.samestat(os.stat(self.path), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            there = False
        except OSError as e:
            raise write_error(self.path, e) from None
        if not there:
            raise WriteError(f"{self.path} is gone: something removed or replaced it while it was written to")

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        self._file.close()


class TensorBoardWriter:
    """Scalars in TensorBoard's format, each written before `write_row` returns.

    torch's SummaryWriter writes them in a thread, whose errors nobody sees.
    """

    def __init__(self, directory: Path, first_step: int):
        make_directory(directory)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        taken = (directory / f"{name}.{number}" for number in itertools.count())
        self._records = RecordWriter(AppendOnlyFile(next(path for path in taken if not path.exists()), "x"))
        self._add(Event(file_version="brain.Event:2"))
        # TensorBoard drops what an earlier start wrote from this step on.
        self._add(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def write_row(self, row: dict) -> None:
        values = [(k, v) for k, v in row.items() if isinstance(v, int | float) and k != "step"]
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values]
        self._add(Event(step=row["step"], summary=Summary(value=scalars)))

    def write_picture(self, name: str, step: int, png: bytes) -> None:
        width, height = struct.unpack(">II", png[16:24])  # of the IHDR chunk, always the first (PNG, section 11.2.1)
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
        self._add(Event(step=step, summary=Summary(value=[Summary.Value(tag=name, image=image)])))

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())

    def close(self) -> None:
        self._records.close()


class RunLog:
    """Rows and pictures of a run in its directory and TensorBoard, and a progress bar where a person is watching.

    Rows of `metrics.jsonl` after `step` are cut: they belong to steps that a run resuming from that checkpoint makes
    again. Raises WriteError, naming the file, where one of them cannot be written.
    """

    def __init__(self, directory: Path, step: int, last_step: int, *, tensorboard: bool = True):
        make_directory(directory)
        self._directory, self.path = directory, directory / "metrics.jsonl"
        truncate_rows(self.path, step)
        self._file = AppendOnlyFile(self.path, "a")
        self._board = TensorBoardWriter(directory / "tensorboard", step + 1) if tensorboard else None
        self._bar = tqdm(total=last_step, initial=step, unit="step", disable=not sys.stderr.isatty(), leave=False)

    def step(self) -> None:
        self._bar.update()

    def write_row(self, row: dict) -> None:
        """Write one row; the numbers of it go to TensorBoard at `row["step"]`."""
        self._file.write(f"{json.dumps(row)}\n".encode())
        if self._board is not None:
            self._board.write_row(row)
        with self._bar.external_write_mode():
            print(describe(row), flush=True)

    def write_event(self, event: dict) -> None:
        """Write a row that says what happened after `event["step"]`: `event["event"]`."""
        self._file.write(f"{json.dumps(event)}\n".encode())

    def write_picture(self, name: str, step: int, draw: Callable[[Path], None]) -> None:
        """Have the PNG `<name>/step_<step>.png` of the run's directory drawn, and show it in TensorBoard too."""
        path = self._directory / name / f"step_{step:07d}.png"
        draw(path)
        if self._board is not None:
            self._board.write_picture(name, step, path.read_bytes())

    def warn(self, text: str) -> None:
        """Log a warning without breaking into the progress bar."""
        with self._bar.external_write_mode():
            logger.warning("%s", text)

    def check(self) -> None:
        """Raise WriteError where the run's directory is no longer in its place: a checkpoint would make another."""
        self._file.check()

    def close(self) -> None:
        self._file.close()
        self._bar.close()
        if self._board is not None:
            self._board.close()


def describe(row: dict) -> str:
    """One line for a person: step, epoch, images, global batch, then what was measured."""
    head = f"step {row['step']:>7,}/{row['last_step']:,}  epoch {row['epoch']:.2f}  images {row['images']:,}"
    head += f"  (batch {row['global_batch_size']})"
    told = {"step", "last_step", "epoch", "images", "global_batch_size", "seconds_per_step", "eta_seconds"}
    told |= {"skipped"} if not row.get("skipped") else set()
    values = (f"{name} {_format_value(value)}" for name, value in in_short(row).items() if name not in told)
    return f"{head}  {'  '.join(values)}  eta {_format_duration(row['eta_seconds'])}"


def truncate_rows(path: Path, step: int) -> None:
    """Drop rows of later steps, and a last line that a kill has cut short, from a JSON-lines file."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if 0 <= _row_step(line) <= step]
    if len(kept) < len(lines):
        with atomic_write(path) as f:
            f.writelines(kept)


def _row_step(line: bytes) -> int:
    """The step of a row; −1 where the line is cut short or none."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else -1
    except (ValueError, KeyError, TypeError):
        return -1


def _format_value(value) -> str:
    if value is None:
        return "not finite"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _format_duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
