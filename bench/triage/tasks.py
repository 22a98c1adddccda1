"""Tasks of a triage: a module to run as a child process, and its adaptation to ops that have crashed before."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from bench.measure.host import cores
from bench.measure.rows import ROOT, Row
from bench.triage.verdicts import OK, SKIPPED, crashed, outcomes

MODEL = "LightningDiT-XL/1"
#: Ops of a training step; the others belong to graphs and to the tokenizer.
STEP_OPS = ("rope_attention", "adaln_rms_norm", "gated_residual_adaln_rms_norm", "swiglu", "adamw_ema_")
SAMPLED_OPS = STEP_OPS[:-1]
#: Backends in the order of "auto", of ops whose first is not Triton; as in `kernels`.
AUTO = {"rope_attention": ("cuda", "triton")}
#: Backend → its file in an op's folder, as in `kernels.registry.FILES`.
FILES = {"triton": "triton_impl.py", "cuda": "cuda_impl.py", "library": "library_impl.py"}


def backends() -> dict[str, tuple[str, ...]]:
    """Op → its backends for devices, those of a training step first; read from the folders."""
    folders = {folder.parent.name: folder.parent for folder in (ROOT / "kernels").glob("*/reference.py")}
    names = [name for name in STEP_OPS if name in folders] + sorted(folders.keys() - set(STEP_OPS))
    return {name: tuple(b for b, file in FILES.items() if (folders[name] / file).exists()) for name in names}


class Findings:
    """Verdicts on ops, and faults of the CUDA extension, by the rows so far."""

    def __init__(self, rows: Iterable[Row]):
        found = outcomes(rows)
        self._verdicts = {(row["op"], row["backend"]): row["verdict"] for row in found if row["part"] == "ops"}
        machine = next((row for row in reversed(found) if row["part"] == "machine"), {})
        self.extension_faults: list[str] = machine.get("extension") or []

    def crashed(self, op: str, backend: str) -> bool:
        return crashed(self._verdicts.get((op, backend), OK))

    def usable(self, op: str, backend: str) -> bool:
        """Whether nothing is known against it."""
        return self._verdicts.get((op, backend), OK) in (OK, SKIPPED)

    def absent(self, op: str, backend: str) -> bool:
        """Whether its check was skipped: it cannot run here."""
        return self._verdicts.get((op, backend)) == SKIPPED

    def taken(self, op: str, backend: str) -> str:
        """The backend that runs where this one, or "auto", is asked for."""
        if backend != "auto":
            return backend
        order = AUTO.get(op, ("triton",))
        return next((name for name in order if not self.absent(op, name)), order[-1])

    def fallback(self, op: str, backend: str) -> str:
        """The first other backend of the op that can run here and has not crashed."""
        others = (name for name in backends()[op] if name != backend)
        return next((name for name in others if not (self.crashed(op, name) or self.absent(op, name))), "reference")


@dataclass(frozen=True)
class Task:
    """A module to run as a child.

    Attributes:
        name: unique within its part.
        takes: options it is given values for: `--out FILE` for rows, `--result FILE` for its own verdict,
            `--ceilings FILE` of an earlier child, `--minutes` to end by itself.
        about: keys of its verdict's row.
        note: a remark for its rows, such as a backend in the place of another.
        wrapper: a program that runs it, such as a sanitizer, with its options.
        skip: why it is not to be run.
        smaller: the task to run where this one is out of memory.
    """

    name: str
    module: str
    arguments: tuple[str, ...] = ()
    takes: tuple[str, ...] = ("--minutes", "--ceilings", "--out")
    about: tuple[tuple[str, str], ...] = ()
    note: str = ""
    wrapper: tuple[str, ...] = ()
    skip: str = ""
    smaller: "Task | None" = None

    def adapted(self, findings: Findings) -> "list[Task]":
        """The tasks to run in its place when some ops have crashed: none, itself, others, or several."""
        return [self]


def triage_task(name: str, module: str, *arguments: str, **more) -> Task:
    """A child of this package, which reports its own verdict."""
    return Task(name, f"bench.triage.{module}", arguments, takes=("--result",), **more)


def check(op: str, backend: str, *options: str, **more) -> Task:
    return triage_task(
        f"{op} {backend}", "check", op, backend, *options, about=(("op", op), ("backend", backend)), **more
    )


@dataclass(frozen=True)
class Step(Task):
    """Training steps of one variant.

    Attributes:
        backend: that of the ops, "auto" for the default choice.
        graph_passes: ops that the variant puts into its graphs, by Triton.
    """

    backend: str = "auto"
    graph_passes: tuple[str, ...] = ()

    def adapted(self, findings: Findings) -> list[Task]:
        """With other backends for ops that have crashed, skipped where an op of its graphs has."""
        if self.name.startswith("plain"):
            return [self]
        if lost := [op for op in self.graph_passes if findings.crashed(op, "triton")]:
            return [replace(self, skip=f"{' and '.join(lost)} crashed on triton")]
        running = {op: findings.taken(op, self.backend) for op in STEP_OPS}
        crashed = {op: name for op, name in running.items() if findings.crashed(op, name)}
        if not crashed:
            return [self]
        named = {op: findings.fallback(op, name) for op, name in crashed.items()}
        words = tuple(word for op, other in named.items() for word in ("--kernels", f"{op}={other}"))
        notes = [self.note, *(f"{op} on {other}: it crashed on {crashed[op]}" for op, other in named.items())]
        smaller = None if self.smaller is None else self.smaller.adapted(findings)[0]
        note = "; ".join(filter(None, notes))
        return [replace(self, arguments=self.arguments + words, note=note, smaller=smaller)]


def step(variant: str, seconds: float, backend: str = "auto", graph_passes: tuple[str, ...] = ()) -> Step:
    """A variant at 128 images a step, and at 64 where memory is too small."""
    chosen = () if backend == "auto" else ("--kernels", backend)
    name = "+".join((variant, *chosen[1:]))

    def at(batch: int, name: str, **more) -> Step:
        arguments = ("--model", MODEL, "--batch", str(batch), "--variant", variant, "--seconds", f"{seconds:g}")
        return Step(name, "bench.step", arguments + chosen, backend=backend, graph_passes=graph_passes, **more)

    return at(128, name, smaller=at(64, f"{name} at 64", note="at batch 64: out of memory at 128"))


@dataclass(frozen=True)
class Fractions(Task):
    """The representative case of each of `ops` in bfloat16, beside the reference."""

    ops: tuple[str, ...] = ()

    def adapted(self, findings: Findings) -> list[Task]:
        """One child for each set of backends that were not wrong."""
        groups: dict[tuple[str, ...], list[str]] = {}
        for op in self.ops:
            unusable = tuple(backend for backend in backends()[op] if not findings.usable(op, backend))
            groups.setdefault(unusable, []).append(op)
        found: list[Task] = []
        for unusable, ops in groups.items():
            only = (word for name in (*FILES, "eager") if name not in unusable for word in ("--only", name))
            note = f"without {' and '.join(unusable)}, as they were not right" if unusable else ""
            name = f"{self.name} without {' '.join(unusable)}" if unusable else self.name
            found.append(replace(self, name=name, arguments=(*ops, *self.arguments, *only), note=note))
        return found


class Sampling(Task):
    def adapted(self, findings: Findings) -> list[Task]:
        """Beside the plain model one variant whose ops have not crashed."""

        def sound(variant: str) -> bool:
            running = ((op, findings.taken(op, variant)) for op in SAMPLED_OPS)
            return not any(findings.crashed(*pair) or findings.absent(*pair) for pair in running)

        variant = next(filter(sound, ("auto", "cuda")), "reference")
        note = "" if variant == "auto" else f"with the ops of {variant}, as some of auto crashed"
        return [replace(self, arguments=(*self.arguments, "--variant", variant), note=note)]


class Encode(Task):
    def adapted(self, findings: Findings) -> list[Task]:
        if not findings.crashed("group_norm_silu", "triton"):
            return [self]
        variants = ("--variant", "reference", "--variant", "reference-channels-last")
        return [replace(self, arguments=self.arguments + variants, note="group_norm_silu crashed on triton")]


class Build(Task):
    def adapted(self, findings: Findings) -> list[Task]:
        """Itself where the extension that is there does not run, or there is none."""
        return [replace(self, note="; ".join(findings.extension_faults))] if findings.extension_faults else []


SAMPLING = Sampling("sampling", "bench.sampling", ("--variant", "plain-eager", "--seconds", "1"))
ENCODE = Encode("encode", "bench.tokenizer", ("encode", "--quick", "--seconds", "1"))
IMAGES = Task(
    "images",
    "bench.data",
    ("--images", "--workers", str(cores()), "--seconds", "0.5"),
    takes=("--minutes", "--out"),
)
BUILD = Build("extension", "setup", ("--quiet", "build_ext", "--inplace"), takes=())
