"""Loss spikes: the losses of all steps, kept on the device until a row of the log is due, against a running median.

A spike is a loss further above the median of the losses before it than `spike_factor` standard deviations, these
estimated by the median absolute deviation. Seven of them are the rule by which OLMo 2 counts spikes (arXiv 2501.00656;
it takes the mean and the standard deviation of the last 1,000 values, which a spike itself moves); 1.4826 makes the
median absolute deviation an estimate of the standard deviation of normal numbers (Rousseeuw and Croux, 1993, doi
10.1080/01621459.1993.10476408).
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

NORMAL = 1.4826
LEAST_DEVIATION = 1e-2  # of the median: losses may be all but equal for a while


class StepLosses:
    """The mean loss of each of the last `capacity` steps on this process, float64 on the device.

    Args:
        step: the step before the first that is kept.
        parts: micro-batches of this process in a step.
    """

    def __init__(self, step: int, capacity: int, parts: int, device: torch.device):
        self._losses = torch.zeros(capacity, dtype=torch.float64, device=device)
        self._read_to, self._weight = step, 1 / parts

    def start(self, step: int) -> None:
        """Begin a step."""
        self._losses[step % len(self._losses)] = 0.0

    def add(self, step: int, loss: torch.Tensor) -> None:
        """Add the loss of one micro-batch, a scalar; nothing is copied to the host."""
        self._losses[step % len(self._losses)] += self._weight * loss.detach().double()

    def read(self, step: int) -> list[tuple[int, float]]:
        """(step, loss) of the steps since the last reading to `step`; means over processes, all of which must call it.

        A loss that is not finite on one process is not finite.
        """
        first = max(self._read_to, step - len(self._losses)) + 1
        self._read_to = step
        if first > step:
            return []
        losses = self._losses.clone()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(losses)
            losses /= dist.get_world_size()
        values = losses.tolist()
        return [(number, values[number % len(values)]) for number in range(first, step + 1)]


@dataclass
class Spikes:
    """Counts spikes and finds those that last: `lasting` of them in a row, skipped steps aside.

    Args:
        factor: deviations above the median from which a loss is a spike.
        window: losses that the median is of; none is a spike before there are a quarter as many.
        lasting: steps after which a spike lasts; None: never.
        objective: of a step, what is minimised; where that changes, the losses of before are forgotten.
    """

    factor: float
    window: int
    lasting: int | None
    objective: Callable[[int], Any]
    count: int = 0  # since the last row
    in_a_row: int = 0
    first: int | None = None  # step of the present spike
    found: tuple[int, int] | None = None  # first and last step of a spike that lasted, since the last row
    _losses: deque[float] = field(init=False)

    def __post_init__(self):
        self._losses = deque(maxlen=self.window)

    def add(self, step: int, loss: float) -> None:
        """Judge the next step's loss by those before it; one that is not finite is left out, as its step was."""
        if step > 1 and self.objective(step) != self.objective(step - 1):
            self._losses.clear()
            self.in_a_row, self.first = 0, None
        if not math.isfinite(loss):
            return
        if loss > self.threshold():
            self.count, self.in_a_row = self.count + 1, self.in_a_row + 1
            self.first = step if self.first is None else self.first
            if self.lasting is not None and self.in_a_row >= self.lasting:
                self.found = (self.first, step)
        else:
            self.in_a_row, self.first = 0, None
        self._losses.append(loss)

    def median(self) -> float | None:
        """Of the last losses; None where there are none."""
        return float(np.median(self._losses)) if self._losses else None

    def threshold(self) -> float:
        """The loss above which the next step would be a spike; infinite where too few are known."""
        if len(self._losses) < max(self.window // 4, 1):
            return math.inf
        losses = np.asarray(self._losses)
        median = float(np.median(losses))
        deviation = max(NORMAL * float(np.median(np.abs(losses - median))), LEAST_DEVIATION * abs(median))
        return median + self.factor * deviation

    def figures(self) -> dict[str, float | None]:
        """What a row of the log says, and a new count begins."""
        figures = {"loss_spikes": self.count, "loss_median": self.median()}
        self.count = 0
        return figures

    def state_dict(self) -> dict:
        return {
            "last": list(self._losses),
            "spikes": self.count,
            "in_a_row": self.in_a_row,
            "first": self.first,
            "found": self.found,
        }

    def load_state_dict(self, state: dict) -> None:
        self._losses.extend(state["last"])
        self.count, self.in_a_row, self.first = state["spikes"], state["in_a_row"], state["first"]
        found = state.get("found")  # earlier checkpoints do not say
        self.found = None if found is None or self.lasting is None else tuple(found)


def add_all(spikes: Spikes, losses: Sequence[tuple[int, float]]) -> None:
    for step, loss in losses:
        spikes.add(step, loss)
