"""`python -m launch evaluate`: samples against a reference, reconstructions against originals, latents, in figures.

    evaluate --samples samples.npz --reference imagenet256.npz
    evaluate CONFIG --samples samples/                       # reference: the config's data.fid_reference_file
    evaluate --tokenizer vavae.safetensors --originals imagenet/val --image-size 256
    evaluate --reconstructions decoded/ --originals images/
    evaluate --latents latents/ --repeats 10                 # how evenly they fill their space

Samples, originals and reconstructions are folders of images or npz files with `arr_0`; a reference may also be an npz
with the statistics `mu` and `sigma` (and `mu_s`, `sigma_s` for sFID). What made the samples is read from the JSON
beside them: `samples.json` for `samples.npz`, `folder/samples.json` for `folder`. With a CONFIG, latents are mirrored
where its `data.latent_flip` says so, else half of them are, as published. Image files are decoded as published, unless
--decoder or a tokenizer's CONFIG (`data.decoder`, `data.exif_rotation`, `data.image_size`) says otherwise.
"""

import argparse
import json
import math
from pathlib import Path

import torch

from common.files import JSON_LIMIT, open_regular, read_json, require_writable, write_json
from common.sections import short
from common.text import printable
from launch.arguments import add_run_file, load_run, local_path, require_device
from launch.config import VavaeRun, select_ops
from launch.config_files import parse_value
from launch.evaluation.features import Extractor, FoundationFeatures, InceptionFeatures
from launch.evaluation.image_source import Decoding, EncodedImages, ImageSource, open_images
from launch.evaluation.latent_space import evaluate_latents
from launch.evaluation.metrics import NOT_STATED
from launch.evaluation.reconstructions import (
    Reconstructions,
    evaluate_reconstructions,
    perceptual_distance,
    require_pairs,
)
from launch.evaluation.runner import evaluate_samples, open_reference, require_one_size
from lightningdit.data import LatentDataset
from vavae.decoders.choice import NAMES as DECODERS
from vavae.weights import fingerprint, load_tokenizer

_IMAGES = ("samples", "originals")
#: Option → the modes that read it; a mode is the option that names what to measure.
_OPTION_MODES = {
    "config": ("samples", "originals", "latents"),
    "reference": ("samples",),
    "reconstructions": ("originals",),
    "tokenizer": ("originals",),
    "image_size": _IMAGES,
    "crop": _IMAGES,
    "decoder": _IMAGES,
    "posterior": ("originals",),
    "seed": ("originals", "latents"),
    "vectors": ("latents",),
    "repeats": ("latents",),
    "inception_weights": _IMAGES,
    "foundation": _IMAGES,
    "lpips_weights": ("originals",),
    "device": _IMAGES,
    "batch_size": _IMAGES,
    "allow_few": _IMAGES,
}
#: Pairs of options of which the first has no effect beside the second, and of which it has none without the second.
_EXCLUSIVE = [
    ("inception_weights", "foundation"),
    ("config", "reference"),
    ("posterior", "reconstructions"),
    ("seed", "reconstructions"),
]
_REQUIRES = [("crop", "image_size"), ("decoder", "image_size")]
_COMMON_ENTRIES = {"metrics", "skipped", "notes"}
_FILE_ENTRIES = {"decoder", "decoded_on", "exif_rotation", "crop", "image_size"}
#: Mode → the entries of its result that are no metadata.
_RESULT_ENTRIES = {
    "samples": _COMMON_ENTRIES | {"samples", "samples_sha256", "reference", "features"} | _FILE_ENTRIES,
    "originals": _COMMON_ENTRIES | {"images", "originals", "reconstructions", "features"} | _FILE_ENTRIES,
    "latents": _COMMON_ENTRIES
    | {"spread", "vectors", "vectors_sha256", "repeats", "seed", "mirrored", "latents", "images", "shape"},
}


def main(argv: list[str]) -> int:
    """Measure, print, and write JSON; returns the exit status."""
    args = _parse(argv)
    if args.output:
        _require_output(args.output)
    measure = _samples if args.samples else _reconstructions if args.originals else _latents
    result = measure(args)
    if wrong := [name for name, value in result["metrics"].items() if not math.isfinite(value)]:
        raise ValueError(
            f"not finite, so no figure, of {args.samples or args.originals or args.latents}: {', '.join(wrong)}"
        )
    print(as_text(result))
    if args.output:
        write_json(args.output, result)
        print(f"written to {args.output}")
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m launch evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_run_file(
        parser,
        "run file, whose data section says what is not given here: a tokenizer's with --originals, else LightningDiT's",
        "data.fid_reference_file=/data/imagenet.npz",
        required=False,
    )
    data = parser.add_argument_group("images")
    data.add_argument("--samples", type=local_path, help="generated images")
    data.add_argument("--reference", type=local_path, help="real images, or their statistics")
    data.add_argument("--originals", type=local_path, help="images that were, or are to be, encoded and decoded")
    data.add_argument("--reconstructions", type=local_path, help="the decoded images, in the same order")
    data.add_argument("--tokenizer", type=local_path, help="exported tokenizer to decode --originals with")
    data.add_argument("--image-size", type=int, help="crop the images of folders to squares of this size")
    data.add_argument("--crop", default="center", choices=["center", "published_eval"], help="how (default: ADM's)")
    data.add_argument("--decoder", choices=["auto", *DECODERS], help="of image files that are cropped (default: pil)")
    data.add_argument(
        "--posterior", default="sample", choices=["sample", "mode"], help="what of the encoding to decode"
    )
    data.add_argument("--seed", type=int, default=0, help="of the posterior's samples, and of the choice of vectors")
    space = parser.add_argument_group("latents")
    space.add_argument("--latents", type=local_path, help="directory of latents, as extract writes them or published")
    space.add_argument("--vectors", type=int, help="how many to draw (default: 10,000, or one of each image if fewer)")
    space.add_argument("--repeats", type=int, default=1, help="draws to average over, a minute each (published: 10)")
    nets = parser.add_argument_group("networks")
    nets.add_argument("--inception-weights", type=local_path, help="torch-fidelity's file (default: download)")
    nets.add_argument("--foundation", type=local_path, help="compare by this foundation model instead of Inception")
    nets.add_argument("--lpips-weights", type=local_path, help="VGG-16 in torchvision's layout (default: download)")
    nets.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    nets.add_argument("--batch-size", type=int, default=64)
    out = parser.add_argument_group("result")
    out.add_argument("--metadata", type=local_path, help="JSON on what made the images (default: the one beside them)")
    out.add_argument(
        "--set", action="append", default=[], metavar="key=value", help="add to the metadata, or change it"
    )
    out.add_argument("--allow-few", action="store_true", help="accept no more samples than there are features")
    out.add_argument("--output", type=local_path, help="JSON file for the result; replaces an earlier result only")
    args = parser.parse_intermixed_args(argv)
    _check_mode(args)
    _refuse_unused({name for name in _OPTION_MODES if getattr(args, name) != parser.get_default(name)}, args)
    return args


def _check_mode(args: argparse.Namespace) -> None:
    """Raise ValueError where the options do not choose exactly one mode, or have values that none allows."""
    asked = [name for name in ("samples", "originals", "latents") if getattr(args, name) is not None]
    if len(asked) != 1:
        raise ValueError(f"evaluate needs one of --samples, --originals and --latents, got {len(asked)} of them")
    if args.originals and (args.reconstructions is None) == (args.tokenizer is None):
        raise ValueError("--originals needs either --reconstructions or --tokenizer")
    for name in ("batch_size", "image_size"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"{_option(name)} must be at least 1, got {value}")
    require_device(args.device)


def _refuse_unused(given: set[str], args: argparse.Namespace) -> None:
    """Raise ValueError for an option that the chosen mode does not read."""
    mode = _mode(args)
    for name in sorted(given):
        if mode not in _OPTION_MODES[name]:
            modes = " and ".join(f"--{other}" for other in _OPTION_MODES[name])
            raise ValueError(f"{_option(name)} is for {modes}; with --{mode} it changes nothing")
    for name, other in _EXCLUSIVE:
        if name in given and other in given:
            raise ValueError(f"{_option(name)} changes nothing beside {_option(other)}: give one of them")
    for name, other in _REQUIRES:
        if name in given and other not in given and not (_mode(args) == "originals" and args.config):
            raise ValueError(f"{_option(name)} changes nothing without {_option(other)}")


def _mode(args: argparse.Namespace) -> str:
    return next(name for name in ("samples", "originals", "latents") if getattr(args, name) is not None)


def _option(name: str) -> str:
    return "CONFIG" if name == "config" else f"--{name.replace('_', '-')}"


def _require_output(path: Path) -> None:
    """Raise ValueError or WriteError, before anything is measured, where the result cannot or should not go there."""
    require_writable(path)
    if not path.exists():
        return
    try:
        with open_regular(path) as f:
            earlier = json.loads(f.read(JSON_LIMIT))  # NaN and infinity, too, which earlier versions wrote
    except (ValueError, RecursionError):
        earlier = None
    if not (isinstance(earlier, dict) and "metrics" in earlier):
        raise ValueError(f"--output {path} is already there and is no result of evaluate: give another name")


def _samples(args: argparse.Namespace) -> dict:
    reference = args.reference
    if reference is None and args.config is not None:
        run = load_run(args.config, args.overrides, "lightningdit")
        reference = run.data.fid_reference_file
    if reference is None:
        raise ValueError("no reference: give --reference, or a config with data.fid_reference_file")
    files = args.image_size, args.crop, Decoding(args.decoder or "pil", device=args.device)
    samples, known = open_images(args.samples, *files), open_reference(reference, *files)
    if known.images is not None:
        require_one_size(samples, known.images)  # before networks are loaded, which may be a download
    metadata = _metadata(args, args.samples) | _decoder_of(samples)
    return evaluate_samples(
        samples, known, _extractor(args), metadata=metadata, batch_size=args.batch_size, allow_few=args.allow_few
    )


def _reconstructions(args: argparse.Namespace) -> dict:
    image_size, decoding = args.image_size, Decoding(args.decoder or "pil", device=args.device)
    if args.config is not None:
        run = load_run(args.config, args.overrides, "vavae")
        assert isinstance(run, VavaeRun)
        data = run.images()
        image_size = image_size or data.image_size
        decoding = Decoding(args.decoder or data.decoder, data.exif_rotation, args.device)
    files = image_size, args.crop, decoding
    originals = open_images(args.originals, *files)
    if args.tokenizer:
        tokenizer = load_tokenizer(args.tokenizer, select_ops("auto")).to(args.device)
        decoded = Reconstructions(originals, tokenizer, posterior=args.posterior, seed=args.seed)
        hashes = {"tokenizer": fingerprint(tokenizer)}
        made = {"dtype": "float32", "posterior": args.posterior, "seed": args.seed, "hashes": hashes}
    else:
        decoded, made = open_images(args.reconstructions, *files), {}
    require_pairs(originals, decoded)
    metadata = made | _metadata(args, args.reconstructions) | _decoder_of(originals)
    skipped = {}
    extractor = _unless_missing(lambda: _extractor(args), "rfid", skipped, args.inception_weights or args.foundation)
    lpips = _unless_missing(
        lambda: perceptual_distance(args.lpips_weights, args.device), "lpips", skipped, args.lpips_weights
    )
    if lpips is None:
        skipped["lpips"] += " (here: --lpips-weights)"
    return evaluate_reconstructions(
        originals,
        decoded,
        extractor=extractor,
        lpips=lpips,
        metadata=metadata,
        batch_size=args.batch_size,
        allow_few=args.allow_few,
        skipped=skipped,
    )


def _decoder_of(images: ImageSource) -> dict:
    """How image files were decoded and cropped, as facts of the result; empty where they were not cropped."""
    return images.facts if isinstance(images, EncodedImages) else {}


def _latents(args: argparse.Namespace) -> dict:
    flip = True
    if args.config is not None:
        run = load_run(args.config, args.overrides, "lightningdit")
        flip = run.data.latent_flip
    latents, metadata = LatentDataset(args.latents, latent_flip=flip), _metadata(args, None)
    result = evaluate_latents(latents, vectors=args.vectors, repeats=args.repeats, seed=args.seed)
    if result["tokenizer"] in (NOT_STATED, None):  # by the latents; then the metadata may
        result["tokenizer"] = metadata.get("tokenizer", NOT_STATED)
    return metadata | result


def _unless_missing(build, figure: str, skipped: dict[str, str], named: Path | None):
    """A network, or None with the reason where its weights cannot be had; the other figures do not need it.

    Weights that were `named` are asked for: without them there is no result.
    """
    try:
        return build()
    except (ValueError, RuntimeError) as e:
        if named is not None:
            raise
        skipped[figure] = str(e)
        return None


def _extractor(args: argparse.Namespace) -> Extractor:
    if args.foundation is not None:
        return FoundationFeatures.from_file(args.foundation, args.device)
    return InceptionFeatures(args.inception_weights, args.device)


def _metadata(args: argparse.Namespace, images: Path | None) -> dict:
    """The facts in the JSON that was named or lies beside the images, changed by --set."""
    path = args.metadata
    if path is None and images is not None:
        path = images / "samples.json" if images.is_dir() else images.with_suffix(".json")
        path = path if path.is_file() else None
    facts = {} if path is None else read_json(path)
    if not isinstance(facts, dict):
        raise ValueError(f"{path} holds {type(facts).__name__}, not a JSON object")
    if "metrics" in facts:
        if args.metadata is not None:
            raise ValueError(f"{path} is a result of evaluate; --metadata takes what made the images")
        facts = {}  # written beside them by --output
    for setting in args.set:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise ValueError(f"--set {short(setting)} is not of the form key=value")
        if key in _RESULT_ENTRIES[_mode(args)]:
            raise ValueError(f"--set {short(setting)}: {key} is what evaluate itself finds out")
        facts[key] = parse_value(value, f"--set {short(setting)}")
        try:
            json.dumps(facts[key], allow_nan=False)
        except ValueError as e:
            raise ValueError(f"--set {short(setting)} is nothing that JSON can hold: {e}") from None
    return facts


def as_text(result: dict) -> str:
    """The figures first, then what they are figures of, a line each (but a thousand names of classes)."""
    figures = [f"{name:<15} {value:.4f}" for name, value in result["metrics"].items()]
    skipped = [f"{name:<15} not measured: {reason}" for name, reason in result["skipped"].items()]
    facts = [f"{k:<15} {v}" for k, v in result.items() if k not in ("metrics", "skipped", "notes", "classes")]
    notes = [f"note: {note}" for note in result["notes"]]
    return "\n".join(map(printable, [*figures, *skipped, "", *facts, *notes]))
