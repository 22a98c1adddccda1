"""Variants of the workloads: which engine, backends, compilation and layouts a row of a comparison stands for.

Kept apart from the workloads themselves, whose packages a GPU machine may lack.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from bench.workloads import backends
from kernels.registry import Ops


@dataclass(frozen=True)
class Variant:
    """One way to run a workload.

    Attributes:
        name: in rows and on the command line.
        engine: of training, "trainer" (the trainer's loop, with DeepSpeed and the loader), "bare" (neither) or "plain"
            (the plain model); of sampling, "ours" (the sampler of `python -m launch sample`) or "plain"; "pass" encodes
            or decodes.
        kernels: "auto", or the backend of all ops that have it (`bench.workloads.backends`); of no meaning to "plain".
        compile: a mode of `kernels.compile.modes`; in sampling, "cudagraphs" captures whole steps.
    """

    name: str
    engine: str
    kernels: str = "auto"
    compile: str = "none"

    @property
    def ours(self) -> bool:
        """Whether it runs this project's code rather than a baseline."""
        return self.engine != "plain"

    def features(self) -> dict[str, Any]:
        """All but the name, for its row."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "name"}

    def ops(self) -> Ops:
        return backends.select(self.kernels, {})


@dataclass(frozen=True)
class TrainingVariant(Variant):
    """One way to train LightningDiT.

    Attributes:
        graph_passes: ops that take the place of nodes of the compiled graph, on Triton; the others leave it as it is.
        residual: dtype of the residual stream.
        recompute: `use_checkpoint` of the network.
        per_op: (op, backend) of the ops that have another one than `kernels`.
        deterministic: `train.deterministic`; the plain model is compiled as fast as the compiler can.
        objective: "flow", as the published recipe trains, or "meanflow" (`lightningdit.meanflow`), which the engine
            "trainer" lacks. Variants of one objective are compared with each other.
    """

    compile: str = "inductor"
    graph_passes: tuple[str, ...] = ()
    residual: str = "float32"
    recompute: bool | int | str = False
    per_op: tuple[tuple[str, str], ...] = ()
    deterministic: bool = True
    objective: str = "flow"

    def features(self) -> dict[str, Any]:
        return super().features() | {"per_op": dict(self.per_op)}

    def on(self, asked: Iterable[str]) -> "TrainingVariant":
        """The same on other backends, BACKEND or OP=BACKEND each, which its name says after a "+"; "plain" as it is.

        Raises:
            ValueError: as `backends.parse`.
        """
        backend, named = backends.parse(asked)
        words = [*([backend] if backend else []), *(f"{op}={name}" for op, name in named.items())]
        if self.engine == "plain" or not words:
            return self
        name = "+".join([self.name, *words])
        return replace(self, name=name, kernels=backend or self.kernels, per_op=tuple(named.items()))

    @property
    def named(self) -> dict[str, str]:
        """Backends of ops by name, where they are others than `kernels`."""
        return dict.fromkeys(self.graph_passes, "triton") | dict(self.per_op)

    def ops(self) -> Ops:
        return backends.select(self.kernels, self.named)


@dataclass(frozen=True)
class TokenizerVariant(Variant):
    """One way to run the tokenizer; in training, "plain" is the formulation of `bench.workloads.plain_tokenizer`.

    Attributes:
        channels_last: memory format of what comes in and of the weights; training has its own.
        precision: of trained and frozen weights, in training.
        optimizer: whether a training step is more than its gradients.
    """

    channels_last: bool = False
    precision: str = "bfloat16"
    optimizer: bool = True

    @property
    def ours(self) -> bool:
        return self.kernels != "reference"


@dataclass(frozen=True)
class ProgramVariant(Variant):
    """One way to run the whole sampling program; its engine is "program", or "plain": as it was.

    Attributes:
        at_once: images of a batch; None: as the program chooses.
    """

    at_once: int | None = None


V = TypeVar("V", bound=Variant)


def _by_name(*variants: V) -> dict[str, V]:
    return {variant.name: variant for variant in variants}


TRAINING = _by_name(
    TrainingVariant("trainer", "trainer"),
    TrainingVariant("trainer-bfloat16-stream", "trainer", residual="bfloat16"),
    TrainingVariant("bare", "bare"),
    TrainingVariant("bare-eager", "bare", compile="none"),
    TrainingVariant("bare-grouped", "bare", graph_passes=("weight_gradients",)),
    TrainingVariant("bare-folded", "bare", graph_passes=("linear_swiglu", "swiglu_linear_grad")),
    TrainingVariant("bare-reference", "bare", kernels="reference"),
    TrainingVariant("bare-cudagraphs", "bare", compile="cudagraphs"),
    TrainingVariant("bare-regional", "bare", compile="regional"),
    TrainingVariant("bare-by-timing", "bare", deterministic=False),
    TrainingVariant("bare-bfloat16-stream", "bare", residual="bfloat16"),
    TrainingVariant("bare-pointwise", "bare", recompute="pointwise"),
    TrainingVariant("plain-eager", "plain", compile="none"),
    TrainingVariant("plain-compile", "plain", deterministic=False),
    TrainingVariant("meanflow", "bare", objective="meanflow"),
    TrainingVariant("plain-meanflow", "plain", compile="none", objective="meanflow"),
)
SAMPLING = _by_name(
    Variant("auto", "ours"),
    Variant("auto-compile", "ours", compile="inductor"),
    Variant("auto-cudagraphs", "ours", compile="cudagraphs"),
    Variant("cuda", "ours", kernels="cuda"),
    Variant("reference", "ours", kernels="reference"),
    Variant("plain-eager", "plain", kernels="reference"),
    Variant("plain-compile", "plain", kernels="reference", compile="inductor"),
)
#: Samples with which `sample` calls the network on a CPU (`launch.sampling.units.UNIT`).
AT_ONCE = 16
#: The program as it is beside the program as it was, at its default batch and at as many at once.
SAMPLING_ON_CPU = _by_name(
    ProgramVariant("plain", "plain", at_once=4),
    ProgramVariant("program", "program"),
    ProgramVariant(f"plain-{AT_ONCE}", "plain", at_once=AT_ONCE),
)
_PASSES = _by_name(
    TokenizerVariant("auto", "pass"),
    TokenizerVariant("auto-channels-last", "pass", channels_last=True),
    TokenizerVariant("auto-compile-channels-last", "pass", compile="inductor", channels_last=True),
    TokenizerVariant("reference", "pass", kernels="reference"),
    TokenizerVariant("reference-channels-last", "pass", kernels="reference", channels_last=True),
    TokenizerVariant("reference-compile", "pass", kernels="reference", compile="inductor"),
    TokenizerVariant(
        "reference-compile-channels-last", "pass", kernels="reference", compile="inductor", channels_last=True
    ),
)
#: Part → its variants; "trainer" and "auto" are what the programs run.
TOKENIZER = {
    "encode": _PASSES,
    "decode": _PASSES,
    "train": _by_name(
        TokenizerVariant("trainer", "trainer"),
        TokenizerVariant("bare", "bare", compile="inductor"),
        TokenizerVariant("bare-eager", "bare"),
        TokenizerVariant("reference", "bare", kernels="reference"),
        TokenizerVariant("reference-compile", "bare", kernels="reference", compile="inductor"),
        TokenizerVariant("plain", "plain", kernels="reference", precision="float32"),
    ),
}
#: Gradients that a CPU can be asked for: what sharing them comes to, and the narrower numbers with it. Optimizers are
#: left out: ours is an op's definition there.
TOKENIZER_ON_CPU = _by_name(
    TokenizerVariant("plain", "plain", kernels="reference", precision="float32", optimizer=False),
    TokenizerVariant("bare-float32", "bare", precision="float32", optimizer=False),
    TokenizerVariant("bare", "bare", optimizer=False),
)
