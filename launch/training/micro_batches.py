"""Which micro-batch sizes fit a card's memory, and what to override so that a run does."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from launch.training.memory import STAGES, Memory, NetworkCost, Setup, memory_of, usable

LATENTS_IN_FILES = "data.placement=host"
#: As a shell takes it.
OFFLOAD = "'deepspeed.overrides.zero_optimization.offload_optimizer={device: cpu}'"

#: A value of `use_checkpoint`: the networks' costs under it.
Costs = Mapping[bool | int | str, Sequence[NetworkCost]]


def dividing(number: int, near: int) -> list[int]:
    """The divisors of `number` next to `near`, below and above it, or `near` itself."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    if near in divisors:
        return [near]
    return [d for d in (max((d for d in divisors if d < near), default=0), *(d for d in divisors if d > near)) if d][:2]


def nearest_that_divide(number: int, near: int) -> str:
    """The same for a message: `4 and 8`."""
    return " and ".join(f"{d:,}" for d in dividing(number, near))


def as_yaml(kind: bool | int | str) -> str:
    """A value of `use_checkpoint` as a run file says it."""
    return str(kind).lower() if isinstance(kind, bool) else str(kind)


@dataclass(frozen=True)
class Fit:
    """What fits a card of `card` bytes.

    Fields:
        costs: of the networks, by each `use_checkpoint` that the run may have.
        kind, stage: the run's own `use_checkpoint` and ZeRO stage.
        stages: those that the run may have.
        per_process: images of a step on each process.
        files: the `deepspeed.file` that a stage goes with; those that are not there go with the run's own.
        kind_key: the key that decides about `use_checkpoint`.
    """

    costs: Costs
    setup: Setup
    card: float
    per_process: int
    stage: int
    kind: bool | int | str
    stages: Sequence[int] = STAGES
    files: Mapping[int, str | None] = field(default_factory=dict)
    kind_key: str = "train.use_checkpoint"

    def memory(self, stage: int, kind: bool | int | str, micro_batch_size: int) -> Memory:
        accumulation = self.per_process // micro_batch_size
        return memory_of(self.costs[kind], self.setup, stage, micro_batch_size, accumulation)

    def largest(self, stage: int, kind: bool | int | str) -> int:
        """The largest micro-batch size that divides a process's images and fits; 0: not even one image."""
        sizes = [d for d in range(self.per_process, 0, -1) if self.per_process % d == 0]
        fitting = (size for size in sizes if self.memory(stage, kind, size).peak <= usable(self.card))
        return next(fitting, 0)

    def table(self) -> list[str]:
        """Rows of the largest sizes, by stage and `use_checkpoint`."""
        kinds = list(self.costs)
        rows = ["    use_checkpoint " + "".join(f"{as_yaml(kind):>11}" for kind in kinds)]
        for stage in self.stages:
            sizes = [self.largest(stage, kind) or "none" for kind in kinds]
            rows.append(f"    ZeRO {stage}         " + "".join(f"{size:>11}" for size in sizes))
        return rows

    def suggestion(self, micro_batch_size: int) -> str | None:
        """Overrides with which the run fits, or with which it takes more images at once; None: nothing helps.

        The first that serves: another micro-batch size, then checkpointing of more, then a higher stage, and where it
        does not fit with any of them, with fewer things in the card's memory.
        """
        if self.memory(self.stage, self.kind, micro_batch_size).peak <= usable(self.card):
            return self._suggestion(micro_batch_size)
        found = ((keys, fit._suggestion(None)) for keys, fit in [("", self), *self._relieved()])
        return next((f"{rest}{keys}" for keys, rest in found if rest is not None), None)

    def _relieved(self) -> Iterator[tuple[str, "Fit"]]:
        """The same run with latents, the optimizer or both in the host's memory, and the overrides that do that."""
        latents = replace(self.setup, latents=0.0)
        zero = {**self.setup.zero, "offload_optimizer": {"device": "cpu"}}
        options = {**self.setup.options, "zero_optimization": zero}
        stages = [stage for stage in self.stages if stage > 0]
        held, computed = self.setup.latents > 0, bool(stages) and not self.setup.offloads("offload_optimizer")
        if held:
            yield f" {LATENTS_IN_FILES}", replace(self, setup=latents)
        if computed:
            yield f" {OFFLOAD}", replace(self, setup=replace(self.setup, options=options), stages=stages)
        if held and computed:
            keys = f" {LATENTS_IN_FILES} {OFFLOAD}"
            yield keys, replace(self, setup=replace(latents, options=options), stages=stages)

    def _suggestion(self, fitting: int | None) -> str | None:
        """The same without other places. fitting: the micro-batch size with which the run fits, if it does."""
        kinds = list(self.costs)
        kinds = kinds[kinds.index(self.kind) :]
        # For one process a higher stage shares nothing out: it is only what lets the host hold the optimizer.
        higher = self.setup.processes > 1 or self.setup.offloads("offload_optimizer")
        stages = [self.stage, *(s for s in self.stages if s > self.stage and higher)]
        for stage, kind in [(s, k) for s in stages for k in kinds]:
            size = self.largest(stage, kind)
            if size > (fitting or 0):
                return " ".join(self._overrides(stage, kind, size))
            if fitting is not None:
                return None
        return None

    def _overrides(self, stage: int, kind: bool | int | str, size: int) -> list[str]:
        overrides = [f"train.micro_batch_size={size}"]
        if kind != self.kind:
            overrides.append(f"{self.kind_key}={as_yaml(kind)}")
        if stage != self.stage:
            overrides.append(f"deepspeed.zero_stage={stage}")
            own = self.files.get(self.stage)
            if (file := self.files.get(stage, own)) != own:
                overrides.append(f"deepspeed.file={file}")
        return overrides
