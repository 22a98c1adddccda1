"""Validation in the loop: means and pictures of the same images with the same draws every time."""

from collections.abc import Mapping
from contextlib import ExitStack

import torch

from launch.runtime.processes import Processes
from launch.training.engine import Engine
from launch.training.loader import Batches, BatchSplit, Tensors, to_device
from launch.training.log import Meter
from launch.training.task import DrawsPictures, Task

Pictures = dict[str, Tensors]  # picture → caption → row
_PICTURES = 0  # the step whose draws are those of pictures: training has those from 1, validation those below 0


class Validation:
    """What is measured of `task` on the first `batches` micro-batches of every process.

    Args:
        averaged: by the moving average of the weights.
    """

    def __init__(
        self,
        task: Task,
        data: Batches,
        engines: Mapping[str, Engine],
        split: BatchSplit,
        processes: Processes,
        *,
        batches: int,
        averaged: bool,
    ):
        self.task, self.data, self._engines, self._split, self._processes = task, data, engines, split, processes
        self._batches, self._averaged = batches, averaged

    @torch.no_grad()
    def run(self) -> tuple[dict[str, float | None], Pictures]:
        """Means, under `valid/` or, of the average, `valid_ema/`, and pictures; every process must call it.

        Networks are in evaluation mode meanwhile, and afterwards in training mode with the weights they had.
        """
        with ExitStack() as stack:
            for engine in self._engines.values():
                stack.callback(engine.train)
                engine.train(False)
                if self._averaged:
                    stack.enter_context(engine.averaged())
            return self._means(), self._pictures()

    def _means(self) -> dict[str, float | None]:
        size, processes = self._split.micro_batch_size, self._processes
        prefix, meter = "valid_ema" if self._averaged else "valid", Meter()
        for number in range(self._batches):
            first = (number * processes.world_size + processes.rank) * size
            batch = self._batch(torch.arange(first, first + size) % len(self.data))
            draws = self.task.draw(-1 - number, size * processes.world_size, processes.device)
            start = processes.rank * size
            own_draws = {name: value[start : start + size] for name, value in draws.items()}
            losses = self.task.validate(self._engines, batch, own_draws)
            meter.add({f"{prefix}/{name}": value for name, value in losses.items()})
        return meter.read()

    def _pictures(self) -> Pictures:
        """Of samples from all over the data, which may be sorted by class.

        On every process: under ZeRO 3 all take part in every forward pass.
        """
        if not isinstance(self.task, DrawsPictures) or self.task.num_pictures == 0:
            return {}
        count, size = min(self.task.num_pictures, len(self.data)), self._split.micro_batch_size
        draws = self.task.draw(_PICTURES, count, self._processes.device)
        found: dict[str, dict[str, list[torch.Tensor]]] = {}
        for first in range(0, count, size):  # whole micro-batches, the size that networks are compiled for
            places = torch.arange(first, first + size) % count
            own_draws = {name: value[places.to(value.device)] for name, value in draws.items()}
            made = self.task.pictures(self._engines, self._batch(places * len(self.data) // count), own_draws)
            for picture, rows in made.items():
                for caption, row in rows.items():
                    found.setdefault(picture, {}).setdefault(caption, []).append(row)
        return {
            picture: {caption: torch.cat(parts)[:count] for caption, parts in rows.items()}
            for picture, rows in found.items()
        }

    def _batch(self, indices: torch.Tensor) -> Tensors:
        return to_device(self.data.batch(torch.zeros_like(indices), indices), self._processes.device)
