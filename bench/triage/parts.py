"""The parts of a triage in their order, and the time that each may take."""

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

from bench.measure.rows import Row
from bench.triage.summary import slowest, worst_check
from bench.triage.tasks import (
    BUILD,
    ENCODE,
    IMAGES,
    SAMPLING,
    STEP_OPS,
    Fractions,
    Task,
    backends,
    check,
    step,
    triage_task,
)

#: Seconds that a step is timed for: a few dozen of the slowest.
STEP_SECONDS = 8.0
#: Where compute-sanitizer and ncu are, if they are not on the PATH.
TOOLKIT = Path("/usr/local/cuda/bin")
#: Of the representative case under a sanitizer, which makes kernels ten to a hundred times slower.
SANITIZED_SAMPLES = 2


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
        """Seconds of the budget for one task."""
        return self.budget / max(1, ceil(len(self.tasks) / self.at_once))

    def limit(self, waiting: int, left: float) -> float:
        """Seconds for the next of `waiting` tasks, where the part has `left` seconds.

        All but the shares of the tasks that have to wait for it; an equal part where even those are not left.
        """
        batches = ceil(waiting / self.at_once)
        return max(left / batches, left - (batches - 1) * self.share)


def allowance(part: Part, later: Sequence[Part], left: float) -> float:
    """Seconds that a part may take of those that are left.

    Its own budget; twice that and 20 s more, as long as every later essential part keeps its own.
    """
    spare = left - sum(other.budget for other in later if other.essential)
    return min(left, max(part.budget, min(2 * part.budget + 20, spare)))


def first_parts() -> tuple[Part, ...]:
    """Eight minutes, as an H200 with 16 cores took them, go as far as the fractions where the extension is built.

    The last four, estimated, are for a longer run, or one of their own: `--only variants --only others`.
    """
    existing = backends()
    graph_passes = ("linear_swiglu", "swiglu_linear_grad", "weight_gradients")
    others = tuple(op for op in existing if op not in (*STEP_OPS, *graph_passes))
    quick = ("--quick", "--seconds", "0.2")
    timed = (("step", STEP_OPS), ("graph", graph_passes), ("others", others))
    return (
        Part("machine", 13, (triage_task("machine", "machine"),)),
        Part("build", 60, (BUILD,)),
        Part("ceilings", 12, (Task("ceilings", "bench.roofline", ("--seconds", "0.15"), takes=("--out",)),)),
        Part("ops", 55, tuple(check(op, name) for op, names in existing.items() for name in names), at_once=5),
        Part("bare", 73, (step("bare", STEP_SECONDS),), essential=True),
        Part("plain-eager", 38, (step("plain-eager", STEP_SECONDS),), essential=True),
        Part("gemms", 25, (Task("gemms", "bench.gemms", ("--only", "torch", "--seconds", "0.15")),)),
        Part("trainer", 60, (step("trainer", STEP_SECONDS),), essential=True),
        Part("plain-compile", 110, (step("plain-compile", STEP_SECONDS),), essential=True),
        Part("fractions", 65, tuple(Fractions(name, "bench.ops", quick, ops=ops) for name, ops in timed)),
        Part(
            "variants",
            190,
            (
                step("bare-grouped", STEP_SECONDS, graph_passes=graph_passes[2:]),
                step("bare-folded", STEP_SECONDS, graph_passes=graph_passes[:2]),
                step("bare", STEP_SECONDS, backend="cuda"),
            ),
        ),
        Part("meanflow", 150, tuple(step(name, STEP_SECONDS) for name in ("meanflow", "plain-meanflow"))),
        Part("images", 60, (IMAGES,)),
        Part("others", 40, (SAMPLING, ENCODE)),
    )


def second_parts(rows: Iterable[Row]) -> tuple[Part, ...]:
    """Three more minutes, by the rows of a first run: each part gets the time that those before it have left.

    compute-sanitizer on the op that crashed or was wrong; ncu on the op farthest from its limit; CUDA graphs.
    """
    rows, found = list(rows), []
    if (row := worst_check(rows)) is not None:
        tasks = tuple(sanitized(row["op"], row["backend"], name) for name in ("memcheck", "racecheck"))
        found.append(Part("sanitizer", 120, tasks, essential=True))
    if (row := slowest(rows)) is not None:
        found.append(Part("ncu", 60, (profiled(row["op"], row["provider"], row["direction"]),)))
    graphs = replace(step("bare-cudagraphs", STEP_SECONDS), takes=("--minutes", "--out"))
    return (*found, Part("graphs", 60, (graphs,)))


def sanitized(op: str, backend: str, tool: str) -> Task:
    # Memory that torch keeps hides what lies just outside of a tensor.
    environment = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1")
    options = ("--tool", tool, "--error-exitcode", "9", "--print-limit", "20")
    task = check(op, backend, "--samples", str(SANITIZED_SAMPLES))
    return under("compute-sanitizer", options, replace(task, name=f"{tool} {op} {backend}"), environment)


def profiled(op: str, backend: str, direction: str) -> Task:
    # The clocks of a measurement, not the lower ones that ncu would fix.
    options = ("--clock-control", "none", "--profile-from-start", "off", "--set", "full", "--target-processes", "all")
    task = triage_task(f"{op} {backend} {direction}", "profile", op, backend, direction)
    return under("ncu", options, replace(task, takes=()))


def under(tool: str, options: tuple[str, ...], task: Task, environment: tuple[str, ...] = ()) -> Task:
    """The task, run by a tool of the CUDA toolkit; skipped where that is not installed."""
    path = find_tool(tool)
    skip = "" if path else f"{tool} is not installed"
    return replace(task, wrapper=(*environment, path or tool, *options), skip=skip)


def find_tool(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=str(TOOLKIT))


def select_parts(everything: Sequence[Part], only: Sequence[str]) -> tuple[Part, ...]:
    """The parts of these names, and of PART/TASK those tasks whose names begin so; ceilings for those that read them.

    Raises:
        ValueError: there is no such part or task.
    """
    if not only:
        return tuple(everything)
    parts = {part.name: part for part in everything}
    wanted: dict[str, set[Task]] = {}
    for text in only:
        name, slash, prefix = text.partition("/")
        if name not in parts:
            raise ValueError(f"no part is called {name!r}; allowed: {', '.join(parts)}")
        named = [task for task in parts[name].tasks if not slash or task.name.startswith(prefix)]
        if not named:
            raise ValueError(f"{name} has no {prefix!r}; allowed: {', '.join(task.name for task in parts[name].tasks)}")
        wanted.setdefault(name, set()).update(named)
    if any("--ceilings" in task.takes for tasks in wanted.values() for task in tasks):
        wanted["ceilings"] = set(parts["ceilings"].tasks)
    if "build" in wanted:  # decided by what the first child says of the extension
        wanted["machine"] = set(parts["machine"].tasks)
    found = []
    for part in everything:
        if tasks := tuple(task for task in part.tasks if task in wanted.get(part.name, ())):
            found.append(replace(part, budget=part.share * ceil(len(tasks) / part.at_once), tasks=tasks))
    return tuple(found)
