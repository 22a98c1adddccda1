"""Where the rows, events and pictures of a run go, behind one interface: JSON lines, TensorBoard, wandb."""

import itertools
import json
import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.text.metadata import create_summary_metadata
from tensorboard.summary.writer.record_writer import RecordWriter

from common.files import WriteError, atomic_write, make_directory, write_error

Row = Mapping[str, Any]  # with a "step"


class Writer(Protocol):
    """One place where a run's log goes. A row and an event have a `step`, an event its kind in `event`."""

    def write_row(self, row: Row) -> None:
        """Values of a step: numbers, or None where nothing was finite."""

    def write_event(self, event: Row) -> None:
        """Something that happened to the run, such as a resume."""

    def write_picture(self, name: str, step: int, path: Path) -> None:
        """A picture of a step, in a PNG file."""

    def close(self) -> None:
        """Nothing more is written."""


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


class JsonLinesWriter:
    """Rows and events in the order they come, one a line; of pictures their own files speak.

    Lines of later steps than `step` are cut first: a run that resumes from there makes those steps again.
    """

    def __init__(self, path: Path, step: int):
        make_directory(path.parent)
        truncate_rows(path, step)
        self.file = AppendOnlyFile(path, "a")

    def write_row(self, row: Row) -> None:
        self.file.write(f"{json.dumps(row)}\n".encode())

    write_event = write_row

    def write_picture(self, name: str, step: int, path: Path) -> None:
        pass

    def close(self) -> None:
        self.file.close()


def truncate_rows(path: Path, step: int) -> None:
    """Drop lines of later steps, and a last line that a kill has cut short, from a JSON-lines file."""
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


class TensorBoardWriter:
    """Scalars, texts and images in TensorBoard's format, each written before the call returns.

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

    def write_row(self, row: Row) -> None:
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in numbers(row).items()]
        self._add(Event(step=row["step"], summary=Summary(value=scalars)))

    def write_event(self, event: Row) -> None:
        text = TensorProto(dtype=DT_STRING, tensor_shape=TensorShapeProto(), string_val=[json.dumps(event).encode()])
        tag = f"events/{event['event']}"
        metadata = create_summary_metadata(display_name=tag, description="")
        value = Summary.Value(tag=tag, metadata=metadata, tensor=text)
        self._add(Event(step=event["step"], summary=Summary(value=[value])))

    def write_picture(self, name: str, step: int, path: Path) -> None:
        png = path.read_bytes()
        width, height = struct.unpack(">II", png[16:24])  # of the IHDR chunk, always the first (PNG, section 11.2.1)
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
        self._add(Event(step=step, summary=Summary(value=[Summary.Value(tag=name, image=image)])))

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())

    def close(self) -> None:
        self._records.close()


def numbers(row: Row) -> dict[str, int | float]:
    """The numbers of a row but its step."""
    return {name: value for name, value in row.items() if isinstance(value, int | float) and name != "step"}
