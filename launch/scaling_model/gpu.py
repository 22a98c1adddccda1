"""What one GPU does alone: images per second at a micro-batch, measured or given, and what it loses at smaller ones."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from common.files import FileError, open_regular
from launch.config_files import ConfigError

#: Bytes that one pass of AdamW, moving average and bfloat16 copy reads and writes for each parameter.
OPTIMIZER_BYTES = 38
#: Bytes/s of a copy, read and written, that was seen on an H200: its memory is faster than an H100's.
COPY_RATE = 4.3e12
#: Micro-batch at which a GPU is taken to reach half of its rate. Below about 5 images of 256 tokens the matrix products
#: of LightningDiT-XL have too few tiles of 128 × 192 for the 132 processors of an H100, weighted by their FLOPs.
HALF_BATCH = 4.0
FORWARD = 1 / 3  # of the time of a micro-batch: the backward pass has twice the FLOPs


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Fields:
        images_per_second: with a step of one micro-batch of `micro_batch`, optimizer included.
        optimizer: seconds of the optimizer's part of that step, for all parameters.
        half_batch: micro-batch b at which it computes half as fast as at best: efficiency b/(b + half_batch).
        efficiencies: micro-batch → efficiency, in the place of that curve, with straight lines between over log b.
    """

    images_per_second: float
    micro_batch: int
    optimizer: float
    half_batch: float = HALF_BATCH
    efficiencies: Mapping[int, float] = field(default_factory=dict)

    def efficiency(self, micro_batch: int) -> float:
        """Of the rate at best, forward and backward pass alone."""
        if not self.efficiencies:
            return micro_batch / (micro_batch + self.half_batch)
        points = sorted(self.efficiencies.items())
        if micro_batch <= points[0][0]:  # below the smallest, a step takes no less time
            return points[0][1] * micro_batch / points[0][0]
        for (low, at_low), (high, at_high) in pairwise(points):
            if micro_batch <= high:
                share = math.log(micro_batch / low) / math.log(high / low)
                return at_low + share * (at_high - at_low)
        return points[-1][1]

    def seconds(self, micro_batch: int) -> float:
        """Forward and backward pass of one micro-batch."""
        whole = self.micro_batch / self.images_per_second - self.optimizer
        return whole * micro_batch / self.micro_batch * self.efficiency(self.micro_batch) / self.efficiency(micro_batch)


def optimizer_seconds(parameters: int) -> float:
    """A pass over all parameters at the rate of a copy; computed, not measured."""
    return OPTIMIZER_BYTES * parameters / COPY_RATE


def parse_efficiencies(text: str) -> dict[int, float]:
    """`8:0.5,128:1` as micro-batch → efficiency; raises ConfigError for what is no such list."""
    found = {}
    for part in text.split(","):
        batch, _, value = part.partition(":")
        try:
            found[int(batch)] = float(value)
        except ValueError:
            found[0] = 0.0
    if not all(batch > 0 and 0 < value <= 1 for batch, value in found.items()):
        raise ConfigError(f"--efficiency {text}: micro-batch:efficiency, such as 8:0.5,32:0.8,128:1, is wanted")
    return found


def from_rows(path: Path, model: str, variant: str, micro_batch: int | None) -> tuple[float, int, float | None, str]:
    """A measured training step of `model` → images per second, its batch, seconds of its optimizer or None, its source.

    The newest row of the bench's file whose variant and batch are the wanted ones (of several batches, the largest).
    Raises ConfigError, saying what there is, where none is.
    """
    steps = [row for row in _rows(path) if row.get("kind") == "step" and row.get("status") == "ok"]
    fitting = [row for row in steps if row.get("model") == model and row.get("variant") == variant]
    fitting = [row for row in fitting if micro_batch in (None, row.get("batch"))]
    if not fitting:
        known = sorted({f"{row.get('model')} {row.get('variant')} batch {row.get('batch')}" for row in steps})
        wanted = f"{model} {variant}{'' if micro_batch is None else f' batch {micro_batch}'}"
        raise ConfigError(f"{path} has no measured step of {wanted}; it has {', '.join(known) or 'none'}")
    row = max(fitting, key=lambda row: (row.get("batch", 0), str(row.get("date", ""))))
    try:
        rate, batch = float(row["images_per_second"]), int(row["batch"])
    except (KeyError, TypeError, ValueError) as e:
        raise ConfigError(f"{path}: the step of {model} {variant} has no images_per_second and batch ({e})") from None
    spent = (row.get("breakdown_ms") or {}).get("optimizer")
    source = f"measured: {path.name}, {row.get('gpu')}, {variant}, batch {batch}"
    return rate, batch, spent / 1e3 if isinstance(spent, int | float) else None, source


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        with open_regular(path) as f:
            rows = [json.loads(line) for line in f if line.strip()]
    except ValueError as e:
        raise e if isinstance(e, FileError) else ConfigError(f"{path} is no file of JSON lines: {e}") from None
    return [row for row in rows if isinstance(row, dict)]
