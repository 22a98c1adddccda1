"""Time the tokenizer on a GPU: encoding, decoding, and whole training steps of VA-VAE f16d32 at 256 × 256.

    python -m bench.tokenizer [PART …] [--batch N] [--precision P] [--variant NAME] [--quick] [--out FILE]
    python -m bench.tokenizer --cpu [--batch N]

Parts are encode, decode and train. Passes are checked against the reference ops in float64; training steps, with VF
loss, LPIPS and GAN, by their first losses against those of the reference ops. All weights are random, also of
the frozen networks: values change no speed. Ends with 1 if a provider is wrong or fails, with 2 if there is no GPU.

`--cpu` times the gradients of both networks in training steps of f16d32 at 64 × 64, with a small vision transformer, on
the CPU, beside those of the plain formulation, for the ratio.
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from bench.measure import program
from bench.measure.breakdown import where_time_goes
from bench.measure.comparison import Comparison, Varied, mismatches
from bench.measure.cutoff import Deadline
from bench.measure.progress import Ready
from bench.measure.rows import Log, Row
from bench.measure.timing import HostDevice, Iteration
from bench.workloads.variants import TOKENIZER, TOKENIZER_ON_CPU, TokenizerVariant
from vavae.config import AutoencoderConfig

if TYPE_CHECKING:
    from bench.workloads.tokenizer_training import TrainingSetup
    from bench.workloads.tokenizers import PassSetup

F16D32, SIZE = AutoencoderConfig(size="f16d32"), 256
#: Part → batches; the first of them with --quick. What a process trains at once is that of the published run on 8 GPUs.
BATCHES = {"encode": (32, 128, 8), "decode": (32, 128, 8), "train": (32, 8)}
#: How far a first loss may be from the reference ops': as for training steps of the transformer.
LOSS_TOLERANCE = 0.02
CHECKED_BY = {"reference": "the reference ops'", "plain": "the plain formulation's"}
CHECKED_LOSSES = ("nll", "kl", "vf_distmat", "vf_cos", "d_loss")
QUICK = (
    *("auto", "auto-channels-last", "auto-compile-channels-last", "reference", "reference-channels-last"),
    *("trainer", "bare", "plain"),
)
#: What `--cpu` trains.
CPU_BATCH = 4
CPU_RUN = (
    "model={size: f16d32, resolution: 64, attn_resolutions: [4]}",
    "data.image_size=64",
    "data.num_workers=0",
    "foundation.model_name=vit_tiny_patch16_224",
    "foundation.model_args={depth: 4}",
)


@dataclass(frozen=True)
class TokenizerJob(Varied):
    """One part, precision and batch, by several providers."""

    part: str
    precision: str
    batch: int
    variants: tuple[TokenizerVariant, ...]
    config: AutoencoderConfig = F16D32
    size: int = SIZE
    overrides: tuple[str, ...] = ()  # of the run file that is trained

    def __str__(self) -> str:
        return f"{self.part} batch {self.batch} {self.precision}"


def jobs(
    parts: list[str], batches: list[int], precisions: list[str], names: list[str], quick: bool
) -> Iterator[TokenizerJob]:
    """The batches that stand first for each part before all others; training is in bfloat16 alone."""
    found = []
    for part in parts:
        wanted = names or (QUICK if quick else TOKENIZER[part])
        variants = tuple(variant for name, variant in TOKENIZER[part].items() if name in wanted)
        for precision in ["bfloat16"] if part == "train" else precisions:
            for place, batch in enumerate(batches or BATCHES[part]):
                if variants and not (quick and place and not batches):
                    found.append((place, TokenizerJob(part, precision, batch, variants)))
    yield from (job for _, job in sorted(found, key=lambda item: item[0]))


def cpu_job(batch: int) -> TokenizerJob:
    """Gradients of training steps small enough for a CPU."""
    return TokenizerJob("train", "as named", batch, tuple(TOKENIZER_ON_CPU.values()), size=64, overrides=CPU_RUN)


@dataclass(frozen=True)
class TokenizerComparison(Comparison):
    kind: ClassVar[str] = "tokenizer"

    def named(self, job: TokenizerJob, name: str) -> Row:
        variant = job.variant(name)
        return {
            "part": job.part,
            "precision": job.precision,
            "batch": job.batch,
            "provider": name,
            "ours": variant.ours,
            "features": variant.features(),
        }

    def set_up(self, job: TokenizerJob) -> "TrainingSetup | PassSetup":
        if job.part == "train":
            from bench.workloads.tokenizer_training import TrainingSetup  # needs packages that a GPU machine may lack

            return TrainingSetup(job.batch, self.device.kind, job.overrides)
        from bench.workloads.tokenizers import PassSetup

        return PassSetup(job.part, job.config, job.size, job.batch, getattr(torch, job.precision), self.device.kind)

    def order(self, job: TokenizerJob) -> list[str]:
        return sorted(job.providers, key=lambda name: job.part != "train" or name not in CHECKED_BY)

    def prepare(self, job: TokenizerJob, name: str, shared: Any) -> Ready:
        run, value = shared.provider(job.variant(name))
        for _ in range(2):  # compiles, tunes, fills caches
            run()
        about = {"flops": shared.flops * job.batch, **shared.about}
        return Ready({"": Iteration(run)}, value, about, close=getattr(run, "close", lambda: None))

    def wrong(self, job: TokenizerJob, values: Mapping[str, Any], shared: Any) -> dict[str, str]:
        if job.part == "train":
            return wrong_losses(values)
        return mismatches(job.part, values, shared.eager, shared.exact)

    def figures(self, job: TokenizerJob, ready: Ready) -> Row:
        seconds, dtype = ready.seconds(), getattr(torch, job.precision, torch.float32)
        return {"images_per_second": job.batch / seconds, **self.limits(ready.about["flops"] / seconds, dtype)}

    def afterwards(self, job: TokenizerJob, ready: Ready) -> Row:
        return where_time_goes(ready.iterations[""].run, self.device.kind)

    def conclude(self, rows: list[Row]) -> None:
        for row in rows:
            if ratio := row.get("times_faster_than", {}).get("plain"):
                print(f"{self.label(row).rstrip()}: {ratio:.2f} × the plain float32 formulation")
        super().conclude(rows)

    def label(self, row: Row) -> str:
        return f"{row['part']} batch {row['batch']} {row['precision']} {row['provider']:32}"

    def measured(self, row: Row) -> str:
        share = f", {row['fraction']:.1%} of a large matmul" if row["fraction"] else ""
        memory = f", {row['peak_gb']:.1f} GB" if row["peak_gb"] else ""
        return (
            f"{row['images_per_second']:8.1f} images/s ({row['p50_ms']:.1f} ms ±{row['spread'] / 2:.1%}{share}{memory})"
        )


def wrong_losses(values: Mapping[str, dict[str, float] | None]) -> dict[str, str]:
    """Provider → which of its first losses is not the reference ops', or the plain formulation's where those are not
    run; the trainer draws noise of its own."""
    by = next((name for name in CHECKED_BY if values.get(name)), "")
    expected, found = values.get(by) or {}, {}
    for name, losses in values.items() if expected else ():
        off = [
            f"{key} {losses[key]:.5g} for {expected[key]:.5g}"
            for key in CHECKED_LOSSES
            if losses and not abs(losses[key] - expected[key]) <= LOSS_TOLERANCE * abs(expected[key])
        ]
        if off:
            found[name] = f"first losses beside {CHECKED_BY[by]}: {', '.join(off)}"
    return found


def main(argv: list[str] | None = None) -> int:
    parser = program.parser("bench.tokenizer", __doc__, seconds=4.0)
    parser.add_argument("part", nargs="*", help=f"default: {', '.join(TOKENIZER)}")
    parser.add_argument("--batch", action="append", type=int, help=f"images at once; repeatable; default: {BATCHES}")
    parser.add_argument(
        "--precision",
        action="append",
        choices=("bfloat16", "float32"),
        help="of encoding and decoding; repeatable; default: both, bfloat16 with --quick",
    )
    names = list(dict.fromkeys(name for variants in TOKENIZER.values() for name in variants))
    parser.add_argument("--variant", action="append", choices=names, help="repeatable; default: all")
    parser.add_argument("--quick", action="store_true", help=f"one batch of each part, {', '.join(QUICK)} alone")
    parser.add_argument("--cpu", action="store_true", help="gradients on the CPU; see above")
    options = parser.parse_args(argv)
    for part in options.part:
        if part not in TOKENIZER:
            parser.error(f"no part is called {part!r}; known: {', '.join(TOKENIZER)}")
    if options.cpu:
        todo = [cpu_job(batch) for batch in options.batch or [CPU_BATCH]]
        device, log = HostDevice(), Log(HostDevice.kind, options.out)
        until = Deadline.after(options.minutes)
        return program.work_through(TokenizerComparison(device, log, None, seconds=options.seconds, until=until), todo)
    precisions = options.precision or (["bfloat16"] if options.quick else ["bfloat16", "float32"])
    parts, batches, variants = options.part or list(TOKENIZER), options.batch or [], options.variant or []
    todo = list(jobs(parts, batches, precisions, variants, options.quick))
    return program.run("bench.tokenizer", options, TokenizerComparison, todo)


if __name__ == "__main__":
    sys.exit(main())
