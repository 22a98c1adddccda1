"""The JSON files of a checkpoint as records: `manifest.json` and `state.json`, checked when they are read."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from common.records import ClassNames, FileRecord, Record

_FILE_NAME = r"^(state\.json|[A-Za-z0-9_]+\.[a-z_]+\.safetensors)$"
Count = Annotated[int, Field(ge=0)]


class Manifest(Record):
    """`manifest.json`: what makes a checkpoint complete."""

    format: Annotated[int, Field(ge=1, le=1)]
    step: Count
    files: dict[Annotated[str, StringConstraints(pattern=_FILE_NAME)], FileRecord]


def _whole(value: float) -> float:
    if not value.is_integer():
        raise ValueError(f"a whole number is wanted (got {value})")
    return value


Whole = Annotated[float, Field(ge=0), AfterValidator(_whole)]


class Counters(Record):
    """`AdamWEma.read_counters`; earlier checkpoints lack the most in a row."""

    applied: Whole
    skipped: Whole
    skipped_in_a_row: Whole
    most_skipped_in_a_row: Whole = 0.0

    @model_validator(mode="after")
    def _in_a_row_are_some(self) -> "Counters":
        if max(self.skipped_in_a_row, self.most_skipped_in_a_row) > self.skipped:
            raise ValueError(
                f"{self.skipped_in_a_row:g} skipped in a row, at most {self.most_skipped_in_a_row:g}, but "
                f"{self.skipped:g} in all"
            )
        return self


class MeterState(Record):
    """The sums in one process's `Meter` (`launch.training.log`); `counts`: the names of integers."""

    sums: dict[str, tuple[float, Annotated[float, Field(ge=0)]]]
    counts: tuple[str, ...]

    @model_validator(mode="after")
    def _counts_are_known(self) -> "MeterState":
        if not self.sums:  # then earlier checkpoints have the names of before
            return self
        for name in self.counts:
            if name not in self.sums:
                raise ValueError(f"counts: {name!r} is not one of the sums, {', '.join(map(repr, self.sums))}")
            if not self.sums[name][0].is_integer():
                raise ValueError(f"counts: {name!r} is no count, its sum is {self.sums[name][0]}")
        return self


class SkippedStep(Record):
    """A step that was skipped, as `SkippedSteps.read` gives it."""

    step: Annotated[int, Field(ge=1)]
    network: str
    not_finite: Literal["loss", "gradient"]
    ranks: tuple[Count, ...]


class LossState(Record):
    """`Spikes.state_dict`: the last losses, spikes since the last row, the present spike, and one that lasted, of which
    earlier checkpoints say nothing."""

    last: tuple[Annotated[float, Field(allow_inf_nan=False)], ...]
    spikes: Count
    in_a_row: Count
    first: Annotated[int, Field(ge=1)] | None
    found: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = None


class RowState(Record):
    """The part of a row of the log that was not yet due. `meters`: by rank, all with the same names."""

    meters: tuple[MeterState, ...] = Field(min_length=1)
    skipped_steps: tuple[SkippedStep, ...]

    @model_validator(mode="after")
    def _same_names(self) -> "RowState":
        first = self.meters[0]
        if any(m.sums.keys() != first.sums.keys() or m.counts != first.counts for m in self.meters):
            raise ValueError("the processes' meters have other names")
        return self


class TaskState(Record):
    """The state of a `Task`, which checks all but the classes itself."""

    classes: ClassNames | None = None


class RunSections(Record):
    """The run file, as far as both models' have the same sections; `launch.config.stored_run` checks all of it."""

    model: dict[str, Any]
    data: dict[str, Any]
    train: dict[str, Any]
    optimizer: dict[str, Any]


class State(Record):
    """`state.json`: all that is not a tensor. `counters` are by network.

    `hours`, `gpu_hours` and `started` (Unix time): see `launch.training.progress.RunTime`; earlier ones lack them.
    """

    kind: str
    step: Count
    global_batch_size: Annotated[int, Field(ge=1)]
    seed: Count
    num_samples: Annotated[int, Field(ge=1)]
    counters: dict[str, Counters] = Field(min_length=1)
    task: TaskState
    ops: dict[str, Any]
    config: RunSections
    versions: dict[str, str]
    since_last_row: RowState | None = None
    losses: LossState | None = None
    redrawn: tuple[tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)], Count], ...] = ()
    hours: Annotated[float, Field(ge=0)] | None = None
    gpu_hours: Annotated[float, Field(ge=0)] | None = None
    started: Annotated[float, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _agrees_with_counters(self) -> "State":
        """One network has met every step; a discriminator begins later."""
        met = [c.applied + c.skipped for c in self.counters.values()]
        if max(met) != self.step:
            raise ValueError(f"step {self.step} where the optimizers have counted {', '.join(f'{m:g}' for m in met)}")
        for each in self.since_last_row.skipped_steps if self.since_last_row else ():
            if each.network not in self.counters or each.step > self.step:
                raise ValueError(
                    f"since_last_row.skipped_steps: step {each.step} of {each.network!r}, in step "
                    f"{self.step} of {', '.join(map(repr, self.counters))}"
                )
        return self
