"""Time the tokenizer on a GPU: encoding, decoding, and whole training steps of VA-VAE f16d32 at 256 × 256.

    python -m bench.tokenizer [PART …] [--batch N] [--precision P] [--variant NAME] [--quick] [--out FILE]

Parts are encode, decode and train. Passes are judged beside the reference ops in float64; training steps, with VF loss,
LPIPS and GAN, by their first losses beside those of the reference ops. All weights are random, those of the frozen
networks too: their values change no speed. Ends with 1 if a contender is wrong or fails, with 2 if there is no GPU.
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from bench.measure import program
from bench.measure.breakdown import where_time_goes
from bench.measure.contest import Contest, Varied
from bench.measure.progress import Ready, Timed
from bench.measure.rows import Row
from bench.measure.timing import Lap
from kernels.testing.tolerance import mismatch
from vavae.config import AutoencoderConfig

if TYPE_CHECKING:
    from bench.entrants.tokenizer_training import Setting
    from bench.entrants.tokenizers import Truth

F16D32, SIZE = AutoencoderConfig(size="f16d32"), 256
#: Part → batches; the first of them with --quick. What a process trains at once is that of the published run on 8 GPUs.
BATCHES = {"encode": (32, 128, 8), "decode": (32, 128, 8), "train": (32, 8)}
#: How far a first loss may be from the reference ops': as for training steps of the transformer.
LOSS_TOLERANCE = 0.02
JUDGED_LOSSES = ("nll", "kl", "vf_distmat", "vf_cos", "d_loss")


@dataclass(frozen=True)
class Variant:
    """One way to run a part.

    Attributes:
        name: in rows.
        engine: "pass" (encoding, decoding), "trainer" (DeepSpeed, loader and all) or "bare" (neither).
        kernels: as `kernels.select` takes it.
        compile: a mode of `bench.entrants.training.compiled`; of encoder and decoder, in training of their levels.
        channels_last: memory format of what comes in, and of the weights where they are not trained.
    """

    name: str
    engine: str
    kernels: str = "auto"
    compile: str = "none"
    channels_last: bool = False

    @property
    def ours(self) -> bool:
        return self.kernels != "reference"

    def features(self) -> dict:
        """What a row says of it."""
        return {key: getattr(self, key) for key in ("engine", "kernels", "compile", "channels_last")}


PASSES = (
    Variant("auto", "pass"),
    Variant("auto-channels-last", "pass", channels_last=True),
    Variant("auto-compile-channels-last", "pass", compile="inductor", channels_last=True),
    Variant("reference", "pass", kernels="reference"),
    Variant("reference-channels-last", "pass", kernels="reference", channels_last=True),
    Variant("reference-compile", "pass", kernels="reference", compile="inductor"),
    Variant("reference-compile-channels-last", "pass", kernels="reference", compile="inductor", channels_last=True),
)
STEPS = (
    Variant("trainer", "trainer"),
    Variant("bare", "bare"),
    Variant("bare-channels-last", "bare", channels_last=True),
    Variant("reference", "bare", kernels="reference"),
    Variant("reference-compile", "bare", kernels="reference", compile="inductor"),
)
#: Part → contenders by name; "trainer" and "auto" are what the programs run.
VARIANTS: dict[str, dict[str, Variant]] = {
    part: {v.name: v for v in variants} for part, variants in (("encode", PASSES), ("decode", PASSES), ("train", STEPS))
}
QUICK = ("auto", "auto-channels-last", "reference", "reference-channels-last", "trainer", "bare")


@dataclass(frozen=True)
class Job(Varied):
    """One part, precision and batch, by several contenders."""

    part: str
    precision: str
    batch: int
    variants: tuple[Variant, ...]
    config: AutoencoderConfig = F16D32
    size: int = SIZE
    overrides: tuple[str, ...] = ()  # of the run file that is trained

    def __str__(self) -> str:
        return f"{self.part} batch {self.batch} {self.precision}"


def jobs(parts: list[str], batches: list[int], precisions: list[str], names: list[str], quick: bool) -> Iterator[Job]:
    """The batches that stand first for each part before all others; training is in bfloat16 alone."""
    found = []
    for part in parts:
        wanted = names or (QUICK if quick else VARIANTS[part])
        variants = tuple(variant for name, variant in VARIANTS[part].items() if name in wanted)
        for precision in ["bfloat16"] if part == "train" else precisions:
            for place, batch in enumerate(batches or BATCHES[part]):
                if variants and not (quick and place and not batches):
                    found.append((place, Job(part, precision, batch, variants)))
    yield from (job for _, job in sorted(found, key=lambda item: item[0]))


@dataclass(frozen=True)
class Bench(Contest):
    kind: ClassVar[str] = "tokenizer"

    def named(self, job: Job, name: str) -> Row:
        variant = job.variant(name)
        return {"part": job.part, "precision": job.precision, "batch": job.batch, "contender": name,
                "ours": variant.ours, "features": variant.features()}  # fmt: skip

    def set_up(self, job: Job) -> "Setting | Truth":
        if job.part == "train":
            from bench.entrants.tokenizer_training import Setting  # needs packages that a GPU machine may lack

            return Setting(job.batch, self.device.kind, job.overrides)
        from bench.entrants.tokenizers import Truth

        return Truth(job.part, job.config, job.size, job.batch, getattr(torch, job.precision), self.device.kind)

    def order(self, job: Job) -> list[str]:
        return sorted(job.names, key=lambda name: job.part != "train" or name != "reference")

    def prepare(self, job: Job, name: str, shared: Any) -> Ready:
        run, value = shared.contender(job.variant(name))
        for _ in range(2):  # compiles, tunes, fills caches
            run()
        about = {"flops": shared.flops * job.batch, **shared.about}
        return Ready({"": Lap(run)}, value, about, close=getattr(run, "close", lambda: None))

    def wrong(self, job: Job, values: Mapping[str, Any], shared: Any) -> dict[str, str]:
        if job.part == "train":
            return wrong_losses(values)
        found = {name: mismatch(job.part, value, shared.eager, shared.exact) for name, value in values.items()}
        return {name: why for name, why in found.items() if why}

    def figures(self, job: Job, timed: Timed) -> Row:
        seconds, dtype = timed.seconds(), getattr(torch, job.precision)
        return {"images_per_second": job.batch / seconds, **self.limits(timed.ready.about["flops"] / seconds, dtype)}

    def afterwards(self, job: Job, ready: Ready) -> Row:
        return where_time_goes(ready.laps[""].run, self.device.kind)

    def text(self, row: Row) -> str:
        head = f"{row['part']} batch {row['batch']} {row['precision']} {row['contender']:32}"
        if row["status"] != "ok":
            return f"{head} {row['status']}: {row['reason']}"
        share = f", {row['fraction']:.1%} of a large matmul" if row["fraction"] else ""
        memory = f", {row['peak_gb']:.1f} GB" if row["peak_gb"] else ""
        others = "".join(f", {ratio:.2f}x {name}" for name, ratio in row["times_faster_than"].items())
        return (f"{head} {row['images_per_second']:8.1f} images/s ({row['p50_ms']:.1f} ms ±{row['spread'] / 2:.1%}"
                f"{share}{memory}){others}")  # fmt: skip


def wrong_losses(values: Mapping[str, dict[str, float] | None]) -> dict[str, str]:
    """Contender → which of its first losses is not the reference ops'; the trainer draws noise of its own."""
    truth, found = values.get("reference"), {}
    for name, losses in values.items() if truth else ():
        off = [f"{key} {losses[key]:.5g} for {truth[key]:.5g}" for key in JUDGED_LOSSES if losses
               and not abs(losses[key] - truth[key]) <= LOSS_TOLERANCE * abs(truth[key])]  # fmt: skip
        if off:
            found[name] = f"first losses beside the reference ops': {', '.join(off)}"
    return found


def main(argv: list[str] | None = None) -> int:
    parser = program.parser("bench.tokenizer", __doc__, seconds=4.0)
    parser.add_argument("part", nargs="*", help=f"default: {', '.join(VARIANTS)}")
    parser.add_argument("--batch", action="append", type=int, help=f"images at once; repeatable; default: {BATCHES}")
    parser.add_argument("--precision", action="append", choices=("bfloat16", "float32"),
                        help="of encoding and decoding; repeatable; default: both, bfloat16 with --quick")  # fmt: skip
    names = list(dict.fromkeys(name for variants in VARIANTS.values() for name in variants))
    parser.add_argument("--variant", action="append", choices=names, help="repeatable; default: all")
    parser.add_argument("--quick", action="store_true", help=f"one batch of each part, {', '.join(QUICK)} alone")
    options = parser.parse_args(argv)
    for part in options.part:
        if part not in VARIANTS:
            parser.error(f"no part is called {part!r}; known: {', '.join(VARIANTS)}")
    precisions = options.precision or (["bfloat16"] if options.quick else ["bfloat16", "float32"])
    parts, batches, variants = options.part or list(VARIANTS), options.batch or [], options.variant or []
    todo = list(jobs(parts, batches, precisions, variants, options.quick))
    return program.run("bench.tokenizer", options, Bench, todo)


if __name__ == "__main__":
    sys.exit(main())
