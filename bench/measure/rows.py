"""The row format: a JSON object per line, self-contained, written at once. `bench/README.md` explains the keys.

A run writes a row as soon as there is a measurement, and again when there is a better one: of the rows of one run and
one name the last one counts, and `read` gives no other. Rows of several runs are several measurements.
torch is imported only where a device is asked, so that programs which start measurements and read them need none.
"""

import json
import os
import platform
import subprocess
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

FORMAT = 2
STATUSES = ("ok", "incorrect", "unavailable", "unsupported", "failed")
ROOT = Path(__file__).resolve().parents[2]
Row = dict[str, Any]
Key = tuple
#: Kind of row → what names one. Rows of other kinds are kept in a baseline and not compared.
NAMES = {
    "op": ("op", "case", "dtype", "direction", "provider"),
    "step": ("model", "batch", "variant"),
    "sampling": ("model", "batch", "precision", "provider"),
    "tokenizer": ("part", "precision", "batch", "provider"),
    "gemm": ("model", "batch", "layer", "direction", "provider"),
    "ceiling": ("ceiling",),
    "data": ("provider", "workers", "batch_size"),
    "images": ("provider", "source", "device", "workers", "batch_size"),
    "triage": ("part", "name"),
    "vf_study": ("study", "seed", "use_vf"),
}
#: Keys of `machine`.
MACHINE = ("device", "gpu", "capability", "driver", "python", "torch", "cuda", "triton", "revision")


class Log:
    """Appends rows to a file, if one is given, complete and flushed one by one: a run cut off leaves whole rows."""

    def __init__(self, kind: str, path: Path | None = None):
        """kind: of device, as `bench.measure.timing.Device` says it."""
        self._common = machine(kind) | {"run": uuid.uuid4().hex[:12]}
        self._file = path.open("a", encoding="utf-8") if path else None

    def write(self, row: Row) -> Row:
        """The row together with what all rows of a run say."""
        full = complete(row, self._common)
        if self._file is not None:
            self._file.write(line(full))
            self._file.flush()
        return full


def complete(row: Row, common: Row) -> Row:
    """The row with its format, the date, and what all rows of its run say."""
    return {"format": FORMAT, "kind": row["kind"], "date": now(), **common, **row}


def line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def parse(text: str) -> Row:
    """The row of a line; raises ValueError where it is none of this format."""
    row = json.loads(text)
    if not isinstance(row, dict) or not {"format", "kind"} <= row.keys():
        raise ValueError("it has no format and kind")
    if row["format"] != FORMAT:
        raise ValueError(f"row format {row['format']}, this version reads {FORMAT}")
    return row


def read(path: Path, device: str = "cuda") -> Iterator[Row]:
    """The rows of a file that were measured on that kind of device, without those that their run has replaced.

    Raises:
        ValueError: a line that is no row of this format; names file and line.
    """
    found: dict[Any, Row] = {}
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = parse(text)
            name = (row["run"], key(row)) if row.get("run") else number
        except (ValueError, KeyError) as error:
            raise ValueError(f"{path}, line {number}: not a row ({error})") from error
        if row["device"] == device:
            found.pop(name, None)  # the place in the file, too, is that of the last one
            found[name] = row
    yield from found.values()


def key(row: Row) -> Key:
    """Kind and names of a row; rows of an unknown kind are named by everything in them."""
    names = NAMES.get(row["kind"])
    return (row["kind"], *(row[name] for name in names)) if names else (row["kind"], json.dumps(row, sort_keys=True))


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@cache
def machine(kind: str) -> Row:
    """The device and the versions that a run measures with. A row from a CPU names no GPU."""
    import torch

    gpu: Row = {"gpu": None, "capability": None, "driver": None}
    if kind == "cuda":
        properties = torch.cuda.get_device_properties()
        gpu = {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "driver": _nvidia_smi("driver_version")[0],
        }
    return {
        "device": kind,
        **gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version("triton"),
        "revision": revision(),
    }


def version(distribution: str) -> str | None:
    """That of an installed distribution."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def revision(root: Path = ROOT) -> str:
    """`GIT_REVISION` if it is set, for trees without `.git`; else what git says, with "-dirty" where files differ."""
    if named := os.environ.get("GIT_REVISION"):
        return named
    try:
        head, changes = (
            subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True, check=True).stdout
            for command in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.strip() + ("-dirty" if changes.strip() else "")


def clocks() -> dict[str, float]:
    """Clocks, power and temperature of the GPU at this moment, as far as the driver tells them."""
    names = {"sm_mhz": "clocks.sm", "memory_mhz": "clocks.mem", "power_w": "power.draw", "celsius": "temperature.gpu"}
    found = {}
    for name, text in zip(names, _nvidia_smi(*names.values()), strict=True):
        try:
            found[name] = float(text or "")
        except ValueError:  # None, "[N/A]"
            continue
    return found


def _nvidia_smi(*fields: str) -> list[str | None]:
    """Of the current device, by its UUID: CUDA and the driver need not count alike."""
    import torch

    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        query.append(f"--id=GPU-{torch.cuda.get_device_properties().uuid}")
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, AttributeError, RuntimeError, AssertionError, subprocess.SubprocessError):
        return [None] * len(fields)
    values = done.stdout.strip().split(", ")
    return list(values) if len(values) == len(fields) else [None] * len(fields)
