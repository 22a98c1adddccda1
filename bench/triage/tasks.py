"""One child to run, and what is left of it when ops have crashed."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from bench.measure.rows import ROOT, Row
from bench.triage.verdicts import OK, SKIPPED, crashed

MODEL = "LightningDiT-XL/1"
#: Ops of a training step; the others belong to graphs and to the tokenizer.
STEP_OPS = ("rope_attention", "adaln_rms_norm", "gated_residual_adaln_rms_norm", "swiglu", "adamw_ema_")
SAMPLED_OPS = STEP_OPS[:-1]
#: Backend → the file of an op's folder that holds it, as in `kernels.registry.FILES`.
FILES = {"triton": "triton_impl.py", "cuda": "cuda_impl.py"}


def backends() -> dict[str, tuple[str, ...]]:
    """Op → its backends for devices, those of a training step first; read from the folders."""
    folders = {folder.parent.name: folder.parent for folder in (ROOT / "kernels").glob("*/reference.py")}
    names = [name for name in STEP_OPS if name in folders] + sorted(folders.keys() - set(STEP_OPS))
    return {name: tuple(b for b, file in FILES.items() if (folders[name] / file).exists()) for name in names}


class Known:
    """What the rows say of ops and of the machine so far."""

    def __init__(self, rows: Iterable[Row]):
        told = [row for row in rows if row["kind"] == "triage"]
        self._verdicts = {(row["op"], row["backend"]): row["verdict"] for row in told if row["part"] == "ops"}
        machine = next((row for row in reversed(told) if row["part"] == "machine"), {})
        self.extension_faults: list[str] = machine.get("extension") or []

    def crashed(self, op: str, backend: str) -> bool:
        return crashed(self._verdicts.get((op, backend), OK))

    def usable(self, op: str, backend: str) -> bool:
        """Whether nothing is known against it."""
        return self._verdicts.get((op, backend), OK) in (OK, SKIPPED)

    def instead(self, op: str, backend: str) -> str:
        """The first other backend of the op that has not crashed."""
        others = [name for name in backends()[op] if name != backend and not self.crashed(op, name)]
        return (others or ["reference"])[0]


@dataclass(frozen=True)
class Task:
    """A module to run as a child.

    Attributes:
        name: unique within its part.
        rows, result: whether it takes `--out FILE` for rows, and `--result FILE` for what it says of itself.
        ceilings, minutes: whether it takes `--ceilings FILE`, and `--minutes` to end by itself.
        about: keys of its verdict's row.
        note: what its rows have to say of how they came about.
        under: a program that runs it, such as a sanitizer, with its options.
        skip: why it is not to be run.
        adapt: what is left of it when ops have crashed.
        smaller: what is run where this is out of memory.
    """

    name: str
    module: str
    arguments: tuple[str, ...] = ()
    rows: bool = True
    result: bool = False
    ceilings: bool = True
    minutes: bool = True
    about: tuple[tuple[str, str], ...] = ()
    note: str = ""
    under: tuple[str, ...] = ()
    skip: str = ""
    adapt: Callable[["Task", Known], list["Task"]] = lambda task, known: [task]
    smaller: "Task | None" = None

    def adapted(self, known: Known) -> list["Task"]:
        return self.adapt(self, known)


def own(name: str, module: str, *arguments: str, about: tuple[tuple[str, str], ...] = (), **more) -> Task:
    """A child of this package, which says itself what became of it."""
    return Task(name, f"bench.triage.{module}", arguments, rows=False, result=True, ceilings=False, minutes=False,
                about=about, **more)  # fmt: skip


def check(op: str, backend: str, *options: str, **more) -> Task:
    return own(f"{op} {backend}", "check", op, backend, *options, about=(("op", op), ("backend", backend)), **more)


def step(variant: str, seconds: float, backend: str = "auto", in_graph: tuple[str, ...] = (), batch: int = 128) -> Task:
    """One way to train. In memory that is too small for 128 images it is tried with 64."""
    arguments = ("--model", MODEL, "--batch", str(batch), "--variant", variant, "--seconds", f"{seconds:g}")
    if backend != "auto":
        arguments += ("--kernels", backend)
    name = variant if backend == "auto" else f"{variant}+{backend}"
    smaller = None
    if batch == 128:
        less = step(variant, seconds, backend, in_graph, batch=64)
        smaller = replace(less, name=f"{name} at 64", note="at batch 64: out of memory at 128")
    if variant.startswith("plain"):
        return Task(name, "bench.step", arguments, smaller=smaller)

    def adapt(task: Task, known: Known) -> list[Task]:
        preferred = "triton" if backend == "auto" else backend
        if lost := [op for op in in_graph if known.crashed(op, "triton")]:
            return [replace(task, skip=f"{' and '.join(lost)} crashed on triton")]
        named = {op: known.instead(op, preferred) for op in STEP_OPS if known.crashed(op, preferred)}
        if not named:
            return [task]
        words = tuple(word for op, other in named.items() for word in ("--kernels", f"{op}={other}"))
        notes = [task.note, *(f"{op} on {other}: it crashed on {preferred}" for op, other in named.items())]
        less = None if task.smaller is None else adapt(task.smaller, known)[0]
        return [replace(task, arguments=task.arguments + words, note="; ".join(filter(None, notes)), smaller=less)]

    return Task(name, "bench.step", arguments, adapt=adapt, smaller=smaller)


def fractions(name: str, ops: tuple[str, ...], seconds: float) -> Task:
    """The headline case of each op in bfloat16, on the backends that were not wrong, beside the reference."""

    def adapt(task: Task, known: Known) -> list[Task]:
        groups: dict[tuple[str, ...], list[str]] = {}
        for op in ops:
            unusable = tuple(backend for backend in backends()[op] if not known.usable(op, backend))
            groups.setdefault(unusable, []).append(op)
        found = []
        for unusable, members in groups.items():
            invited = [backend for backend in (*FILES, "eager") if backend not in unusable]
            only = tuple(word for backend in invited for word in ("--only", backend))
            note = f"without {' and '.join(unusable)}, as they were not right" if unusable else ""
            label = " without ".join([name, *([" ".join(unusable)] if unusable else [])])
            found.append(replace(task, name=label, arguments=(*members, *task.arguments, *only), note=note))
        return found

    return Task(name, "bench.ops", ("--quick", "--seconds", f"{seconds:g}"), adapt=adapt)


def sampling(seconds: float) -> Task:
    def adapt(task: Task, known: Known) -> list[Task]:
        ways = {"auto": "triton", "cuda": "cuda"}
        variant = next((v for v, b in ways.items() if not any(known.crashed(op, b) for op in SAMPLED_OPS)), "reference")
        note = "" if variant == "auto" else f"with the ops of {variant}, as some crashed on triton"
        return [replace(task, arguments=(*task.arguments, "--variant", variant), note=note)]

    arguments = ("--variant", "plain-eager", "--seconds", f"{seconds:g}")
    return Task("sampling", "bench.sampling", arguments, adapt=adapt)


def encode(seconds: float) -> Task:
    def adapt(task: Task, known: Known) -> list[Task]:
        if not known.crashed("group_norm_silu", "triton"):
            return [task]
        variants = ("--variant", "reference", "--variant", "reference-channels-last")
        return [replace(task, arguments=task.arguments + variants, note="group_norm_silu crashed on triton")]

    return Task("encode", "bench.tokenizer", ("encode", "--quick", "--seconds", f"{seconds:g}"), adapt=adapt)


def build() -> Task:
    """The CUDA extension, where the one that is there does not run, or there is none."""

    def adapt(task: Task, known: Known) -> list[Task]:
        return [replace(task, note="; ".join(known.extension_faults))] if known.extension_faults else []

    return Task("extension", "setup", ("--quiet", "build_ext", "--inplace"), rows=False, ceilings=False, minutes=False,
                adapt=adapt)  # fmt: skip
