"""`python -m launch sample CONFIG [key=value …] [--output DIR] [--format npz|png|webp|latents] [--labels 1,2,3]`

Samples of a trained model, `sample.fid_num` of them, in DIR. What is written is `sample.format`, or --format:

    npz        samples.npz: `arr_0` uint8 [N, H, W, 3] as the ADM evaluator takes it, `arr_1` the labels
    png, webp  images/00000000.png … without loss, labels.npy; with --by-class below a folder for each class
    latents    a set of latents as `extract` writes it, which `decode` makes images of later; no tokenizer is needed

What made them is in DIR/samples.json, with the number of images of each class, and the names of the classes where the
model knows them; a picture of the first ones in DIR/samples.png. With `sample.likelihood` there is `log_likelihood` [N]
in the npz, else log_likelihood.npy: of the normalised latents under the model, in nats.

Labels follow `sample.labels` (index, balanced, shuffled or random), or are given, one sample each: --labels 1,2,3 or
--labels @FILE (text, or an .npy of whole numbers). `--classes 207,388 --columns 8` is a grid, a row for each class.

Sample i depends on `sample.seed`, its label and i alone: an interrupted run goes on with what it lacks, and neither the
size of batches nor the number of processes changes anything where nothing is compiled, as by default on a CPU
(launch/README.md says what holds where).

--demo: the eight images of the published demo (scale 9, neither interval nor shift).
"""

import argparse
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np

from launch.arguments import add_run_file, load_run, local_path
from launch.config import ConfigError, LightningDiTRun, overridden_keys, select_ops
from launch.guides import guide_network
from launch.sampling.facts import as_now, facts_of
from launch.sampling.generator import SampleGenerator
from launch.sampling.image_folder import ImageFolder
from launch.sampling.labels import check_labels, describe_labels, given_labels, protocol_labels
from launch.sampling.outputs import COUNTS, FolderOutput, LatentsOutput, NpzOutput, Output
from launch.sampling.picture import draw_picture, picked_for_picture
from launch.sampling.pipeline import Pipeline
from launch.sampling.produce import Job, Making, produce
from launch.sampling.units import batch_size
from launch.trained import (
    build_diffusion,
    build_tokenizer,
    diffusion_weights,
    require_average_velocities,
    require_transport,
    sampling_settings,
)
from lightningdit.config import SampleConfig, SampleFormat
from lightningdit.flow import Transport

DEMO_LABELS = (975, 3, 207, 387, 388, 88, 979, 279)
DEMO_SETTINGS = {"cfg_scale": 9.0, "cfg_interval_start": 0.0, "timestep_shift": 0.0}
COLUMNS = 8


def main(argv: list[str]) -> int:
    """Generate and say where the images are; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m launch sample", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_run_file(parser, "LightningDiT file; its ckpt_path and vae.ckpt_path name the weights", "sample.cfg_scale=4")
    parser.add_argument("--output", type=local_path, help="directory (default: samples/ in the run's directory)")
    parser.add_argument("--format", choices=get_args(SampleFormat), help="what to write (default: sample.format)")
    parser.add_argument("--by-class", action="store_true", help="of png and webp: a folder for each class")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--labels", help="class labels, separated by commas, or @FILE: one image each")
    which.add_argument("--classes", help="classes of a grid, separated by commas: a row of images each")
    which.add_argument("--demo", action="store_true", help="the published demo's eight images")
    parser.add_argument("--columns", type=int, help=f"images of each class of the grid (default: {COLUMNS})")
    args = parser.parse_intermixed_args(argv)
    run = load_run(args.config, args.overrides, "lightningdit")
    assert isinstance(run, LightningDiTRun)
    if args.demo and (classes := run.data.num_classes) <= max(DEMO_LABELS):
        raise ConfigError(f"--demo shows classes of ImageNet's 1,000; this model has {classes:,} (data.num_classes)")
    settings, labels = sampling_settings(run), _asked_labels(args)
    if labels is not None:
        _require_no_others(len(labels), overridden_keys(args.overrides, "sample"), settings)
    if args.demo:
        settings = settings.model_copy(update=DEMO_SETTINGS)
    if args.format is not None:
        settings = settings.model_copy(update={"format": args.format})
    output = args.output or run.train.directory / ("demo" if args.demo else "samples")
    generate(run, output, settings, labels, by_class=args.by_class, columns=args.columns if args.classes else None)
    return 0


def _asked_labels(args: argparse.Namespace) -> Sequence[int] | None:
    if args.columns is not None and (args.classes is None or args.columns < 1):
        why = "is of --classes" if args.classes is None else "at least 1"
        raise ConfigError(f"--columns {args.columns}: {why}")
    if args.demo:
        return DEMO_LABELS
    if args.classes is not None:
        args.columns = args.columns or COLUMNS
        return [label for label in given_labels(args.classes) for _ in range(args.columns)]
    return None if args.labels is None else given_labels(args.labels)


def _require_no_others(labels: int, keys: Collection[str], settings: SampleConfig) -> None:
    """Raise ConfigError where a command line that gives labels also sets `keys` of sample that mean others: a protocol,
    or another number of samples."""
    if "labels" in keys:
        raise ConfigError(f"sample.labels={settings.labels} beside labels that are given: leave one of the two out")
    if "fid_num" in keys and labels != settings.fid_num:
        raise ConfigError(f"{labels:,} labels for sample.fid_num {settings.fid_num:,} samples: one each is wanted")


def generate(
    run: LightningDiTRun,
    output: Path,
    settings: SampleConfig | None = None,
    labels: Sequence[int] | None = None,
    *,
    by_class: bool = False,
    columns: int | None = None,
) -> Path:
    """Generate the samples of a `sample` section (default: the run's) into `output` → the path of the result.

    labels: one sample each; None: `fid_num` by the section's protocol. by_class: of an image folder. columns: of the
    picture, a grid with a row for every `columns` samples. Raises ValueError where weights are missing or do not fit, a
    label is no class, `output` holds samples that other settings or weights have made, or a sample is not finite: then
    no part of its batch is kept.
    """
    # Imports DeepSpeed: seconds that a mistake in the config need not wait.
    from launch.training.engine import start_processes

    settings = settings or sampling_settings(run)
    if by_class and settings.format not in ("png", "webp"):
        raise ConfigError(f"--by-class is of images in files, png or webp, not of {settings.format}")
    found = _labels(run, settings, labels)
    generator, facts = make_generator(run, settings, found)
    facts = describe_labels(found, labels is not None, settings.labels, run.data.num_classes) | facts
    facts = {"num_samples": len(found)} | facts | ({"by_class": True} if by_class else {})
    processes = start_processes(timeout_minutes=24 * 60)  # processes wait for the slowest at the end
    names = facts.get("classes")
    picked = picked_for_picture(found, columns)
    draw = partial(draw_picture, labels=found[picked], columns=columns, names=names, num_classes=run.data.num_classes)
    written = _output(output, settings, found, run.data.num_classes, by_class, facts)
    job = Job(output, len(found), written, facts, COUNTS, picked, draw, as_now)

    def prepare() -> Making:
        generator.to(processes.device)
        # What is compiled is kept for each thread that runs it: one is enough to keep a CPU busy then.
        workers = 1 if settings.compile == "inductor" else None
        pipeline = Pipeline(generator.solve, generator.decode, processes.device, workers)
        bytes_ = 2 if settings.precision == "bfloat16" else 4
        size = batch_size(
            settings.per_proc_batch_size,
            processes.device,
            generator.model.config,
            run.data.image_size,
            weight_bytes=bytes_,
            workers=pipeline.workers,
        )
        return pipeline, size, generator.checked

    return produce(job, processes, prepare)


def _labels(run: LightningDiTRun, settings: SampleConfig, labels: Sequence[int] | None) -> np.ndarray:
    classes = run.data.num_classes
    if labels is None:
        return protocol_labels(settings.labels, settings.fid_num, classes, settings.seed)
    return check_labels(labels, classes)


def make_generator(run: LightningDiTRun, settings: SampleConfig, labels: np.ndarray) -> tuple[SampleGenerator, dict]:
    """The networks, and the facts that an image depends on or that a result must state."""
    ops, found = select_ops(run.kernels), diffusion_weights(run)
    source = str(run.ckpt_path or run.train.directory)
    require_transport(found, run.transport, source)
    require_average_velocities(found, [settings], source)
    latents_alone = settings.format == "latents"
    without = latents_alone and run.vae.ckpt_path is None
    tokenizer = None if without else build_tokenizer(run, ops, found.config.in_channels)
    model, guide = build_diffusion(found, ops, source), guide_network(run, settings, ops, found)
    assert found.latents is not None
    generator = SampleGenerator(
        model,
        None if latents_alone else tokenizer,
        found.latents,
        Transport.from_config(run.transport),
        settings,
        source,
        str(run.vae.ckpt_path),
        labels,
        None if guide is None else guide.network,
    )
    return generator, facts_of(settings, run.transport, found, model, tokenizer, guide)


def _output(
    output: Path, settings: SampleConfig, labels: np.ndarray, num_classes: int, by_class: bool, facts: dict
) -> Output:
    if settings.format == "npz":
        return NpzOutput(output, labels)
    if settings.format != "latents":
        return FolderOutput(ImageFolder(output, settings.format, labels, num_classes, by_class))
    sha = facts["hashes"].get("tokenizer")
    names = facts.get("classes")
    identity = {key: value for key, value in facts.items() if key not in ("classes", "label_counts")}
    return LatentsOutput(output, labels, {"samples": identity}, sha and {"sha256": sha}, names)
