"""Time whole training steps on a GPU: loader, forward, backward, optimizer and moving average, on one GPU.

    python -m bench.step [--model NAME] [--batch N] [--variant NAME] [--kernels [OP=]BACKEND] [--quick] [--out FILE]

The headline row is the variant "trainer": the loop that `python -m launch train` runs, with DeepSpeed, on the run file
of the 64 epochs. Baselines in the same run are the plain model, eager and under torch.compile. Steps of MeanFlow are a
group of their own: "meanflow", and the plain model's by torch.func.jvp, "plain-meanflow". Ends with 1 if a variant is
wrong or fails, with 2 if there is no GPU. Variants are timed one after the other, as memory does not hold several. A
run that is cut off leaves a row of each variant that had started.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import ClassVar

import torch

from bench.measure import program
from bench.measure.breakdown import where_time_goes
from bench.measure.comparison import Comparison, Varied
from bench.measure.losses import LOSS_BASELINES, wrong_losses
from bench.measure.progress import Ready
from bench.measure.rows import Row
from bench.measure.timing import Iteration
from bench.workloads.published import published_config
from bench.workloads.training import STEPS, flops_per_step
from bench.workloads.variants import TRAINING, TrainingVariant
from lightningdit.config import MODEL_NAMES, ModelConfig

IMAGES = 64 * 1_281_167  # of 64 epochs of ImageNet
BATCHES: dict[str, tuple[int, ...]] = {
    "LightningDiT-XL/1": (128, 64),
    "LightningDiT-L/1": (128, 256),
    "LightningDiT-B/1": (256, 512),
}
QUICK = ("trainer", "bare", "plain-compile", "plain-eager")


@dataclass(frozen=True)
class StepJob(Varied):
    """One model and batch, to be trained in several ways."""

    model: str
    config: ModelConfig
    batch: int
    variants: tuple[TrainingVariant, ...]

    @property
    def objective(self) -> str:
        """That of all its variants."""
        return self.variants[0].objective

    def __str__(self) -> str:
        return f"{self.model} batch {self.batch}" + (f" {self.objective}" if self.objective != "flow" else "")


def jobs(models: list[str], batches: list[int], names: list[str], asked: Sequence[str] = ()) -> Iterator[StepJob]:
    """The largest model first, each at its own batches unless some are given; `asked`: backends of other ops.

    Variants of another objective are another job: neither losses nor times are compared across.
    """
    by_objective: dict[str, list[TrainingVariant]] = {}
    for variant in (TRAINING[name].on(asked) for name in names):
        by_objective.setdefault(variant.objective, []).append(variant)
    for model in models:
        config = published_config(model)
        for batch in batches or BATCHES.get(model, (128,)):
            for variants in by_objective.values():
                yield StepJob(model, config, batch, tuple(variants))


@dataclass(frozen=True)
class StepComparison(Comparison):
    """make: variant, config, batch and device → a step to call.

    One variant is held at a time: the memory that the largest takes at batch 128 leaves an H100 none for another's
    weights and optimizer.
    """

    make: Callable = lambda variant, *arguments: STEPS[variant.engine](variant, *arguments)

    kind: ClassVar[str] = "step"
    interleaved: ClassVar[bool] = False

    def named(self, job: StepJob, name: str) -> Row:
        return {"model": job.model, "batch": job.batch, "variant": name, "features": job.variant(name).features()}

    def order(self, job: StepJob) -> list[str]:
        baseline = next((name for name in LOSS_BASELINES if name in job.providers), None)
        return sorted(job.providers, key=lambda name: name != baseline)

    def prepare(self, job: StepJob, name: str, shared: None) -> Ready:
        begun = time.perf_counter()
        with ExitStack() as failing:
            step = self.make(job.variant(name), job.config, job.batch, self.device.kind)
            failing.callback(getattr(step, "close", lambda: None))
            first = step()
            if self.device.kind == "cuda":
                torch.cuda.synchronize()
            about: Row = {"seconds_to_first_step": time.perf_counter() - begun}
            for _ in range(2):  # compiles, tunes, fills caches
                step()
            about["loss"] = None if first is None else float(first)
            about["flops"] = flops_per_step(job.config, job.batch, job.variant(name).objective)
            return Ready({"": Iteration(step)}, about["loss"], about, close=failing.pop_all().close)

    def wrong(self, job: StepJob, values: Mapping[str, float | None], shared: None) -> dict[str, str]:
        return wrong_losses(values)

    def figures(self, job: StepJob, ready: Ready) -> Row:
        rate = job.batch / ready.seconds()
        hours = IMAGES / (8 * rate) / 3600
        return {
            "images_per_second": rate,
            **self.limits(ready.about["flops"] / ready.seconds()),
            "extrapolated": {"gpus": 8, "epochs": 64, "hours": hours, "times_faster_than_10_hours": 10 / hours},
        }

    def afterwards(self, job: StepJob, ready: Ready) -> Row:
        return where_time_goes(ready.iterations[""].run, self.device.kind)

    def label(self, row: Row) -> str:
        return f"{row['model']} batch {row['batch']} {row['variant']:24}"

    def measured(self, row: Row) -> str:
        share = f", {row['mfu']:.1%} MFU" if row["mfu"] else ""
        memory = f", {row['peak_gb']:.1f} GB" if row["peak_gb"] else ""
        return (
            f"{row['images_per_second']:7.1f} images/s{share} ({row['p50_ms']:.1f} ms ±{row['spread'] / 2:.1%}"
            f"{memory}), 64 epochs on 8 GPUs: {row['extrapolated']['hours']:.1f} h (extrapolated)"
        )


def main(argv: list[str] | None = None) -> int:
    parser = program.parser("bench.step", __doc__, seconds=30.0)
    parser.add_argument("--model", action="append", choices=MODEL_NAMES, help="repeatable; default: XL/1, L/1, B/1")
    parser.add_argument("--batch", action="append", type=int, default=[], help="images per step; repeatable")
    parser.add_argument("--variant", action="append", choices=TRAINING, help="repeatable; default: all")
    parser.add_argument(
        "--kernels",
        action="append",
        default=[],
        metavar="[OP=]BACKEND",
        help="of one op, or of all that have it; repeatable; default: auto, or as the variant says",
    )
    parser.add_argument("--quick", action="store_true", help=f"XL/1 at 128 alone, as {', '.join(QUICK)}")
    options = parser.parse_args(argv)
    models = options.model or (["LightningDiT-XL/1"] if options.quick else list(BATCHES))
    batches = options.batch or ([128] if options.quick else [])
    names = options.variant or list(QUICK if options.quick else TRAINING)
    try:
        todo = list(jobs(models, batches, names, options.kernels))
    except ValueError as error:
        parser.error(f"--kernels: {error}")
    return program.run("bench.step", options, StepComparison, todo)


if __name__ == "__main__":
    sys.exit(main())
