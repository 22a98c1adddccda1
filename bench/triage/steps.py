"""What steps that were timed in processes of their own say of each other: first losses, and ratios of their times."""

from collections import defaultdict
from collections.abc import Sequence

from bench.measure.losses import wrong_losses
from bench.measure.rows import Row


def judged(rows: Sequence[Row]) -> list[Row]:
    """The rows that have to be written anew: wrong beside the plain model's first loss, or with new ratios.

    Only steps of the same model and batch are compared: others see other latents, and times of other images.
    """
    groups: dict[tuple, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        if row["status"] == "ok":
            groups[row["model"], row["batch"], row["gpu"], row["revision"]][row["variant"]] = row
    changed = []
    for steps in groups.values():
        wrong = wrong_losses({name: row.get("loss") for name, row in steps.items()})
        right = {name: row for name, row in steps.items() if name not in wrong}
        for name, row in steps.items():
            if name in wrong:
                changed.append(row | {"status": "incorrect", "reason": wrong[name], "times_faster_than": {}})
                continue
            ratios = {other: there["p50_ms"] / row["p50_ms"] for other, there in right.items() if other != name}
            if ratios != row["times_faster_than"]:
                changed.append(row | {"times_faster_than": ratios})
    return changed
