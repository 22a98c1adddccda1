"""What ends a trainer so that another one of the same run begins further back."""

from collections.abc import Mapping
from typing import Any

from launch.training.loader import Redrawn


class Rollback(Exception):
    """The run goes on from the checkpoint of `step`, its steps drawn as `redrawn` says; `reason` says why.

    time: `RunTime.state_dict` of the trainer that ends, whose hours the steps that are thrown away have taken, too.
    """

    def __init__(self, step: int, redrawn: tuple[Redrawn, ...], reason: str):
        super().__init__(reason)
        self.step, self.redrawn, self.reason = step, redrawn, reason
        self.time: Mapping[str, Any] = {}

    def line(self) -> str:
        """What the log says of it."""
        first, last, seed = self.redrawn[-1]
        return (
            f"{self.reason}: rolled back to step {self.step}; steps {first} to {last} are drawn anew from seed {seed}"
        )

    def event(self) -> dict:
        """The row of the log that says it."""
        first, last, seed = self.redrawn[-1]
        drawn = {"first": first, "last": last, "seed": seed}
        return {"step": self.step, "event": "rollback", "reason": self.reason, "redrawn": drawn}
