"""What a triage runs: parts in their order, and what each may cost."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from bench.triage.tasks import STEP_OPS, Task, backends, build, check, encode, fractions, own, sampling, step

#: Seconds that a step is timed for: a few dozen of the slowest.
STEP_SECONDS = 8.0


@dataclass(frozen=True)
class Part:
    """Tasks that belong together.

    Attributes:
        budget: seconds that it should take on 16 cores.
        at_once: processes at a time: one wherever times are measured.
        essential: no earlier part may take the time of this one.
    """

    name: str
    budget: float
    tasks: tuple[Task, ...]
    at_once: int = 1
    essential: bool = False

    @property
    def share(self) -> float:
        """What of the budget is for one task."""
        return self.budget / max(1, self._waves(len(self.tasks)))

    def limit(self, waiting: int, left: float) -> float:
        """Seconds for the next of so many tasks, where the part has so many left.

        All but the shares of those that have to wait for it; an equal part where even those are not left.
        """
        waves = self._waves(waiting)
        return max(left / waves, left - (waves - 1) * self.share)

    def _waves(self, tasks: int) -> int:
        """How often processes start, if all tasks take equally long."""
        return ceil(tasks / self.at_once)


def allowance(part: Part, later: Sequence[Part], left: float) -> float:
    """Seconds that a part may take of those that are left.

    Its own budget; twice that and 20 s more, as long as every later essential part keeps its own.
    """
    spare = left - sum(other.budget for other in later if other.essential)
    return min(left, max(part.budget, min(2 * part.budget + 20, spare)))


def parts() -> tuple[Part, ...]:
    """500 s if every budget is used up; those of a machine with everything in its caches are not."""
    having = backends()
    in_graph = ("linear_swiglu", "swiglu_linear_grad", "weight_gradients")
    others = tuple(op for op in having if op not in (*STEP_OPS, *in_graph))
    ceilings = Task("ceilings", "bench.roofline", ("--seconds", "0.15"), ceilings=False, minutes=False)
    return (
        Part("machine", 12, (own("machine", "machine"),)),
        Part("build", 60, (build(),)),
        Part("ceilings", 8, (ceilings,)),
        Part("ops", 55, tuple(check(op, name) for op, names in having.items() for name in names), at_once=5),
        Part("bare", 45, (step("bare", STEP_SECONDS),), essential=True),
        Part("plain-eager", 25, (step("plain-eager", STEP_SECONDS),), essential=True),
        Part("gemms", 15, (Task("gemms", "bench.gemms", ("--only", "torch", "--seconds", "0.15")),)),
        Part("trainer", 60, (step("trainer", STEP_SECONDS),), essential=True),
        Part("plain-compile", 100, (step("plain-compile", STEP_SECONDS),), essential=True),
        Part("fractions", 55, (fractions("step", STEP_OPS, 0.2), fractions("graph", in_graph, 0.2),
                               fractions("others", others, 0.2))),
        Part("variants", 90, (step("bare-grouped", STEP_SECONDS, in_graph=in_graph[2:]),
                              step("bare-folded", STEP_SECONDS, in_graph=in_graph[:2]),
                              step("bare", STEP_SECONDS, backend="cuda"))),
        Part("others", 35, (sampling(1.0), encode(1.0))),
    )  # fmt: skip


def chosen(everything: Sequence[Part], only: Sequence[str]) -> tuple[Part, ...]:
    """The parts of these names, and of PART/TASK those tasks whose names begin so; ceilings for those that read them.

    Raises:
        ValueError: there is no such part or task.
    """
    if not only:
        return tuple(everything)
    wanted: dict[str, set[Task]] = {}
    for text in only:
        name, slash, prefix = text.partition("/")
        part = next((part for part in everything if part.name == name), None)
        if part is None:
            raise ValueError(f"no part is called {name!r}; allowed: {', '.join(part.name for part in everything)}")
        tasks = [task for task in part.tasks if not slash or task.name.startswith(prefix)]
        if not tasks:
            raise ValueError(f"{name} has no {prefix!r}; allowed: {', '.join(task.name for task in part.tasks)}")
        wanted.setdefault(name, set()).update(tasks)
    if any(task.ceilings for tasks in wanted.values() for task in tasks):
        wanted.setdefault("ceilings", set()).update(next(p for p in everything if p.name == "ceilings").tasks)
    if "build" in wanted:  # which is decided by what the first child says of the extension
        wanted.setdefault("machine", set()).update(next(p for p in everything if p.name == "machine").tasks)
    found = []
    for part in everything:
        tasks = tuple(task for task in part.tasks if task in wanted.get(part.name, ()))
        budget = part.share * ceil(len(tasks) / part.at_once)
        if tasks:
            found.append(Part(part.name, budget, tasks, part.at_once, part.essential))
    return tuple(found)
