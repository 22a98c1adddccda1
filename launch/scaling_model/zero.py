"""What the processes of a run send each other in a step, under each ZeRO stage.

The paper counts, in multiples of the parameters Ψ, an all-reduce of gradients (2 Ψ) for stage 0, a reduce-scatter of
gradients and an all-gather of weights (2 Ψ) for 1 and 2, and an all-gather more (3 Ψ) for 3 (Rajbhandari et al., arXiv
1910.02054, section 7). Runs of this project send more under 1 and 2: DeepSpeed there has every process sum the whole
gradient (see `launch.training.deepspeed_options`), and under 2 and 3 it sums after every micro-batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from launch.scaling_model.network import Network, Operation, Traffic, collective

STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Exchange:
    """A collective of all parameters, `times` in a step.

    when: "backward" (can travel while gradients are made), "forward" (while layers before are computed), "after"
    (everything waits for it).
    """

    operation: Operation
    bytes_per_parameter: int
    times: int
    when: Literal["forward", "backward", "after"]


def exchanges(
    stage: int, accumulation: int, weight_bytes: int, gradient_bytes: int, *, least: bool = False
) -> list[Exchange]:
    """The collectives of a step. least: as few as the paper counts, with gradients summed once in a step."""
    sums = accumulation if stage >= 2 and not least else 1
    if stage == 0:
        return [Exchange("all_reduce", gradient_bytes, 1, "after")]  # DeepSpeed begins when the backward pass has ended
    if stage == 3:
        gathered = 1 if least else accumulation
        return [
            Exchange("all_gather", weight_bytes, gathered, "forward"),
            Exchange("all_gather", weight_bytes, gathered, "backward"),
            Exchange("reduce_scatter", gradient_bytes, sums, "backward"),
        ]
    operation: Operation = "reduce_scatter" if least else "all_reduce"
    return [
        Exchange(operation, gradient_bytes, sums, "backward"),
        Exchange("all_gather", weight_bytes, 1, "after"),
    ]


def step_traffic(parameters: int, gpus: int, network: Network, exchanged: Sequence[Exchange]) -> Traffic:
    """All that one GPU sends in a step."""
    total = Traffic()
    for each in exchanged:
        total += collective(each.operation, parameters * each.bytes_per_parameter, gpus, network) * each.times
    return total


def exposed_seconds(buckets: Sequence[float], backward: float, *, overlapped: bool) -> float:
    """Seconds by which the sums of gradients end after the backward pass, which takes `backward`.

    Args:
        buckets: seconds that each bucket takes, in the order in which they fill; the gradients fill them at an even
            rate, in shares as large as these, and each is sent when it is full and the one before has arrived.
        overlapped: whether they can travel during the backward pass at all.
    """
    if not overlapped or not buckets:
        return sum(buckets)
    total, filled, sent = sum(buckets), 0.0, 0.0
    for bucket in buckets:
        filled += bucket / total * backward if total else 0.0
        sent = max(sent, filled) + bucket
    return sent - backward


def bucket_sizes(parameters: int, bucket: int) -> list[int]:
    """Parameters in each bucket of at most `bucket`, in the order in which they fill."""
    whole, rest = divmod(parameters, bucket)
    return [bucket] * whole + ([rest] if rest else [])
