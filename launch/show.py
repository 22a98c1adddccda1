"""`python -m launch show interpolation|denoising CONFIG …` and `show nearest --samples DIR --images DIR`: pictures.

    show interpolation CONFIG --indices 0,1 --labels 207,388 --columns 8
    show denoising CONFIG --indices 0,1 --labels 207,388 --columns 8
    show nearest --samples output/samples --images /data/imagenet/train --image-size 256 [--foundation FILE]

interpolation: from the sample with one index and label to that of the other, both at the ends: noise along a great
circle, the label's embedding along a line. denoising: at points spread over the solver's grid, the state on its way
from noise to data, decoded, and below it the data that the network predicts from it. Both follow the ODE and guidance
of the config's `sample` section. nearest: beside some samples the images of a folder that are nearest to them, in
pixels or in the features of a foundation model; the folder is gone through once, whatever its size.

(A grid of classes is `sample --classes 207,388 --columns 8`.) Beside the picture, a JSON of the same name says what it
shows.
"""

import argparse

import torch
from torch import Tensor

from common.files import require_writable, write_json
from launch.arguments import add_run_file, load_run, local_path, require_device
from launch.config import ConfigError, LightningDiTRun
from launch.evaluation.features import FoundationFeatures
from launch.evaluation.image_source import open_images
from launch.pictures import image_rows
from launch.sample import make_generator
from launch.sampling.class_names import class_captions
from launch.sampling.generator import SampleGenerator
from launch.sampling.labels import check_labels, given_labels
from launch.sampling.neighbours import nearest_images, pixel_features
from launch.sampling.strips import denoising, interpolation
from launch.trained import sampling_settings

_BATCH = 64


def main(argv: list[str]) -> int:
    """Draw, and say where the picture is; returns the exit status."""
    kinds = {"interpolation": _interpolation, "denoising": _denoising, "nearest": _nearest}
    if not argv or argv[0] not in kinds:
        if argv[:1] in (["-h"], ["--help"]):
            print(__doc__)
            return 0
        raise ConfigError(f"show {argv[0] if argv else ''}: what to show is one of {', '.join(kinds)}")
    args = _parse(argv[0], argv[1:])
    kinds[argv[0]](args)
    print(args.output)
    return 0


def _parse(what: str, argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m launch show {what}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if what == "nearest":
        parser.add_argument("--samples", type=local_path, required=True, help="folder or npz of samples")
        parser.add_argument("--images", type=local_path, required=True, help="images that a model was trained on")
        parser.add_argument("--count", type=int, default=8, help="of the first samples (default: 8)")
        parser.add_argument("--image-size", type=int, help="crop the images to squares of this size")
        parser.add_argument("--foundation", type=local_path, help="compare by this foundation model, not by pixels")
    else:
        add_run_file(parser, "LightningDiT file; its ckpt_path and vae.ckpt_path name the weights", "sample.seed=1")
        parser.add_argument("--indices", default="0,1", help="of samples, separated by commas (default: 0,1)")
        parser.add_argument("--labels", required=True, help="their classes, or one for all")
    parser.add_argument("--columns", type=int, default=8, help="images in a row (default: 8)")
    parser.add_argument("--output", type=local_path, required=True, metavar="FILE.png")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_intermixed_args(argv)
    _check(args)
    return args


def _check(args: argparse.Namespace) -> None:
    require_device(args.device)
    if args.columns < 2:
        raise ConfigError(f"--columns {args.columns}: at least 2")
    if args.output.suffix != ".png":
        raise ConfigError(f"--output {args.output}: pictures are .png")
    if getattr(args, "count", 1) < 1:
        raise ConfigError(f"--count {args.count}: at least 1")
    require_writable(args.output)


def _strip(args: argparse.Namespace) -> tuple[SampleGenerator, list[int], list[int], dict]:
    """The generator on its device, indices, as many labels, and facts."""
    run = load_run(args.config, args.overrides, "lightningdit")
    assert isinstance(run, LightningDiTRun)
    indices, labels = _indices(args.indices), given_labels(args.labels)
    labels = labels * len(indices) if len(labels) == 1 else labels
    if len(labels) != len(indices):
        raise ConfigError(f"--labels {args.labels}: one, or as many as --indices {args.indices}")
    found = check_labels(labels, run.data.num_classes)
    settings = sampling_settings(run).model_copy(update={"format": "png"})
    generator, facts = make_generator(run, settings, found)
    generator.to(torch.device(args.device))
    return generator, indices, found.tolist(), facts | {"indices": indices, "labels": found.tolist()}


def _indices(text: str) -> list[int]:
    try:
        indices = [int(word) for word in text.split(",")]
    except ValueError:
        indices = [-1]
    if min(indices) < 0:
        raise ConfigError(f"--indices {text}: whole numbers from 0 on, separated by commas, such as 0,1")
    return indices


def _interpolation(args: argparse.Namespace) -> None:
    generator, indices, labels, facts = _strip(args)
    if len(indices) != 2:
        raise ConfigError(f"--indices {args.indices}: an interpolation has two ends")
    images = interpolation(generator, indices, labels, args.columns)
    names = class_captions(facts.get("classes"), generator.model.config.num_classes)
    caption = " to ".join(dict.fromkeys(names[label] for label in labels))
    weights = torch.linspace(0, 1, args.columns).tolist()
    image_rows([images], [caption], args.output, heads=[f"{weight:.2f}" for weight in weights])
    write_json(args.output.with_suffix(".json"), facts | {"weights": weights})


def _denoising(args: argparse.Namespace) -> None:
    generator, indices, labels, facts = _strip(args)
    found = denoising(generator, indices, labels, args.columns)
    names = class_captions(facts.get("classes"), generator.model.config.num_classes)
    rows = [row for pair in zip(found.states, found.predictions, strict=True) for row in pair]
    captions = [caption for label in labels for caption in (names[label], "predicted")]
    image_rows(rows, captions, args.output, group=2, heads=[f"t = {t:.2f}" for t in found.times])
    write_json(args.output.with_suffix(".json"), facts | {"times": found.times})


def _nearest(args: argparse.Namespace) -> None:
    samples, images = open_images(args.samples), open_images(args.images, args.image_size)
    shown = _first(samples.batches(min(args.count, _BATCH)), args.count)
    features = pixel_features
    if args.foundation is not None:
        features = FoundationFeatures.from_file(args.foundation, args.device).pooled
    found = nearest_images(shown, images, args.columns - 1, features)
    rows = list(torch.cat([shown[:, None], found.images], 1)) if shown.shape[1:] == found.images.shape[2:] else None
    if rows is None:
        raise ConfigError(f"samples are {_size(shown)}, images {_size(found.images[0])}: give --image-size")
    captions = [f"{i}: {distance:.3g}" for i, distance in enumerate(found.distances[:, 0].tolist())]
    image_rows(rows, captions, args.output, heads=["sample", *["nearest"] * (args.columns > 1)])
    by = "pixels, root mean square in [0, 1]" if args.foundation is None else f"features of {args.foundation}"
    facts = {"samples": str(args.samples), "images": str(args.images), "distance": by, "searched": len(images)}
    facts |= {"nearest": found.indices.tolist(), "distances": found.distances.tolist()}
    write_json(args.output.with_suffix(".json"), facts)


def _first(batches, count: int) -> Tensor:
    found: list[Tensor] = []
    for batch in batches:
        found.append(batch)
        if sum(map(len, found)) >= count:
            break
    return torch.cat(found)[:count]


def _size(images: Tensor) -> str:
    return f"{images.shape[-2]}×{images.shape[-3]}"
