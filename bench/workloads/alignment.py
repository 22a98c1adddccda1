"""The runs of `bench.vf_study`: tokenizers that differ in the VF loss alone, and a LightningDiT on the latents of each.

Every stage is one of the project's programs, called in this process, and its command is printed. A stage that is done
is recorded beside its result and not done again; one that was interrupted goes on where the program can.
"""

import json
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from common.files import read_json, sha256, write_json
from launch import evaluate, export, extract, sample, train
from launch.config import LightningDiTRun, Run, VavaeRun, load, select_ops
from launch.digits_demo import dataset
from launch.digits_demo.classifier import DigitClassifier, samples_report
from launch.digits_demo.foundation import train_foundation
from launch.evaluation.features import FoundationFeatures, InceptionFeatures
from launch.evaluation.frechet import frechet_distance
from launch.evaluation.image_source import Decoding, open_images
from launch.evaluation.moments import FeatureStatistics
from launch.evaluation.reconstructions import Reconstructions, evaluate_reconstructions
from launch.training.checks import check_file
from vavae.config import check_sections
from vavae.sources import open_source
from vavae.weights import load_tokenizer

#: Keys that the study gives each run, by the kind of run file; they are no setting of the study.
OWN_KEYS = {
    "vavae": (
        "data.data_path", "loss.use_vf", "train.output_dir", "train.exp_name", "train.global_seed", "ckpt_path",
    ),
    "lightningdit": (
        "data.data_path", "vae.ckpt_path", "train.output_dir", "train.exp_name", "train.global_seed", "ckpt_path",
        "sample.seed",
    ),
}  # fmt: skip
#: Files of machines, not settings; their content is not looked at.
PATH_KEYS = ("foundation.weights", "loss.perceptual_weights", "data.fid_reference_file", "data.valid_path")
LATENTS = "latents"
PERPLEXITY = 30  # of the t-SNE plane; uniformity needs more latents than that, and takes one vector of each


def key(name: str, path: Path | str) -> str:
    """An override that sets a key to a path, quoted: some paths are not what they seem in YAML."""
    return f"{name}={json.dumps(str(path))}"


@dataclass(frozen=True)
class RunFile:
    """A run file and the overrides that are the same in every run of a study; kind: `vavae` or `lightningdit`."""

    kind: str
    path: str
    overrides: tuple[str, ...] = ()

    def __post_init__(self):
        for override in self.overrides:
            if (name := override.partition("=")[0]) in OWN_KEYS[self.kind]:
                raise ValueError(f"{override}: {name} is what the study itself sets; leave it out")

    def load(self, own: Sequence[str] = ()) -> Run:
        run, _ = load(self.path, [*self.overrides, *own], kind=self.kind)
        assert isinstance(run, VavaeRun | LightningDiTRun)
        return run

    def arguments(self, own: Sequence[str]) -> list[str]:
        """What a program is given: the file, the overrides, and those of one run."""
        return [self.path, *self.overrides, *own]

    def settings(self, run: Run) -> dict:
        """What `run` says that is no default, without the keys of a single run and without paths."""
        content = run.model_dump(mode="json", exclude_defaults=True)
        for name in (*OWN_KEYS[self.kind], *PATH_KEYS):
            *sections, last = name.split(".")
            section = content
            for part in sections:
                section = section.get(part) or {}
            section.pop(last, None)
        return {name: value for name, value in content.items() if value != {}}


@dataclass(frozen=True)
class Material:
    """What all runs of a study share: images, run files, and the network in whose features images are compared.

    Fields:
        name: of the images, in tables.
        images, heldout: what is trained on, and compared with.
        foundation, inception_weights: weights of that network, see `launch.evaluation.features`; without either,
            the Inception that was downloaded before.
        repeats: draws of latents that uniformity is averaged over.
        allow_few: compare no more images than there are features.
        digits: whether images are the demo's digits, whose classifiers say more.
    """

    name: str
    images: Path
    heldout: Path
    tokenizer: RunFile
    lightningdit: RunFile
    foundation: Path | None = None
    inception_weights: Path | None = None
    repeats: int = 1
    allow_few: bool = False
    digits: bool = False

    @property
    def features(self) -> tuple[str, ...]:
        """Options of `launch evaluate` that name the network."""
        named = {"--foundation": self.foundation, "--inception-weights": self.inception_weights}
        return tuple(str(part) for option, path in named.items() if path for part in (option, path))

    def extractor(self) -> FoundationFeatures | InceptionFeatures:
        if self.foundation is not None:
            return FoundationFeatures.from_file(self.foundation, _device())
        return InceptionFeatures(self.inception_weights, _device())

    @cached_property
    def runs(self) -> tuple[VavaeRun, LightningDiTRun]:
        """Both run files with what stands in for the keys of a single run; raises ConfigError where they are wrong."""
        tokenizer = self.tokenizer.load([key("data.data_path", self.images), "loss.use_vf=true"])
        lightningdit = self.lightningdit.load([key("data.data_path", LATENTS)])
        assert isinstance(tokenizer, VavaeRun) and isinstance(lightningdit, LightningDiTRun)
        return tokenizer, lightningdit

    def check(self) -> None:
        """Raise ValueError, before the first step, where the run files, the images or the weights do not fit."""
        tokenizer, lightningdit = self.runs
        for use_vf in (True, False):
            loss = tokenizer.loss.model_copy(update={"use_vf": use_vf})
            check_sections(tokenizer.model, tokenizer.features(), loss, tokenizer.data, tokenizer.stages)
        weights = {"loss.perceptual_weights": tokenizer.loss.perceptual_weights}
        weights |= {"foundation.weights": tokenizer.foundation.weights} if tokenizer.foundation else {}
        for name, path in weights.items():
            if path is not None:
                check_file(name, path)
        pairs = {
            "data.image_size": (tokenizer.data.image_size, lightningdit.data.image_size),
            "model.embed_dim and model.in_chans": (tokenizer.model.embed_dim, lightningdit.model.in_chans),
            "down-sampling and vae.downsample_ratio": (
                tokenizer.model.downsample_ratio,
                lightningdit.vae.downsample_ratio,
            ),
        }
        for what, (made, wanted) in pairs.items():
            if made != wanted:
                raise ValueError(
                    f"{what}: {made} in {self.tokenizer.path}, {wanted} in {self.lightningdit.path}; "
                    "both must be of the same latents"
                )
        classes = open_source(self.images).classes
        if classes is not None and len(classes) != lightningdit.data.num_classes:
            raise ValueError(
                f"data.num_classes is {lightningdit.data.num_classes} in {self.lightningdit.path}, but "
                f"{self.images} has {len(classes)} classes"
            )
        self._check_counts()

    def _check_counts(self) -> None:
        """Raise ValueError where a figure would be of too few images."""
        if (count := len(open_source(self.images))) <= PERPLEXITY:
            raise ValueError(f"{self.images}: {count} images; the uniformity of their latents needs over {PERPLEXITY}")
        tokenizer, lightningdit = self.runs
        heldout = open_images(self.heldout, tokenizer.data.image_size)
        width = self.extractor()(next(iter(heldout.batches(1))))["features"].shape[1]
        counts = {f"{self.heldout}": len(heldout), "sample.fid_num": lightningdit.sampling().fid_num}
        for what, count in counts.items():
            if count <= width and not self.allow_few:
                raise ValueError(f"{what}: {count} images for {width} features, of which no distance can be relied on")

    def settings(self) -> dict:
        """What a study is of: rows with the same are of one study. A JSON-ready dict."""
        tokenizer, lightningdit = self.runs
        return {
            "images": self.name,
            "training_images": len(open_source(self.images)),
            "heldout_images": len(open_source(self.heldout, split="val", labelled=False)),
            "tokenizer": self.tokenizer.settings(tokenizer),
            "lightningdit": self.lightningdit.settings(lightningdit),
            "foundation": _content(tokenizer.foundation.weights) if tokenizer.foundation else None,
            "features": [_content(option) for option in self.features],
            "repeats": self.repeats,
        }


def _content(option: str | None) -> str | None:
    """An option as it is; of a file its checksum, which means the same on every machine."""
    return sha256(option) if option and Path(option).is_file() else option


def digits(folder: Path, tokenizer: RunFile, lightningdit: RunFile, repeats: int) -> Material:
    """The demo's digits and its stand-in for DINOv2, made under `folder` where they are not there yet.

    There is one stand-in for all seeds: what differs between them is then the tokenizers' and LightningDiT's doing,
    and distances in its features are on one scale.
    """
    folders, weights = dataset.write(folder / "data"), folder / "foundation" / "foundation.safetensors"
    if not weights.with_suffix(".json").is_file():
        print("training a small vision transformer on the digits, to stand in for DINOv2", flush=True)
        weights.parent.mkdir(parents=True, exist_ok=True)
        train_foundation(weights, dataset.read(folders.train), dataset.read(folders.heldout), seed=0, device=_device())
    return Material(
        name="handwritten digits",
        images=folders.train,
        heldout=folders.heldout,
        tokenizer=RunFile(tokenizer.kind, tokenizer.path, (*tokenizer.overrides, key("foundation.weights", weights))),
        lightningdit=lightningdit,
        foundation=weights,
        repeats=repeats,
        digits=True,
    )


@dataclass(frozen=True)
class Arm:
    """One tokenizer of a study and what follows from it; `root` holds everything that it makes."""

    root: Path
    material: Material
    seed: int
    use_vf: bool

    @property
    def title(self) -> str:
        return f"seed {self.seed}, {'with' if self.use_vf else 'without'} VF"

    def run(self) -> dict:
        """All stages that are not done yet → the figures, with the commands that gave them."""
        for name, stage in STAGES.items():
            done = self._done()
            if name in done:
                print(f"── {self.title}: {name} is done", flush=True)
                continue
            print(f"\n── {self.title}: {name}", flush=True)
            started = time.perf_counter()
            commands = stage(self)
            seconds = time.perf_counter() - started
            write_json(self._record, {**done, name: {"commands": commands, "seconds": round(seconds, 1)}})
        commands = [command for stage in self._done().values() for command in stage["commands"]]
        return read_json(self.root / "figures.json") | {"commands": commands}

    @property
    def _record(self) -> Path:
        return self.root / "stages.json"

    def _done(self) -> dict[str, dict]:
        return read_json(self._record) if self._record.is_file() else {}

    @property
    def _tokenizer(self) -> Path:
        return self.root / "tokenizer.safetensors"

    def train_tokenizer(self) -> list[str]:
        return [_run(train.main, "train", "vavae", *self._tokenizer_run()), self._export("tokenizer")]

    def extract(self) -> list[str]:
        weights = key("ckpt_path", self._tokenizer)
        return [_run(extract.main, "extract", *self._tokenizer_run(), weights, "--output", self.root / LATENTS)]

    def train_lightningdit(self) -> list[str]:
        return [_run(train.main, "train", "lightningdit", *self._diffusion_run()), self._export("lightningdit")]

    def sample(self) -> list[str]:
        own = (key("ckpt_path", self.root / "lightningdit.safetensors"), f"sample.seed={self.seed}")
        return [_run(sample.main, "sample", *self._diffusion_run(), *own, "--output", self.root / "samples")]

    def evaluate(self) -> list[str]:
        """Measure reconstructions, latents and samples; figures.json has what came out."""
        npz, (latents, fid) = self.root / "samples" / "samples.npz", (self.root / f"{n}.json" for n in (LATENTS, "fid"))
        space = ["--latents", self.root / LATENTS, "--repeats", self.material.repeats, "--output", latents]
        images = ["--samples", npz, "--reference", self.material.heldout, *self.material.features]
        images += ["--image-size", self.material.runs[0].data.image_size, "--device", _device(), "--output", fid]
        images += ["--allow-few"] if self.material.allow_few else []
        commands = [
            _run(evaluate.main, "evaluate", *self._diffusion_run(), *space),
            _run(evaluate.main, "evaluate", *images),
        ]
        figures = read_json(latents)["metrics"] | {"frechet_distance": read_json(fid)["metrics"]["fid"]}
        figures |= self._reconstructed()
        if self.material.digits:
            figures |= self._recognised(npz)
        facts = {name: read_json(latents)[name] for name in ("vectors", "repeats")}
        facts |= {"samples": read_json(fid)["samples"], "features": read_json(fid)["features"]}
        write_json(self.root / "figures.json", {"figures": figures, **facts})
        return commands

    def _reconstructed(self) -> dict[str, float]:
        """PSNR (dB) and SSIM of held-out images, decoded from a posterior sample, as means over the images."""
        data = self.material.runs[0].images()
        decoding = Decoding(data.decoder, data.exif_rotation, _device())
        originals = open_images(self.material.heldout, data.image_size, "center", decoding)
        tokenizer = load_tokenizer(self._tokenizer, select_ops("auto")).to(_device())
        decoded = Reconstructions(originals, tokenizer, seed=self.seed)
        metrics = evaluate_reconstructions(originals, decoded, extractor=None, lpips=None, metadata={})["metrics"]
        return {name: metrics[name] for name in ("psnr", "ssim") if name in metrics}

    def _recognised(self, npz: Path) -> dict[str, float]:
        """The share of samples that a classifier of pixels sees as their labels, and Fréchet distances beside `fid`:
        that of training digits in its features, and that of the samples in the digits' own 8 × 8 pixels."""
        training, heldout = dataset.read(self.material.images), dataset.read(self.material.heldout)
        with np.load(npz) as content:
            made, labels = torch.from_numpy(content["arr_0"]), torch.from_numpy(content["arr_1"])
        extractor = self.material.extractor()
        assert isinstance(extractor, FoundationFeatures)
        classifier = DigitClassifier(training, heldout)
        report = samples_report(classifier, made, labels, training, heldout, extractor.pooled)
        moments = [FeatureStatistics().update(dataset.downsample(x).flatten(1)).moments for x in (made, heldout.images)]
        return {
            "recognised": report["recognised"],
            "frechet_distance_of_training_images": report["frechet_distance_of_training_digits"],
            "frechet_distance_of_pixels": frechet_distance(*moments[0], *moments[1]),
        }

    def _tokenizer_run(self) -> list[str]:
        own = [key("data.data_path", self.material.images), f"loss.use_vf={json.dumps(self.use_vf)}"]
        return self.material.tokenizer.arguments([*own, *self._everywhere("tokenizer")])

    def _diffusion_run(self) -> list[str]:
        own = [key("data.data_path", self.root / LATENTS), key("vae.ckpt_path", self._tokenizer)]
        return self.material.lightningdit.arguments([*own, *self._everywhere("lightningdit")])

    def _everywhere(self, name: str) -> list[str]:
        return [key("train.output_dir", self.root), f"train.exp_name={name}", f"train.global_seed={self.seed}"]

    def _export(self, name: str) -> str:
        target = self.root / f"{name}.safetensors"
        for suffix in export.SUFFIXES:
            target.with_suffix(suffix).unlink(missing_ok=True)  # of a stage that was interrupted
        return _run(export.main, "export", self.root / name, target)


STAGES: dict[str, Callable[[Arm], list[str]]] = {
    "training the tokenizer": Arm.train_tokenizer,
    "extracting the latents": Arm.extract,
    "training LightningDiT": Arm.train_lightningdit,
    "sampling": Arm.sample,
    "measuring": Arm.evaluate,
}


def _run(program: Callable[[list[str]], int], name: str, *arguments: object) -> str:
    """Run a program in this process → the command that would do the same, which is printed first."""
    argv = [str(a) for a in arguments]
    command = f"python -m launch {name} {shlex.join(argv)}"
    print(f"$ {command}", flush=True)
    if status := program(argv):
        raise SystemExit(status)  # stopped by a signal: the same command goes on from here
    return command


def _device() -> str:
    from launch.training.engine import uses_cuda  # imports DeepSpeed

    return "cuda" if uses_cuda() else "cpu"
