"""Time lost to failures of GPUs, and the interval of checkpoints that loses least.

Failures come independently at a constant rate, so a run on n GPUs meets one every M = MTBF / n. Saving every τ with a
pause δ, and starting again in R, a run of T_s without failures takes

    T(τ) = M · e^(R/M) · (e^((τ + δ)/M) − 1) · T_s/τ

(Daly, Future Generation Computer Systems 22, 2006), which is least near Young's √(2 δ M) (Communications of
the ACM 17, 1974) and nearer to Daly's √(2 δ M) · (1 + √(δ/2M)/3 + δ/(2M)/9) − δ.
"""

import math
from dataclasses import dataclass


def daly_interval(pause: float, mean_time: float) -> float:
    """Time of work between two saves that loses least; M itself where a pause is as long as 2 M."""
    if pause >= 2 * mean_time:
        return mean_time
    ratio = pause / (2 * mean_time)
    return math.sqrt(2 * pause * mean_time) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - pause


@dataclass(frozen=True)
class Failures:
    """All in hours. mean_time: between failures of the whole run. written: from a pause until its checkpoint counts,
    whose work is lost too; it is taken as a part of starting again."""

    mean_time: float
    pause: float
    restart: float
    written: float = 0.0

    def best_interval(self) -> float:
        """Daly's, but at least what a save takes, as one is written at a time."""
        return max(daly_interval(self.pause, self.mean_time), self.written, self.pause)

    def overhead(self, interval: float) -> float:
        """Time that saves and failures add, as a share of the time without either; infinite where nothing gets done."""
        mean = self.mean_time
        exponent = (self.restart + self.written) / mean + (interval + self.pause) / mean
        if exponent > 500:
            return math.inf
        grown = math.expm1((interval + self.pause) / mean)
        return mean / interval * math.exp((self.restart + self.written) / mean) * grown - 1
