"""Figures of a row of the log that are no means over steps: gradients by block, drift of the average, `train.watch`."""

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist

from launch.training.engine import Engine
from launch.training.loader import Tensors
from launch.training.task import Measures, Task

WATCH = "watch/"  # begins the keys of what `train.watch` asks for


class Figures:
    """What the last step of a row measures; all of it stays on the device until `read`.

    Args:
        names: of `train.watch`.
        averaged: whether the optimizers keep a moving average.
    """

    def __init__(self, task: Task, engines: Mapping[str, Engine], names: tuple[str, ...], *, averaged: bool):
        self._task, self._engines, self._names, self._averaged = task, engines, names, averaged
        self._measured = set(names) - {"grad_norms"}  # by the task, in a forward pass of its own
        self._sample: tuple[Tensors, Tensors] | None = None

    def begin_step(self, *, due: bool) -> None:
        """Say whether a row is due after this step."""
        for engine in self._engines.values():
            engine.optimizer.measure_blocks, engine.optimizer.block_norms = due, None
        self._sample = None

    def keep(self, batch: Tensors, draws: Tensors) -> None:
        """A micro-batch of this step, some samples of which `read` measures."""
        if self._measured:
            self._sample = batch, draws

    def read(self) -> dict[str, float | list[str] | None]:
        """The figures, by the weights after the step; every process must call it and gets the same.

        `ema_drift`: ‖ema − weights‖ / ‖weights‖. `zero_gradient_blocks`: names, where there are any. `watch/…`: what
        was asked for. None where a value is not finite.
        """
        values = self._drifts() | self._gradients() | self._maxima()
        if not values:
            return {}
        flat = torch.cat([value.detach().double().reshape(-1) for value in values.values()]).tolist()
        found: dict[str, float | list[str] | None] = {}
        for key, value in zip(values, flat, strict=True):
            found[key] = value if math.isfinite(value) else None
        return self._zero_blocks(found) | {k: v for k, v in found.items() if self._wanted(k)}

    def _prefixed(self, name: str, key: str) -> str:
        return key if len(self._engines) == 1 else f"{name}/{key}"

    def _drifts(self) -> Tensors:
        if not self._averaged:
            return {}
        return {self._prefixed(n, "ema_drift"): engine.optimizer.ema_drift() for n, engine in self._engines.items()}

    def _gradients(self) -> Tensors:
        """Of the networks whose optimizer was called in this step."""
        found: Tensors = {}
        for name, engine in self._engines.items():
            norms, blocks = engine.optimizer.block_norms, engine.optimizer.blocks
            if norms is not None and blocks is not None:
                keys = [f"{WATCH}grad_norm/{self._prefixed(name, block)}" for block in blocks.names]
                found |= dict(zip(keys, norms.unbind(), strict=True))
        return found

    def _maxima(self) -> Tensors:
        """Of `Measures`, the largest over processes; what is not finite on one counts as infinite."""
        if self._sample is None or not isinstance(self._task, Measures):
            return {}
        found = self._task.measure(self._measured, self._engines, *self._sample)
        self._sample = None
        values = torch.stack(list(found.values())).double().nan_to_num(torch.inf, torch.inf, -torch.inf)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return {f"{WATCH}{key}": value for key, value in zip(found, values.unbind(), strict=True)}

    def _zero_blocks(self, found: Mapping[str, float | list[str] | None]) -> dict[str, list[str]]:
        prefix = f"{WATCH}grad_norm/"
        names = [key.removeprefix(prefix) for key, value in found.items() if key.startswith(prefix) and value == 0]
        return {"zero_gradient_blocks": names} if names else {}

    def _wanted(self, key: str) -> bool:
        return "grad_norms" in self._names or not key.startswith(f"{WATCH}grad_norm/")
