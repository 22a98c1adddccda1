"""Skipped steps and loss spikes of a run, and what follows when they do not end: one rollback, then a stop.

A rollback goes back to the last checkpoint from before the first bad step, and past the batches that the run met there:
the steps from that checkpoint to the last bad one are drawn anew, their samples and random numbers, from another seed.
(Chowdhery et al., arXiv 2204.02311, section 5.1: restarted 100 steps before a spike, a run whose next 200 to 500
batches were skipped did not meet it again, although the same batches caused none from another state of the weights.)
"""

import logging
from collections.abc import Callable, Mapping
from itertools import pairwise

import torch

from launch.runtime.processes import Processes
from launch.training import checkpoint
from launch.training.dump import BadSteps, replay_command, write_dump
from launch.training.engine import Engine
from launch.training.loader import BatchSplit, SampleOrder
from launch.training.optimizer import NonFiniteError
from launch.training.rollback import Rollback
from launch.training.skips import Counters, SkippedSteps, all_skipped
from launch.training.spikes import Spikes, StepLosses, add_all
from launch.training.task import ChangesObjective, Task
from launch.training.trainer_config import TrainerConfig

log = logging.getLogger(__name__)


class Incidents:
    """What a run knows of its bad steps, and what it does about them when a row of the log is due.

    Args:
        step: the step that the run starts after.
        save: writes a checkpoint of the present step, on all processes.
        wait: returns when no checkpoint is being written any more.
    """

    def __init__(
        self,
        config: TrainerConfig,
        task: Task,
        engines: Mapping[str, Engine],
        order: SampleOrder,
        split: BatchSplit,
        processes: Processes,
        step: int,
        save: Callable[[], None],
        wait: Callable[[], object] = lambda: None,
    ):
        self._config, self._task, self._engines, self._processes = config, task, engines, processes
        self._order, self._split, self._start = order, split, step
        self._save, self._wait = save, wait
        train = config.train
        self._watched = next(iter(engines))  # the network that is trained in every step
        self._skips = SkippedSteps(engines, step, train.log_every, processes.device)
        self._losses = StepLosses(step, train.log_every, split.accumulation, processes.device)
        objective = task.objective if isinstance(task, ChangesObjective) else lambda step: None
        self._spikes = Spikes(train.spike_factor, train.spike_window, train.spike_steps, objective)
        self.skipped_steps: list[dict] = []  # those since the last row, and those in a row before it

    def begin_step(self, step: int) -> None:
        self._losses.start(step)

    def add_loss(self, step: int, network: str, loss: torch.Tensor) -> None:
        """The loss of a micro-batch; that of the first network is watched for spikes."""
        if network == self._watched:
            self._losses.add(step, loss)

    def end_step(self, step: int, skip_flags: dict[str, torch.Tensor]) -> None:
        """`AdamWEma.skip_flags` of each network that was trained in this step."""
        self._skips.record(step, skip_flags)

    def read(self, step: int) -> None:
        """Fetch from the device what happened up to this step; every process must call it."""
        self.skipped_steps += self._skips.read(step, self._processes)
        add_all(self._spikes, self._losses.read(step))

    def figures(self, step: int) -> dict[str, float | None]:
        """`loss_spikes` since the last row, and `loss_median`; every process must call it."""
        self.read(step)
        return self._spikes.figures()

    def state_dict(self) -> dict:
        """What a checkpoint keeps: of skipped steps, and of losses."""
        return {"skipped_steps": self.skipped_steps, "losses": self._spikes.state_dict()}

    def load_state_dict(self, state: Mapping) -> None:
        """Take back what a checkpoint's state kept; earlier ones have less."""
        kept = state.get("since_last_row") or {"skipped_steps": []}
        self.skipped_steps = [each for each in kept["skipped_steps"] if each["network"] in self._engines]
        if state.get("losses") is not None:
            self._spikes.load_state_dict(state["losses"])

    def check(self, step: int, row: dict, started: Counters, counters: Counters) -> None:
        """Raise Rollback or NonFiniteError where bad steps since the last row are too many in a row, or all of them.

        Args:
            started, counters: of the optimizers, at the start of this process and now.
        """
        for engine in self._engines.values():
            engine.optimizer.reset_most_skipped()
        bad = self._too_many_skipped(step, counters) or self._lasting_spike()
        if bad is not None:
            why = ""
            if len(self._order.redrawn) < self._config.train.rollbacks:
                self._go_back(bad)
                why = ", and no checkpoint from before them is kept (train.keep_checkpoints)"
            elif self._order.redrawn:
                why = f", again after the rollback to step {self._order.redrawn[-1][0] - 1}"
            self._stop(row, bad, why)
        if step == self._config.last_step and all_skipped(started, counters):
            first = self.skipped_steps[0]["step"] if self.skipped_steps else step
            what = f"all steps up to the last, {step}, had a non-finite loss or gradient and were skipped"
            self._stop(row, BadSteps(first, step, f"{what} (nothing was trained)", harmless=True))
        last_applied = {name: step - c["skipped_in_a_row"] for name, c in counters.items()}
        self.skipped_steps = [each for each in self.skipped_steps if each["step"] > last_applied[each["network"]]]

    def _too_many_skipped(self, step: int, counters: Counters) -> BadSteps | None:
        most = int(max(c["most_skipped_in_a_row"] for c in counters.values()))
        allowed = self._config.train.max_skipped_in_a_row
        if most < allowed:
            return None
        runs = [run for name in counters for run in _runs(self.skipped_steps, name) if len(run) >= allowed]
        if not runs:  # earlier checkpoints name none
            runs = [[step - most + 1, step]]
        first, last = min(run[0] for run in runs), max(run[-1] for run in runs)
        what = f"{most} steps in a row up to step {step} had a non-finite loss or gradient and were skipped"
        return BadSteps(first, last, f"{what} (allowed: {allowed - 1})", harmless=True)

    def _lasting_spike(self) -> BadSteps | None:
        found, self._spikes.found = self._spikes.found, None
        if found is None:
            return None
        first, last = found
        train = self._config.train
        what = (
            f"the loss was a spike from step {first} to step {last}, further than {train.spike_factor:g} deviations "
            f"above its median (train.spike_steps: {train.spike_steps})"
        )
        return BadSteps(first, last, what, harmless=False)

    def _go_back(self, bad: BadSteps) -> None:
        """Raise Rollback, unless there are checkpoints but none to go back to."""
        self._wait()
        step = self._processes.on_main(lambda: self._set_back(bad))
        if step is not None:
            seed = self._order.seed + len(self._order.redrawn) + 1
            raise Rollback(step, (*self._order.redrawn, (step + 1, bad.last, seed)), bad.what)

    def _set_back(self, bad: BadSteps) -> int | None:
        """The step of the checkpoint to go back to, later ones set aside; None where there are later ones alone.

        Without any checkpoint that is where this process started. Skipped steps leave weights as they are, so that one
        from among them will do where no earlier one is kept.
        """
        kept = checkpoint.complete(self._config.directory / "checkpoints")
        if not kept:
            return self._start
        good = [each.step for each in kept if each.step < bad.first or (bad.harmless and each.step < bad.last)]
        before = [step for step in good if step < bad.first]
        if not good:
            return None
        step = max(before or good)
        for each in kept:
            if each.step > step:
                aside = checkpoint.set_aside(each.path, "rolled_back")
                log.warning("%s is set aside as %s: the run goes back to step %d", each.path, aside.name, step)
        return step

    def _stop(self, row: dict, bad: BadSteps, why: str = "") -> None:
        """Save the weights where they are good ones, write what is needed to find the cause, and raise."""
        if bad.harmless:
            self._save()
        directory = write_dump(
            self._config,
            self._task,
            self._engines,
            self._order,
            self._split,
            self._processes,
            row=row,
            bad=bad,
            skipped_steps=self.skipped_steps,
        )
        raise NonFiniteError(f"{bad.what}{why}; see {directory}; to compute it again: {replay_command(directory)}")


def _runs(skipped_steps: list[dict], network: str) -> list[list[int]]:
    """The skipped steps of a network, cut where one was not skipped."""
    steps = sorted({each["step"] for each in skipped_steps if each["network"] == network})
    runs: list[list[int]] = [steps[:1]] if steps else []
    for before, step in pairwise(steps):
        if step == before + 1:
            runs[-1].append(step)
        else:
            runs.append([step])
    return runs
