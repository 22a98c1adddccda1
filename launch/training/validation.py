"""Validation in the loop: means and pictures of the same images with the same draws every time."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch

from launch.runtime.processes import Processes
from launch.training.engine import Engine
from launch.training.loader import Batches, BatchSplit, Tensors, to_device
from launch.training.log import Meter
from launch.training.task import DrawsPictures, Task

Pictures = dict[str, Tensors]  # picture → caption → row
PREFIX = {"ema": "valid_ema", "model": "valid"}  # of the keys of a row, by the weights
_PICTURES = 0  # the step whose draws are those of pictures: training has those from 1, validation those below 0


@contextmanager
def evaluating(engines: Mapping[str, Engine], averaged: Collection[str] = ()) -> Iterator[None]:
    """Networks in evaluation mode, those named in `averaged` with the moving average for weights; afterwards in
    training mode with the weights they had, bit for bit. Every process must enter and leave it."""
    with ExitStack() as stack:
        for name, engine in engines.items():
            stack.callback(engine.train)
            engine.train(False)
            if name in averaged:
                stack.enter_context(engine.averaged())
        yield


class Validation:
    """What is measured of `task` on the first images of `data`: `batches` global batches of them, cut among processes
    and micro-batches as training's are, so that their number changes nothing.

    Args:
        weights: which are validated, one after the other: "ema", the moving average, and "model", the weights.
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
        weights: Sequence[str],
    ):
        self.task, self.data, self._engines, self._split, self._processes = task, data, engines, split, processes
        self._batches, self._weights = batches, weights

    @torch.no_grad()
    def run(self) -> tuple[dict[str, float | None], Pictures]:
        """Means, under `valid_ema/` of the average and `valid/` of the weights, and pictures by the first of the two;
        every process must call it."""
        means: dict[str, float | None] = {}
        pictures: Pictures = {}
        for which in self._weights:
            with evaluating(self._engines, self.task.validated if which == "ema" else ()):
                means |= self._means(PREFIX[which])
                pictures = pictures or self._pictures()
        return means, pictures

    def _means(self, prefix: str) -> dict[str, float | None]:
        split, processes, meter = self._split, self._processes, Meter()
        for number in range(self._batches):
            first = number * split.global_batch_size
            draws = self.task.validation_draws(number, split.global_batch_size, processes.device)
            for micro in range(split.accumulation):
                start, stop = split.bounds(micro, processes.rank)
                batch = self._batch(torch.arange(first + start, first + stop) % len(self.data))
                own_draws = {name: value[start:stop] for name, value in draws.items()}
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
