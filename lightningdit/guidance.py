"""Guidance of samples: by the unconditional prediction (classifier-free) or by a weaker network (autoguidance).

Both are `other + w(t)·(cond - other)`: classifier-free guidance (arXiv 2207.12598) takes the network's own prediction
for the null label as the other one, autoguidance (arXiv 2406.02507) that of a weaker network for the same label. It
holds on an interval of times (arXiv 2404.07724), on all channels or the first k of them (the published code: 3 of 32),
and is not computed where it changes nothing: outside the interval, and where w(t) is 1.

Schedules (after arXiv 2404.13040) bring the scale from 1 at noise to its full value w at data,
w(t) = 1 + (w - 1)·s(t): constant s = 1, linear s = t, cosine s = (1 - cos(π t)) / 2.

Shapes: B samples; states are [B, C, ...].
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import torch

from lightningdit.config import Schedule

Scalar = float | torch.Tensor  # a number of the host, or a tensor [] on the device
Predict = Callable[[torch.Tensor, float], torch.Tensor]  # the network's output for x at the host time t
Network = Callable[..., torch.Tensor]  # called as (x, t [B], y=labels [B])

SHARES: dict[Schedule, Callable[[float], float]] = {
    "constant": lambda t: 1.0,
    "linear": lambda t: t,
    "cosine": lambda t: (1 - math.cos(math.pi * t)) / 2,
}


def as_float32(t: float) -> float:
    """The float32 next to t. Times are float32: a bound of 0.11 has to mean it for t = 0.11 to count as reached."""
    return float(np.float32(t))


def times_of(x: torch.Tensor, t: Scalar) -> torch.Tensor:
    """The time t for each sample of x [B, ...]: [B] in x's dtype."""
    if isinstance(t, torch.Tensor):
        return t.to(x.dtype).expand(len(x)).contiguous()
    return x.new_full((len(x),), t)


@dataclass(frozen=True)
class Guidance:
    """Where predictions are guided, and how much.

    null_label: None for guidance by another network. channels: how many leading channels are guided (None: all; the
    published code guides 3), the rest stay conditional. Guided are the times from `interval_start` to `interval_end`,
    both included.
    """

    scale: float
    null_label: int | None
    interval_start: float = 0.0
    channels: int | None = None
    interval_end: float = 1.0
    schedule: Schedule = "constant"

    @property
    def start(self) -> float:
        """The first guided time; infinite where none is."""
        return math.inf if self.scale == 1 else as_float32(self.interval_start)

    @property
    def end(self) -> float:
        """The last guided time; an interval up to 1 has no end, as a solver may look a little beyond it."""
        return math.inf if self.interval_end >= 1 else as_float32(self.interval_end)

    def contains(self, t: float) -> bool:
        """Whether t lies in the interval."""
        return self.start <= t <= self.end

    def scale_at(self, t: float) -> float:
        """w(t) of the schedule."""
        return self.scale if self.schedule == "constant" else 1 + (self.scale - 1) * SHARES[self.schedule](t)

    def applies(self, t: float) -> bool:
        """Whether a call at time t is guided."""
        return self.contains(t) and self.scale_at(t) != 1


class Denoiser:
    """`model(x, t, y)` for fixed labels, guided where `guidance` says so, counting its calls.

    guide: the weaker network of autoguidance, called as the model; without one, the model's own null label guides.
    nfe: calls by the solver. guided_nfe: those that also ran the second evaluation.
    """

    def __init__(
        self,
        model: Network,
        y: torch.Tensor | None = None,
        guidance: Guidance | None = None,
        guide: Network | None = None,
    ):
        if guidance is not None and y is None:
            raise ValueError("guidance needs labels y")
        if guidance is not None and guidance.null_label is None and guide is None:
            raise ValueError("guidance needs a null label, or a network that guides")
        self.model, self.y, self.guidance, self.guide = model, y, guidance, guide
        self.labels = {} if y is None else {"y": y}
        self.nfe = self.guided_nfe = 0

    def segments(self, start: float, end: float) -> Iterator[tuple[float, float, Predict]]:
        """(from, to, prediction) along the times from start to end, in either direction, cut where guidance begins or
        ends.

        The prediction of a segment is guided at all times or at none, at its ends and beyond them too: it never jumps.
        """
        guidance = self.guidance
        jumps = set() if guidance is None else {guidance.start, guidance.end}
        inside = sorted((t for t in jumps if min(start, end) < t < max(start, end)), reverse=end < start)
        for t, after in pairwise([start, *inside, end]):
            guided = guidance is not None and guidance.contains((t + after) / 2)
            yield t, after, partial(self, guided=guided)

    def __call__(self, x: torch.Tensor, t: float, guided: bool | None = None) -> torch.Tensor:
        """The prediction for x [B, C, ...] at the host time t, in x's dtype; guided: None for what holds at t."""
        scale = self.scale_at(t, guided)
        self.nfe += 1
        self.guided_nfe += scale is not None
        return self.evaluate(x, t, scale)

    def scale_at(self, t: float, guided: bool | None = None) -> float | None:
        """The scale of a call at t; None for one that is not guided. guided: as `__call__` takes it."""
        if self.guidance is None or not (self.guidance.contains(t) if guided is None else guided):
            return None
        scale = self.guidance.scale_at(t)
        return None if scale == 1 else scale

    def evaluate(self, x: torch.Tensor, t: Scalar, scale: Scalar | None) -> torch.Tensor:
        """The prediction at t, guided by `scale` or not at all: a function of its arguments alone, counting nothing."""
        if scale is None:
            return self.model(x, times_of(x, t), **self.labels).to(x.dtype)
        guidance = self.guidance
        assert guidance is not None and self.y is not None
        if self.guide is not None:
            times = times_of(x, t)
            cond, other = (network(x, times, y=self.y).to(x.dtype) for network in (self.model, self.guide))
        else:
            assert guidance.null_label is not None
            both = torch.cat([x, x])  # [2B, C, ...]
            labels = torch.cat([self.y, torch.full_like(self.y, guidance.null_label)])  # [2B]
            cond, other = self.model(both, times_of(both, t), y=labels).to(x.dtype).chunk(2)  # [B, C, ...] both
        return apply_guidance(cond, other, scale, guidance.channels)


def apply_guidance(cond: torch.Tensor, other: torch.Tensor, scale: Scalar, channels: int | None) -> torch.Tensor:
    """other + scale·(cond - other) on the first `channels` of axis 1 (None: all), cond on the others."""
    if channels is None or channels >= cond.shape[1]:
        return other + scale * (cond - other)
    first = other[:, :channels] + scale * (cond[:, :channels] - other[:, :channels])
    return torch.cat([first, cond[:, channels:]], dim=1)
