"""`python -m launch quickstart [--seed N] [--output DIR] [--until STAGE] [--one-step]`: every stage on real digits.

    images ─ train vavae ─▶ tokenizer ─ extract ─▶ latents ─ train lightningdit ─▶ model ─ sample ─▶ images ─ evaluate

The programs and config files are those of a real run, only small. One thing stands in: the frozen foundation model is a
little vision transformer trained here on the same digits, because DINOv2's weights are a large download. Steps are
fixed numbers, so the same seed gives the same pictures; what is already there is not made again, and an interrupted
run goes on where it stopped. With --one-step the model is then trained on until one evaluation of it makes a digit, and
the samples and figures are those of one step, below `one_step`.
"""

import argparse
import json
import platform
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common.files import write_json
from launch import evaluate, extract, gallery, pictures, sample, train
from launch import export as exporting
from launch.arguments import local_path
from launch.config import select_ops
from launch.digits_demo import dataset
from launch.digits_demo.classifier import (
    LIMITS,
    ONE_STEP_LIMITS,
    DigitClassifier,
    Limit,
    failures,
    reconstruction_report,
    samples_report,
)
from launch.digits_demo.foundation import train_foundation
from launch.evaluation import features
from launch.evaluation.image_source import open_images
from launch.evaluation.reconstructions import Reconstructions
from launch.training.checkpoint import newest
from launch.training.engine import uses_cuda
from vavae.weights import load_tokenizer

CONFIGS = Path(__file__).parent / "configs"
OUTPUT = Path("output") / "quickstart"
_FIGURES = ("evaluation.figures=recognised", "evaluation.samples=100", "evaluation.every=250")


@dataclass(frozen=True)
class Quickstart:
    """One run: where it lives and its seed. Each stage is a method that leaves its result on disk.

    one_step: whether samples are made in one step, by a model that goes on from the one of flow matching.
    """

    root: Path
    seed: int
    one_step: bool = False

    @property
    def place(self) -> Path:
        """The folder of the samples and figures, and of the model that they are of."""
        return self.root / "one_step" if self.one_step else self.root

    @property
    def tokenizer(self) -> Path:
        return self.root / "vavae.safetensors"

    @property
    def foundation(self) -> Path:
        return self.root / "foundation" / "foundation.safetensors"

    def data(self) -> None:
        """Write scikit-learn's digits as an image folder, a held-out part aside."""
        folders = dataset.write(self.root / "data")
        print(f"images in {folders.train} and, held out, in {folders.heldout}")

    def stand_in(self) -> None:
        """Train the small vision transformer that stands in for DINOv2."""
        description = self.foundation.with_suffix(".json")
        if not description.is_file():
            self.foundation.parent.mkdir(parents=True, exist_ok=True)
            train_foundation(
                self.foundation, self._digits("train"), self._digits("heldout"), seed=self.seed, device=_device()
            )
        accuracy = json.loads(description.read_text("utf-8"))["heldout_accuracy"]
        print(f"a classifier of {accuracy:.1%} accuracy on held-out digits; its patch features guide the tokenizer")

    def vavae(self) -> None:
        """Train the tokenizer, aligned to the stand-in's features, and export it."""
        _run(train.main, "train", "vavae", *self._tokenizer_run())
        self._export("vavae")

    def latents(self) -> None:
        """Encode every training image and its mirror image."""
        _run(
            extract.main,
            "extract",
            *self._tokenizer_run(),
            _key("ckpt_path", self.tokenizer),
            "--output",
            self.root / "latents",
        )

    def lightningdit(self) -> None:
        """Train the diffusion transformer on the latents, measuring the recognised share of samples, and export it."""
        _run(train.main, "train", "lightningdit", *self._diffusion_run("digits.yaml", self.root), *_FIGURES)
        self._export("lightningdit")

    def average_velocities(self) -> None:
        """Train that model on, towards average velocities, with the share of one-step samples recognised; export it."""
        start = _key("train.weight_init", self.root / "lightningdit.safetensors")
        _run(train.main, "train", "lightningdit", *self._last_run(), start, *_FIGURES)
        self._export("lightningdit", self.place)

    def samples(self) -> None:
        """Generate 50 samples of every digit: guided ones, or in one step."""
        _run(
            sample.main,
            "sample",
            *self._last_run(),
            _key("ckpt_path", self.place / "lightningdit.safetensors"),
            f"sample.seed={self.seed}",
            "--output",
            self.place / "samples",
        )

    def evaluate(self) -> dict:
        """Evaluate reconstructions and samples, draw the pictures, write report.json → the report."""
        training, heldout = self._digits("train"), self._digits("heldout")
        classifier = DigitClassifier(training, heldout)
        self._measure_samples()
        decoded = self._reconstruct()
        with np.load(self.place / "samples" / "samples.npz") as content:
            images, labels = torch.from_numpy(content["arr_0"]), torch.from_numpy(content["arr_1"])
        extractor = features.FoundationFeatures.from_file(self.foundation, _device())
        report = {
            **reconstruction_report(classifier, heldout, decoded),
            **samples_report(classifier, images, labels, training, heldout, lambda batch: extractor(batch)["features"]),
            "made": json.loads((self.place / "samples" / "samples.json").read_text("utf-8")),
        }
        pictures.sample_grid(images, labels, self.place / "samples.png")
        pictures.reconstruction_pairs(heldout.images, decoded, self.place / "reconstructions.png")
        self._draw_curves()
        return report

    def _measure_samples(self) -> None:
        """The figures any run gets: Fréchet distance, precision and recall, here in the stand-in's features."""
        _run(
            evaluate.main,
            "evaluate",
            "--samples",
            self.place / "samples" / "samples.npz",
            "--reference",
            self.root / "data" / "heldout",
            "--foundation",
            self.foundation,
            "--device",
            _device(),
            "--output",
            self.place / "samples" / "evaluation.json",
        )

    def _digits(self, split: str) -> dataset.Digits:
        return dataset.read(self.root / "data" / split)

    def _reconstruct(self) -> torch.Tensor:
        """Held-out digits, encoded and decoded from a posterior sample, as evaluate does it: uint8 [500, 32, 32, 3]."""
        tokenizer = load_tokenizer(self.tokenizer, select_ops("auto")).to(_device())
        originals = open_images(self.root / "data" / "heldout")
        return torch.cat(list(Reconstructions(originals, tokenizer, seed=self.seed).batches(100)))

    def _tokenizer_run(self) -> list:
        return [
            CONFIGS / "digits_vavae.yaml",
            _key("data.data_path", self.root / "data" / "train"),
            _key("foundation.weights", self.foundation),
            *self._everywhere(self.root),
        ]

    def _last_run(self) -> list:
        """The run whose model makes the samples."""
        return self._diffusion_run("digits_one_step.yaml" if self.one_step else "digits.yaml", self.place)

    def _diffusion_run(self, config: str, place: Path) -> list:
        return [
            CONFIGS / config,
            _key("data.data_path", self.root / "latents"),
            _key("vae.ckpt_path", self.tokenizer),
            "train.exp_name=lightningdit",
            *self._everywhere(place),
        ]

    def _everywhere(self, place: Path) -> list[str]:
        return [_key("train.output_dir", place), f"train.global_seed={self.seed}"]

    def _export(self, name: str, place: Path | None = None) -> None:
        place = place or self.root
        step = newest(place / name / "checkpoints").step
        description = place / f"{name}.json"
        if not description.is_file() or json.loads(description.read_text("utf-8"))["step"] != step:
            for suffix in exporting.SUFFIXES:
                description.with_suffix(suffix).unlink(missing_ok=True)
            _run(exporting.main, "export", place / name, place / f"{name}.safetensors")

    def _draw_curves(self) -> None:
        runs = self.root / "vavae", self.place / "lightningdit"
        tokenizer, model = (pictures.read_metrics(run / "metrics.jsonl") for run in runs)
        direction = {"direction": model["cos_loss"]} if "cos_loss" in model else {}
        error = "error of average velocities" if self.one_step else "velocity error"
        pictures.loss_curves(
            {
                "tokenizer: reconstruction": {"absolute error": tokenizer["rec"]},
                "tokenizer: VF loss": {"distance matrix": tokenizer["vf_distmat"], "cosine": tokenizer["vf_cos"]},
                "LightningDiT": {error: model["mse"], **direction},
            },
            self.place / "losses.png",
        )


STAGES: dict[str, tuple[str, Callable[[Quickstart], dict | None]]] = {
    "data": ("write the images", Quickstart.data),
    "foundation": ("train a stand-in for DINOv2", Quickstart.stand_in),
    "vavae": ("train the tokenizer", Quickstart.vavae),
    "extract": ("extract the latents", Quickstart.latents),
    "lightningdit": ("train LightningDiT", Quickstart.lightningdit),
    "one_step": ("train it on for samples in one step", Quickstart.average_velocities),
    "sample": ("sample", Quickstart.samples),
    "evaluate": ("evaluate", Quickstart.evaluate),
}


def main(argv: list[str]) -> int:
    """Run the stages; returns 0 if every limit was met, 1 if not."""
    parser = argparse.ArgumentParser(
        prog="python -m launch quickstart", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=local_path, help=f"directory (default: {OUTPUT}, or …-seedN)")
    parser.add_argument("--until", choices=list(STAGES), default="evaluate", help="last stage to run")
    parser.add_argument("--one-step", action="store_true", help="go on to a model that samples in one step")
    args = parser.parse_args(argv)
    if args.until == "one_step" and not args.one_step:
        parser.error("--until one_step needs --one-step")
    root = args.output or (OUTPUT if args.seed == 0 else OUTPUT.with_name(f"quickstart-seed{args.seed}"))
    run, seconds, report = Quickstart(root, args.seed, args.one_step), {}, None
    stages = {name: stage for name, stage in STAGES.items() if args.one_step or name != "one_step"}
    limits = ONE_STEP_LIMITS if args.one_step else LIMITS
    for number, (name, (title, stage)) in enumerate(stages.items(), start=1):
        print(f"\n── {number}/{len(stages)}  {title}", flush=True)
        started = time.perf_counter()
        report = stage(run)
        seconds[name] = time.perf_counter() - started
        if name == args.until:
            break
    if report is None:
        return 0
    missed = failures(report, limits)
    facts = {"seed": args.seed, "device": _device(), "torch": torch.__version__, "python": platform.python_version()}
    figures = {limit.key: report[limit.key] for limit in limits}
    write_json(run.place / "report.json", {"metrics": figures, **report, "missed": missed, "seconds": seconds, **facts})
    _run(gallery.main, "gallery", run.place, "--output", run.place / gallery.NAME)
    print(_table(report, seconds, run.place, limits))
    for sentence in missed:
        print(f"MISSED: {sentence}")
    return 1 if missed else 0


def _table(report: dict, seconds: dict[str, float], root: Path, limits: Sequence[Limit]) -> str:
    rows = [f"  {limit.meaning:<78} {report[limit.key]:7.3f}  ({limit})" for limit in limits]
    times = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    files = ", ".join(("samples.png", "reconstructions.png", "losses.png", "report.json"))
    return "\n".join(
        [
            "",
            *rows,
            "",
            f"  {sum(seconds.values()):.0f} s: {times}",
            f"  open {root / gallery.NAME} in a browser: samples, curves, figures, configs",
            f"  look at {files} in {root}",
        ]
    )


def _run(program: Callable[[list[str]], int], name: str, *arguments) -> None:
    """Run a program in this process, saying the command that would do the same."""
    argv = [str(a) for a in arguments]
    print(f"$ python -m launch {name} {shlex.join(argv)}", flush=True)
    if status := program(argv):
        raise SystemExit(status)  # stopped by a signal: the same command goes on from here


def _device() -> str:
    return "cuda" if uses_cuda() else "cpu"


def _key(name: str, path: Path) -> str:
    """An override that sets a key to a path, quoted: some paths are not what they seem in YAML."""
    return f"{name}={json.dumps(str(path))}"
