"""Skipped steps and loss spikes of a run, and what follows when they do not end: one rollback, then a stop.

A rollback goes back to the last checkpoint from before the first bad step, and past the batches that the run met there:
the steps from that checkpoint to the last bad one are drawn anew, their samples and random numbers, from another seed.
(Chowdhery et al., arXiv 2204.02311, section 5.1: restarted 100 steps before a spike, a run whose next 200 to 500
batches were skipped did not meet it again, although the same batches caused none from another state of the weights.)
"""

import logging
from collections import deque
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path

import torch

from launch.training import checkpoint
from launch.training.checkpoint import CheckpointError, step_of
from launch.training.dump import BadSteps, RunParts, replay_command, write_dump
from launch.training.optimizer import NonFiniteError
from launch.training.restore import newest_allowed
from launch.training.rollback import Rollback
from launch.training.skips import Counters, SkippedSteps, all_skipped
from launch.training.spikes import Spikes, StepLosses, add_all
from launch.training.task import ChangesObjective

log = logging.getLogger(__name__)


class Incidents:
    """What a run knows of its bad steps, and what it does about them when a row of the log is due.

    Args:
        step: the step that the run starts after.
        save: writes a checkpoint of the present step, on all processes.
        wait: returns when no checkpoint is being written any more.
    """

    def __init__(self, parts: RunParts, step: int, save: Callable[[], None], wait: Callable[[], object] = lambda: None):
        self._parts, self._start, self._save, self._wait = parts, step, save, wait
        self._order, self._processes, task, train = parts.order, parts.processes, parts.task, parts.config.train
        self._watched = next(iter(parts.engines))  # the network that is trained in every step
        self._skips = SkippedSteps(parts.engines, step, train.log_every, parts.processes.device)
        self._losses = StepLosses(step, train.log_every, parts.split.accumulation, parts.processes.device)
        objective = task.objective if isinstance(task, ChangesObjective) else lambda step: None
        self._spikes = Spikes(train.spike_factor, train.spike_window, train.spike_steps, objective)
        #: (step, loss) of the last steps of this process, for a dump.
        self._last_losses: deque[tuple[int, float]] = deque(maxlen=max(train.spike_window, train.log_every))
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
        losses = self._losses.read(step)
        add_all(self._spikes, losses)
        self._last_losses.extend(losses)

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
        self.skipped_steps = [each for each in kept["skipped_steps"] if each["network"] in self._parts.engines]
        if state.get("losses") is not None:
            self._spikes.load_state_dict(state["losses"])

    def check(self, step: int, row: dict, started: Counters, counters: Counters) -> None:
        """Raise Rollback or NonFiniteError where bad steps since the last row are too many in a row, or all of them.

        Args:
            started, counters: of the optimizers, at the start of this process and now.
        """
        for engine in self._parts.engines.values():
            engine.optimizer.reset_most_skipped()
        bad = self._bad_steps(step, counters)
        if bad is not None:
            why = ""
            if len(self._order.redrawn) < self._parts.config.train.rollbacks:
                self._go_back(bad)
                why = ", and no whole checkpoint from before them is kept (train.keep_checkpoints)"
            elif self._order.redrawn:
                why = f", again after the rollback to step {self._order.redrawn[-1][0] - 1}"
            self._stop(row, bad, why)
        if step == self._parts.config.last_step and all_skipped(started, counters):
            first = self.skipped_steps[0]["step"] if self.skipped_steps else step
            what = f"all steps up to the last, {step}, had a non-finite loss or gradient and were skipped"
            self._stop(row, BadSteps(first, step, f"{what} (nothing was trained)"))
        last_applied = {name: step - c["skipped_in_a_row"] for name, c in counters.items()}
        self.skipped_steps = [each for each in self.skipped_steps if each["step"] > last_applied[each["network"]]]

    def _bad_steps(self, step: int, counters: Counters) -> BadSteps | None:
        """Too many skipped steps, a spike that lasts, or both as one: a divergence often ends in losses that are not
        finite, and weights are good ones before its first spike alone."""
        begun, lasting = self._spikes.first, self._lasting_spike()
        skipped = self._too_many_skipped(step, counters)
        if skipped is None:
            return lasting
        if lasting is not None:
            return BadSteps(
                min(skipped.first, lasting.first),
                max(skipped.last, lasting.last),
                f"{skipped.what}; {lasting.what}",
                spike=lasting.spike,
            )
        if begun is None or begun > skipped.last:
            return skipped
        what = f"{skipped.what}, and the loss has been a spike since step {begun}"
        return BadSteps(min(skipped.first, begun), skipped.last, what, spike=begun)

    def _too_many_skipped(self, step: int, counters: Counters) -> BadSteps | None:
        most = int(max(c["most_skipped_in_a_row"] for c in counters.values()))
        allowed = self._parts.config.train.max_skipped_in_a_row
        if most < allowed:
            return None
        runs = [run for name in counters for run in _runs(self.skipped_steps, name) if len(run) >= allowed]
        if not runs:  # earlier checkpoints name none
            runs = [[step - most + 1, step]]
        first, last = min(run[0] for run in runs), max(run[-1] for run in runs)
        what = f"{most} steps in a row up to step {step} had a non-finite loss or gradient and were skipped"
        return BadSteps(first, last, f"{what} (train.max_skipped_in_a_row: {allowed})")

    def _lasting_spike(self) -> BadSteps | None:
        found, self._spikes.found = self._spikes.found, None
        if found is None:
            return None
        first, last = found
        train = self._parts.config.train
        what = (
            f"the loss was a spike from step {first} to step {last}, further than {train.spike_factor:g} deviations "
            f"above its median (train.spike_steps: {train.spike_steps})"
        )
        return BadSteps(first, last, what, spike=first)

    def _go_back(self, bad: BadSteps) -> None:
        """Raise Rollback, unless there are checkpoints but none to go back to."""
        self._wait()
        step = self._processes.on_main(lambda: self._set_back(bad))
        if step is not None:
            seed = self._order.seed + len(self._order.redrawn) + 1
            raise Rollback(step, (*self._order.redrawn, (step + 1, bad.last, seed)), bad.what)

    def _set_back(self, bad: BadSteps) -> int | None:
        """The step of the checkpoint to go back to, later ones set aside; None where no earlier one is whole.

        Without any checkpoint that is where this process started. Skipped steps leave weights as they are, so that the
        first from among them will do where no earlier one is kept. Nothing is renamed before a whole one is found; then
        the newest comes first: a kill in between leaves the run an earlier one to go on from.
        """
        kept = checkpoint.by_step(self._parts.config.directory / "checkpoints")
        if not kept:
            return self._start
        before = [each for each in kept if step_of(each.path) < bad.first]
        among = [each for each in kept if bad.first <= step_of(each.path) < bad.good_until]
        good = [*before, *reversed(among)]
        if not good:
            return None
        try:
            found, damaged = newest_allowed(good, self._parts.config.train)
        except CheckpointError as e:
            log.warning("%s", e)
            return None
        for each in kept:
            if step_of(each.path) > found.step:
                _set_aside(each.path, damaged.get(each.path), found.step)
        return found.step

    def _stop(self, row: dict, bad: BadSteps, why: str = "") -> None:
        """Save the weights where they are good ones, write what is needed to find the cause, and raise."""
        if bad.spike is None:
            self._save()
        directory = write_dump(
            self._parts, row=row, bad=bad, skipped_steps=self.skipped_steps, losses=list(self._last_losses)
        )
        raise NonFiniteError(f"{bad.what}{why}; see {directory}; to compute it again: {replay_command(directory)}")


def _set_aside(path: Path, damage: str | None, step: int) -> None:
    aside = checkpoint.set_aside(path, "damaged" if damage else "rolled_back")
    if damage:
        log.warning("%s is DAMAGED and set aside as %s: %s", path, aside.name, damage)
    else:
        log.warning("%s is set aside as %s: the run goes back to step %d", path, aside.name, step)


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
