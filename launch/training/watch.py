"""Warnings of a run by the rows of its log, each said once until its cause has gone, and rows in short."""

from collections.abc import Mapping
from typing import Any

from launch.training.task import Task, Warns

Row = Mapping[str, Any]
#: Rows in a row in which a block has no gradient before it is said: adaLN-zero and the zeros of the last layer leave
#: most blocks without one in the first two steps (arXiv 2212.09748, section 3.2).
ROWS_WITHOUT_GRADIENT = 3
#: Runs with larger attention logits diverged (Wortsman et al., arXiv 2309.14322).
LARGEST_LOGIT = 1e4


class Watch:
    """What in the rows of a run's log is a reason to worry: gradients, losses, figures, and what its task knows."""

    def __init__(self, task: Task):
        self._task = task
        self._causes: set[str] = set()
        self._without_gradient: dict[str, int] = {}  # block → rows in a row

    def new_warnings(self, row: Row) -> list[str]:
        """The warnings of a row whose causes the row before did not have."""
        found = zero_gradients(row) | self._zero_blocks(row) | loss_spikes(row) | figures(row)
        if isinstance(self._task, Warns):
            found |= self._task.warnings(row)
        new = [text for cause, text in found.items() if cause not in self._causes]
        self._causes = set(found)
        return new

    def _zero_blocks(self, row: Row) -> dict[str, str]:
        """One warning for all blocks that had no gradient for some rows; another where they are others."""
        zero = row.get("zero_gradient_blocks", ())
        self._without_gradient = {name: self._without_gradient.get(name, 0) + 1 for name in zero}
        names = [name for name, rows in self._without_gradient.items() if rows >= ROWS_WITHOUT_GRADIENT]
        if not names:
            return {}
        some = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        rows = f"in the last steps of {ROWS_WITHOUT_GRADIENT} rows"
        return {f"zero gradient of blocks {names}": f"the gradient of {some} was exactly 0 {rows}: no loss reaches it"}


def zero_gradients(row: Row) -> dict[str, str]:
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


def loss_spikes(row: Row) -> dict[str, str]:
    """A warning where losses of a row were spikes."""
    spikes, median = row.get("loss_spikes"), row.get("loss_median")
    if not spikes or median is None:
        return {}
    steps = "1 step" if spikes == 1 else f"{spikes} steps"
    return {"loss spikes": f"the loss of {steps} since the last row was a spike, far above its median {median:.4g}"}


def figures(row: Row) -> dict[str, str]:
    """A warning where what `train.watch` measures is not finite, or attention logits are too large."""
    watched = {key: value for key, value in row.items() if key.startswith("watch/")}
    found = {}
    lost = [key for key, value in watched.items() if value is None]
    if lost:
        found["figures not finite"] = f"{lost[0]} is not finite" + (f", nor are {len(lost) - 1} more" * (len(lost) > 1))
    logits = {k: v for k, v in watched.items() if "attention_logit_max/" in k and v is not None and v > LARGEST_LOGIT}
    if logits:
        worst = max(logits, key=logits.__getitem__)
        found["attention logits"] = (
            f"{worst} is {logits[worst]:.4g}: attention with logits above {LARGEST_LOGIT:g} does not recover "
            "(arXiv 2309.14322); QK norm (use_qknorm) keeps them small"
        )
    return found


def in_short(row: Row) -> dict[str, Any]:
    """A row for a line of text: of each figure of `train.watch` the largest alone, of names how many there are."""
    short: dict[str, Any] = {}
    worst: dict[str, tuple[float, str]] = {}
    for key, value in row.items():
        if key.startswith("watch/"):
            figure, _, block = key.removeprefix("watch/").partition("/")
            size = float("inf") if value is None else value
            worst[figure] = max(worst.get(figure, (size, block)), (size, block))
        elif isinstance(value, list | tuple):
            short[key] = len(value)
        elif key == "loss_median" or (key == "loss_spikes" and not value):
            continue
        else:
            short[key] = value
    for figure, (value, block) in worst.items():
        short[f"{figure} {block}"] = None if value == float("inf") else value
    return short
