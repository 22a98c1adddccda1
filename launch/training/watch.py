"""Warnings of a run by the rows of its log, each said once until its cause has gone."""

from collections.abc import Mapping

from launch.training.task import Task, Warns


class Watch:
    """What in the rows of a run's log is a reason to worry: networks without a gradient, and what its task knows."""

    def __init__(self, task: Task):
        self._task = task
        self._causes: set[str] = set()

    def new_warnings(self, row: Mapping[str, float | None]) -> list[str]:
        """The warnings of a row whose causes the row before did not have."""
        found = zero_gradients(row)
        if isinstance(self._task, Warns):
            found |= self._task.warnings(row)
        new = [text for cause, text in found.items() if cause not in self._causes]
        self._causes = set(found)
        return new


def zero_gradients(row: Mapping[str, float | None]) -> dict[str, str]:
    """Cause → warning for each network whose gradient was exactly 0 in all steps of a row that reached it."""
    found = {}
    for key, value in row.items():
        network, _, figure = key.rpartition("/")
        if figure == "grad_norm" and value == 0:
            name = network or "network"
            found[f"zero gradient of {name}"] = (
                f"the gradient of the {name} was exactly 0 in every step since the last row: it learns nothing "
                "(a saturated loss, terms of weight 0, or weights that no loss reaches)"
            )
    return found
