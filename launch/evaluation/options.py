"""The command line of `evaluate`: options, and which of them go together."""

import argparse

import torch

from launch.arguments import add_run_file, local_path, require_device
from vavae.decoders.choice import NAMES as DECODERS

#: Modes, each the option that names what to measure; `write_reference` is one where nothing else is measured.
MODES = ("samples", "originals", "latents", "write_reference")
_IMAGES = ("samples", "originals", "write_reference")
_COMPARED = ("samples", "write_reference")
#: Option → the modes that read it.
_OPTION_MODES = {
    "config": ("samples", "originals", "latents"),
    "reference": _COMPARED,
    "reference_images": ("write_reference",),
    "reconstructions": ("originals",),
    "tokenizer": ("originals",),
    "image_size": _IMAGES,
    "crop": _IMAGES,
    "decoder": _IMAGES,
    "expect": _COMPARED,
    "num_classes": ("samples",),
    "posterior": ("originals",),
    "seed": ("originals", "latents"),
    "vectors": ("latents",),
    "repeats": ("latents",),
    "inception_weights": _IMAGES,
    "inception_sha256": _IMAGES,
    "dinov2_weights": _COMPARED,
    "download": _IMAGES,
    "foundation": _IMAGES,
    "lpips_weights": ("originals",),
    "device": _IMAGES,
    "batch_size": _IMAGES,
    "allow_few": ("samples", "originals"),
    "metadata": ("samples", "originals", "latents"),
    "set": ("samples", "originals", "latents"),
    "output": ("samples", "originals", "latents"),
}
#: Pairs of options of which the first has no effect beside the second, and of which it has none without the second.
_EXCLUSIVE = [
    ("inception_weights", "foundation"),
    ("inception_sha256", "foundation"),
    ("config", "reference"),
    ("posterior", "reconstructions"),
    ("seed", "reconstructions"),
]
_REQUIRES = [("crop", "image_size"), ("decoder", "image_size"), ("inception_sha256", "inception_weights")]
_LEAST = {"batch_size": 1, "image_size": 1, "expect": 1, "num_classes": 1, "reference_images": 0}


def parse(argv: list[str], description: str | None) -> argparse.Namespace:
    """The options; raises ValueError where they do not go together, argparse's SystemExit where one is none."""
    parser = argparse.ArgumentParser(
        prog="python -m launch evaluate", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_run_file(
        parser,
        "run file, whose data section says what is not given here: a tokenizer's with --originals, else LightningDiT's",
        "data.fid_reference_file=/data/imagenet.npz",
        required=False,
    )
    _add_images(parser.add_argument_group("images"))
    space = parser.add_argument_group("latents")
    space.add_argument("--latents", type=local_path, help="directory of latents, as extract writes them or published")
    space.add_argument("--vectors", type=int, help="how many to draw (default: 10,000, or one of each image if fewer)")
    space.add_argument("--repeats", type=int, default=1, help="draws to average over, a minute each (published: 10)")
    _add_networks(parser.add_argument_group("networks"))
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


def _add_images(data) -> None:
    data.add_argument("--samples", type=local_path, help="generated images")
    data.add_argument("--reference", type=local_path, help="real images, or their statistics")
    data.add_argument(
        "--write-reference", type=local_path, metavar="FILE", help="npz to write with the statistics of --reference"
    )
    data.add_argument(
        "--reference-images",
        type=int,
        default=10_000,
        metavar="N",
        help="images that it is to hold for KID, precision and recall, and for ADM's evaluator (default: 10,000)",
    )
    data.add_argument("--originals", type=local_path, help="images that were, or are to be, encoded and decoded")
    data.add_argument("--reconstructions", type=local_path, help="the decoded images, in the same order")
    data.add_argument("--tokenizer", type=local_path, help="exported tokenizer to decode --originals with")
    data.add_argument("--image-size", type=int, help="crop the images of folders to squares of this size")
    data.add_argument("--crop", default="center", choices=["center", "published_eval"], help="how (default: ADM's)")
    data.add_argument("--decoder", choices=["auto", *DECODERS], help="of image files that are cropped (default: pil)")
    data.add_argument("--expect", type=int, metavar="N", help="how many images there are to be (default: as described)")
    data.add_argument("--num-classes", type=int, metavar="N", help="what labels stay below (default: as described)")
    data.add_argument(
        "--posterior", default="sample", choices=["sample", "mode"], help="what of the encoding to decode"
    )
    data.add_argument("--seed", type=int, default=0, help="of the posterior's samples, and of the choice of vectors")


def _add_networks(nets) -> None:
    nets.add_argument(
        "--inception-weights", type=local_path, help="torch-fidelity's file (default: the one downloaded before)"
    )
    nets.add_argument("--inception-sha256", metavar="HEX", help="of another file that is taken for Inception's weights")
    nets.add_argument(
        "--dinov2-weights",
        type=local_path,
        help="compare by DINOv2, too (FDD): ViT-L/14, the authors' file or timm's",
    )
    nets.add_argument("--download", action="store_true", help="download what no file is named for and is not here")
    nets.add_argument("--foundation", type=local_path, help="compare by this foundation model instead of Inception")
    nets.add_argument("--lpips-weights", type=local_path, help="VGG-16 in torchvision's layout")
    nets.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="with several processes cuda means a GPU each",
    )
    nets.add_argument("--batch-size", type=int, default=64)


def _check_mode(args: argparse.Namespace) -> None:
    """Raise ValueError where the options do not choose exactly one mode, or have values that none allows."""
    asked = [name for name in MODES if getattr(args, name) is not None]
    if len(asked) != 1:
        raise ValueError(
            f"evaluate needs one of --samples, --originals, --latents and --write-reference, got {len(asked)} of them"
        )
    if args.originals and (args.reconstructions is None) == (args.tokenizer is None):
        raise ValueError("--originals needs either --reconstructions or --tokenizer")
    for name, least in _LEAST.items():
        if (value := getattr(args, name)) is not None and value < least:
            raise ValueError(f"{option(name)} must be at least {least}, got {value}")
    require_device(args.device)


def _refuse_unused(given: set[str], args: argparse.Namespace) -> None:
    """Raise ValueError for an option that the chosen mode does not read."""
    chosen = mode(args)
    for name in sorted(given):
        if chosen not in _OPTION_MODES[name]:
            modes = " and ".join(option(other) for other in _OPTION_MODES[name])
            raise ValueError(f"{option(name)} is for {modes}; with {option(chosen)} it changes nothing")
    for name, other in _EXCLUSIVE:
        if name in given and other in given:
            raise ValueError(f"{option(name)} changes nothing beside {option(other)}: give one of them")
    for name, other in _REQUIRES:
        if name in given and other not in given and not (chosen == "originals" and args.config):
            raise ValueError(f"{option(name)} changes nothing without {option(other)}")


def mode(args: argparse.Namespace) -> str:
    """The one of MODES that the options choose."""
    return next(name for name in MODES if getattr(args, name) is not None)


def option(name: str) -> str:
    """An option as it is written."""
    return "CONFIG" if name == "config" else f"--{name.replace('_', '-')}"
