"""Which process makes which settings: an even share of the work, by an estimate of what a setting costs."""

from collections.abc import Sequence

from launch.sweeping.axes import Setting
from lightningdit.config import SampleConfig

#: Calls of the network between two points of the grid; an adaptive solver's are a guess.
_CALLS = {"euler": 1, "midpoint": 2, "heun": 2, "heun3": 3, "rk4": 4, "dopri5": 6}


def cost(settings: SampleConfig) -> float:
    """Samples through the network for one image, about: a guided call is of two."""
    if settings.mode == "meanflow":
        return settings.mean_steps
    calls = _CALLS.get(settings.sampling_method.lower(), 1) * (settings.num_sampling_steps - 1)
    guided = 0.0 if settings.cfg_scale == 1 else settings.cfg_interval_end - settings.cfg_interval_start
    return calls * (1 + guided)


def shares(settings: Sequence[Setting], count: int) -> list[list[Setting]]:
    """The settings in `count` shares, the costliest dealt first, each to the share with the least work so far."""
    dealt: list[list[Setting]] = [[] for _ in range(count)]
    work = [0.0] * count
    for setting in sorted(settings, key=lambda each: -cost(each.sample)):
        least = work.index(min(work))
        dealt[least].append(setting)
        work[least] += cost(setting.sample)
    return dealt
