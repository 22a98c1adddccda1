"""Time guided sampling on a GPU: from noise to images, as `python -m launch sample` makes them.

    python -m bench.sampling [--model NAME] [--batch N] [--variant NAME] [--precision P] [--quick] [--out FILE]
    python -m bench.sampling --cpu [--images N]

The `sample` section is that of the published 64-epoch run: 250 points of Euler, guided from time 0.10 on; below it the
unconditional half is not run. A measured call of each kind, guided and not, stands for all of that kind: what a row
says of a whole sample is extrapolated. The baseline is the plain model and loop, with both halves in all calls.
First the latents of a short grid are checked against float64, beside those of the plain model.

`--cpu` times the whole program on the CPU with a small model, from noise to images in files, beside the program as it
was before it made large batches, for the ratio: at the defaults of both, and at equal batches.
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from bench.measure import program
from bench.measure.comparison import Comparison, Varied, mismatches
from bench.measure.cutoff import Deadline
from bench.measure.progress import Ready
from bench.measure.rows import Log, Row
from bench.measure.timing import HostDevice, Iteration
from bench.workloads.published import published_config
from bench.workloads.variants import AT_ONCE, SAMPLING, SAMPLING_ON_CPU, ProgramVariant, Variant
from lightningdit.config import MODEL_NAMES, ModelConfig
from lightningdit.cost import flops_per_image
from vavae.config import AutoencoderConfig

if TYPE_CHECKING:
    from bench.workloads.samplers import Sampler, SamplingSetup
    from bench.workloads.sampling_program import ProgramSetup

F16D32 = AutoencoderConfig(size="f16d32")
BATCH = 64  # `per_proc_batch_size` of the published run
QUICK = ("auto", "auto-cudagraphs", "plain-eager")


@dataclass(frozen=True)
class SamplingJob(Varied):
    """One model and batch, to be sampled in several ways by turns."""

    model: str
    config: ModelConfig
    batch: int
    precision: str
    variants: tuple[Variant, ...]
    tokenizer: AutoencoderConfig = F16D32

    def __str__(self) -> str:
        return f"{self.model} batch {self.batch} {self.precision}"


def jobs(models: list[str], batches: list[int], precisions: list[str], names: list[str]) -> Iterator[SamplingJob]:
    for model in models:
        config = published_config(model)
        for precision in precisions:
            for batch in batches:
                yield SamplingJob(model, config, batch, precision, tuple(SAMPLING[name] for name in names))


@dataclass(frozen=True)
class SamplingComparison(Comparison):
    """A row is about whole samples of one batch; those they are checked against are the plain model's own."""

    kind: ClassVar[str] = "sampling"

    def named(self, job: SamplingJob, name: str) -> Row:
        variant = job.variant(name)
        return {
            "model": job.model,
            "batch": job.batch,
            "precision": job.precision,
            "provider": name,
            "ours": variant.ours,
            "features": variant.features(),
        }

    def set_up(self, job: SamplingJob) -> "SamplingSetup":
        from bench.workloads.samplers import SamplingSetup  # needs packages that a GPU machine may lack

        return SamplingSetup(job.config, job.tokenizer, job.batch, job.precision, self.device.kind)

    def prepare(self, job: SamplingJob, name: str, shared: "SamplingSetup") -> Ready:
        from bench.workloads.samplers import SAMPLERS

        variant = job.variant(name)
        sampler = SAMPLERS[variant.engine](variant, shared)
        for iteration in sampler.iterations.values():
            iteration.run()  # compiles, tunes, fills caches
        about = {"settings": shared.settings.model_dump(), "decode_flops": shared.decode_flops}
        return Ready(sampler.iterations, sampler, about, sampler.times)

    def wrong(self, job: SamplingJob, values: Mapping[str, "Sampler"], shared: "SamplingSetup") -> dict[str, str]:
        """By the tests' rule: an error at most twice that of the plain model."""
        return mismatches("latents", {name: made.samples for name, made in values.items()}, shared.eager, shared.exact)

    def figures(self, job: SamplingJob, ready: Ready) -> Row:
        """FLOPs are what samples need: the plain loop's halves that are thrown away do not count."""
        seconds, (guided, unguided) = ready.seconds(), ready.value.calls
        decoding = ready.parts["decode"].median
        flops = (2 * guided + unguided) * flops_per_image(job.config)[0] + ready.about["decode_flops"]
        measured = {part: timing.median * 1e3 for part, timing in ready.parts.items()}
        return {
            "images_per_second": job.batch / seconds,
            "latents_per_second": job.batch / (seconds - decoding),
            "decoded_per_second": job.batch / decoding,
            "flops": flops * job.batch,
            **self.limits(flops * job.batch / seconds, getattr(torch, job.precision)),
            "extrapolated": {
                "guided_calls": guided,
                "unguided_calls": unguided,
                "parts_ms": measured,
                "times": ready.times,
            },
        }

    def label(self, row: Row) -> str:
        return f"{row['model']} batch {row['batch']} {row['precision']} {row['provider']:13}"

    def measured(self, row: Row) -> str:
        share = f", {row['fraction']:.1%} of a large matmul" if row["fraction"] else ""
        parts = ", ".join(f"{part} {ms:.2f}" for part, ms in row["extrapolated"]["parts_ms"].items())
        return (
            f"{row['images_per_second']:6.2f} images/s, {row['latents_per_second']:.2f} latents/s, decoding "
            f"{row['decoded_per_second']:.0f} images/s "
            f"(extrapolated from ms: {parts}; ±{row['spread'] / 2:.1%}){share}"
        )


#: What `--cpu` samples: the model of the quickstart's digits, a small tokenizer, a short grid.
CPU_MODEL = ModelConfig(
    input_size=8,
    in_channels=4,
    hidden_size=128,
    depth=6,
    num_heads=4,
    num_classes=10,
    use_swiglu=True,
    use_rope=True,
    use_rmsnorm=True,
)
CPU_TOKENIZER = AutoencoderConfig(
    embed_dim=4, z_channels=4, ch=32, ch_mult=(1, 2, 2), num_res_blocks=1, attn_resolutions=(), resolution=32
)
CPU_IMAGES, CPU_POINTS = 64, 5
#: How much faster than the program as it was this one is to be.
CPU_TARGET = 1.3


@dataclass(frozen=True)
class ProgramJob(Varied):
    """Images by the whole program, in several ways by turns."""

    config: ModelConfig
    tokenizer: AutoencoderConfig
    images: int
    points: int
    variants: tuple[ProgramVariant, ...] = tuple(SAMPLING_ON_CPU.values())

    def __str__(self) -> str:
        return f"{self.images} images of {self.points} points"


@dataclass(frozen=True)
class ProgramComparison(Comparison):
    """A row is about all images; those of the program as it was are what the others are checked against."""

    kind: ClassVar[str] = "sampling"

    def named(self, job: ProgramJob, name: str) -> Row:
        variant = job.variant(name)
        names = {"model": "small", "batch": job.images, "precision": "float32", "provider": name}
        return names | {"ours": variant.ours, "features": variant.features()}

    def set_up(self, job: ProgramJob) -> "ProgramSetup":
        from bench.workloads.sampling_program import ProgramSetup

        return ProgramSetup(job.config, job.tokenizer, job.images, job.points)

    def prepare(self, job: ProgramJob, name: str, shared: "ProgramSetup") -> Ready:
        variant = job.variant(name)
        run = shared.program(variant)
        return Ready({"": Iteration(run)}, run(), {"settings": shared.settings.model_dump()})

    def wrong(self, job: ProgramJob, values: Mapping[str, Any], shared: "ProgramSetup") -> dict[str, str]:
        """Another pixel by more than a step of 8 bits, as sums over another batch may round."""
        reference = values.get("plain")
        off = {name: 0 if reference is None else _most_off(images, reference) for name, images in values.items()}
        return {name: f"a pixel is off by {most}" for name, most in off.items() if most > 1}

    def figures(self, job: ProgramJob, ready: Ready) -> Row:
        return {"images_per_second": job.images / ready.seconds()}

    def conclude(self, rows: list[Row]) -> None:
        found = {row["provider"]: row["images_per_second"] for row in rows if row["status"] == "ok"}
        for ours, plain in (("program", "plain"), ("program", f"plain-{AT_ONCE}")):
            if ours in found and plain in found:
                print(f"{ours} against {plain}: {found[ours] / found[plain]:.2f} ×", flush=True)
        print(f"the first: both at their defaults, to be at least {CPU_TARGET} ×; the second: as many at once")
        super().conclude(rows)

    def label(self, row: Row) -> str:
        at_once = row["features"]["at_once"] or "as chosen"
        return f"{row['batch']} images, {row['provider']:11} {at_once:>9} at once"

    def measured(self, row: Row) -> str:
        return f"{row['images_per_second']:7.2f} images/s (±{row['spread'] / 2:.1%})"


def _most_off(images: Any, reference: Any) -> int:
    return int(abs(images.astype(int) - reference).max())


def main(argv: list[str] | None = None) -> int:
    parser = program.parser("bench.sampling", __doc__, seconds=3.0)
    parser.add_argument("--model", action="append", choices=MODEL_NAMES, help="repeatable; default: XL/1")
    parser.add_argument("--batch", action="append", type=int, help=f"samples at once; repeatable; default: {BATCH}")
    parser.add_argument(
        "--precision",
        action="append",
        choices=("bfloat16", "float32"),
        help="of the network; repeatable; default: bfloat16",
    )
    parser.add_argument("--variant", action="append", choices=SAMPLING, help="repeatable; default: all")
    parser.add_argument("--quick", action="store_true", help=f"{' and '.join(QUICK)} alone")
    parser.add_argument("--cpu", action="store_true", help="the whole program on the CPU; see above")
    parser.add_argument("--images", type=int, default=CPU_IMAGES, help=f"for --cpu; default: {CPU_IMAGES}")
    options = parser.parse_args(argv)
    if options.cpu:
        device, log = HostDevice(), Log(HostDevice.kind, options.out)
        until, job = Deadline.after(options.minutes), ProgramJob(CPU_MODEL, CPU_TOKENIZER, options.images, CPU_POINTS)
        return program.work_through(ProgramComparison(device, log, None, seconds=options.seconds, until=until), [job])
    names = options.variant or list(QUICK if options.quick else SAMPLING)
    models, precisions = options.model or ["LightningDiT-XL/1"], options.precision or ["bfloat16"]
    todo = list(jobs(models, options.batch or [BATCH], precisions, names))
    return program.run("bench.sampling", options, SamplingComparison, todo)


if __name__ == "__main__":
    sys.exit(main())
