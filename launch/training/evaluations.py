"""What is looked at in the course of training: validation, previews, figures of samples, when each is due."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from launch.pictures import comparison
from launch.runtime.processes import Processes
from launch.training.config import OptimizerConfig, TrainConfig
from launch.training.engine import Engine
from launch.training.loader import Batches, BatchSplit
from launch.training.log import RunLog
from launch.training.task import Previews, SampleFigures, Task
from launch.training.validation import Validation, evaluating

Position = Callable[[int], Mapping[str, Any]]  # what a row says of where a step is


class Evaluations:
    """Validation on `data`, previews and figures of samples of one run; each may be None.

    Args:
        compiled: whether networks are, for one size of batch.
    """

    def __init__(
        self,
        task: Task,
        engines: Mapping[str, Engine],
        split: BatchSplit,
        processes: Processes,
        train: TrainConfig,
        optimizer: OptimizerConfig,
        *,
        data: Batches | None,
        previews: Previews | None,
        figures: SampleFigures | None,
        last_step: int,
        compiled: bool,
    ):
        self._task, self._engines, self._processes, self._last_step = task, engines, processes, last_step
        self._every, self.previews, self.figures = train.valid_every, previews, figures
        self._micro_batch_size, self._compiled = split.micro_batch_size, compiled
        weights = train.validated(optimizer.ema_decay)
        self._averaged = task.validated if optimizer.ema_decay > 0 else ()
        self.validation: Validation | None = None
        if data is not None:
            self.validation = Validation(
                task, data, engines, split, processes, batches=train.valid_batches, weights=weights
            )

    def run(self, step: int, position: Position, log: RunLog | None) -> bool:
        """Do what is due after a step → whether there was anything; every process must call it."""
        validates = self.validation is not None and self._every is not None and step % self._every == 0
        previews, measures = self._due(self.previews, step), self._due(self.figures, step)
        if validates:
            self._validate(step, position, log)
        if previews:
            self._preview(step, log)
        if measures:
            self._measure(step, position, log)
        return validates or previews or measures

    def _due(self, part: Previews | SampleFigures | None, step: int) -> bool:
        return part is not None and (step % part.every == 0 or step == self._last_step)

    def _validate(self, step: int, position: Position, log: RunLog | None) -> None:
        """A row of means over validation data, and pictures of some of them."""
        assert self.validation is not None
        means, pictures = self.validation.run()
        if log is not None:
            log.write_row({**position(step), **means})
            for name, rows in pictures.items():
                log.write_picture(name, step, partial(comparison, rows))

    @torch.no_grad()
    def _preview(self, step: int, log: RunLog | None) -> None:
        """A picture of samples by the moving average, where one is kept."""
        assert self.previews is not None
        batch_size = self._micro_batch_size if self._compiled else None
        with evaluating(self._engines, self._averaged):
            latents = self.previews.sample(self._engines, self._processes, batch_size)
        if log is None:
            return
        if latents.isfinite().all():
            log.write_picture("previews", step, partial(self.previews.draw, latents, self._processes.device))
        else:
            log.warn(f"the previews of step {step} are not finite: there is no picture of them")

    @torch.no_grad()
    def _measure(self, step: int, position: Position, log: RunLog | None) -> None:
        """A row of figures of samples by the moving average, where one is kept."""
        assert self.figures is not None
        with evaluating(self._engines, self._averaged):
            figures, reason = self.figures.measure(self._engines, self._processes, self._micro_batch_size)
        if log is not None:
            log.write_row({**position(step), **figures})
            if reason is not None:
                log.warn(f"no figures of the samples of step {step}: {reason}")
