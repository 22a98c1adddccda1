"""`python -m launch export SOURCE NAME [--weights ema|model]`: weights for others to use, of either model.

SOURCE is a checkpoint's directory, or a run's (its newest is taken). Writes NAME.safetensors and NAME.json, and NAME.pt
in the published layout (`model` and `ema`; for a tokenizer `state_dict`). None of them may be there already.

SOURCE may also be a weights file, such as a published .pt, a folder where diffusers keeps an AutoencoderKL, or
hf://OWNER/NAME, a repository of the hub: then NAME.safetensors and NAME.json are written. The sizes of a tokenizer are
read off its tensors; for a LightningDiT `--config CONFIG [key=value …]` names the run file that tells its network and,
by `data.data_path`, the statistics of its latents.

With `--format diffusers` a LightningDiT becomes the folder NAME that `diffusers.DiffusionPipeline.from_pretrained(NAME,
trust_remote_code=True)` loads: network, tokenizer (the run's `vae.ckpt_path`, or `--tokenizer`), scheduler, one file of
code, and a model card with the figures of `--results`, which `evaluate` wrote. A tokenizer becomes the folder NAME
that `diffusers.AutoencoderKL.from_pretrained(NAME)` loads. Pipelines normalise latents z by `(z - latents_mean) /
latents_std * scaling_factor` of its config: `--latents` names where these numbers are, a set of latents that this
tokenizer made, or a LightningDiT (checkpoint, run, export) that was trained on them.

`--push OWNER/NAME` puts what was written on the hub (the extra `hub`), as one commit.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from common.files import DownloadError, read_json
from common.tensors import weights_file
from launch.arguments import local_path
from launch.config import ConfigError
from launch.exporting.card import CARD, Card, checked_license
from launch.exporting.cards import network_card, tokenizer_card
from launch.exporting.networks import is_network, network_of
from launch.exporting.pipeline import export_pipeline
from launch.exporting.places import SUFFIXES, files_named, folder_named
from launch.exporting.sources import checkpoint_at
from launch.exporting.tokenizer import export_tokenizer
from launch.exporting.weights import export, export_file
from launch.hub import local_copy, require_upload, upload
from launch.pipelines import is_pipeline
from launch.training.checkpoint import Checkpoint

__all__ = ["SUFFIXES", "export", "main"]


def main(argv: list[str]) -> int:
    """Export and say what was written; returns the exit status."""
    args = _parse(argv)
    _check_options(args)
    path = local_copy(args.source)
    file = is_pipeline(path) or weights_file(path).is_file()
    _check_config(args, file or not path.exists())
    source = path if file else checkpoint_at(path)
    if args.push is not None:
        require_upload(args.push)
    written = (_diffusers if args.format == "diffusers" else _own)(args, source)
    what = f"{source.state['kind']}, step {source.step:,}" if isinstance(source, Checkpoint) else f"from {args.source}"
    for path in written:
        print(f"{path}: {what}, {path.stat().st_size / 1e6:,.1f} MB")
    if args.push is not None:
        _push(args, written)
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m launch export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=local_path, help="checkpoint, directory of a run, or weights")
    parser.add_argument("name", help="path of the files to write, without a suffix or with one of theirs")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="for --config")
    parser.add_argument("--weights", choices=["ema", "model"], help="for the safetensors (default: ema)")
    parser.add_argument("--config", type=local_path, help="run file of a weights file")
    parser.add_argument("--format", choices=["own", "diffusers"], default="own", help="see above (default: own)")
    of_folders = parser.add_argument_group("--format diffusers")
    of_folders.add_argument("--latents", type=local_path, metavar="PATH", help="where a tokenizer's statistics are")
    of_folders.add_argument(
        "--multiplier",
        type=float,
        metavar="FACTOR",
        help="a tokenizer's scaling_factor (default: a LightningDiT's data.latent_multiplier, else 1)",
    )
    of_folders.add_argument("--tokenizer", type=local_path, metavar="PATH", help="of a pipeline, not the run's")
    cards = parser.add_argument_group("model card")
    cards.add_argument("--card", action="store_true", help="write NAME.md beside files, too; a pipeline always has one")
    cards.add_argument("--license", metavar="ID", help="of the weights, as the hub names it, such as apache-2.0")
    cards.add_argument(
        "--results",
        type=local_path,
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="what evaluate wrote of these weights (default: what lies beside the run or the file)",
    )
    hub = parser.add_argument_group("hub")
    hub.add_argument("--push", metavar="OWNER/NAME", help="put what was written into this repository")
    hub.add_argument("--private", action="store_true", help="make the repository private where it is made")
    hub.add_argument("--revision", metavar="BRANCH", help="branch to put it on, made if need be (default: main)")
    return parser.parse_intermixed_args(argv)


def _check_options(args: argparse.Namespace) -> None:
    """Raise ConfigError for options that would change nothing, and for values that no option has."""
    if args.overrides and args.config is None:
        raise ConfigError(f"{args.overrides[0]} changes nothing without --config, the run file of a weights file")
    for option in ("latents", "multiplier", "tokenizer"):
        if args.format != "diffusers" and getattr(args, option) is not None:
            raise ConfigError(f"--{option} changes nothing without --format diffusers")
    if args.multiplier is not None and not 0 < args.multiplier < math.inf:
        raise ConfigError(f"--multiplier {args.multiplier:g}: a number above 0 is wanted")
    for option in ("private", "revision"):
        if getattr(args, option) and args.push is None:
            raise ConfigError(f"--{option} changes nothing without --push")
    if args.license is not None:
        checked_license(args.license)


def _check_config(args: argparse.Namespace, may_have_one: bool) -> None:
    if args.config is not None and not may_have_one:
        raise ConfigError(f"{args.source} is no weights file: a checkpoint holds its own run, without --config")


def _wants_card(args: argparse.Namespace) -> bool:
    """Raise ConfigError for what only a card holds, where there will be none."""
    wanted = args.card or args.push is not None
    for option in ("results", "license"):
        if getattr(args, option) and not wanted:
            raise ConfigError(f"--{option} changes nothing without --card or --push")
    return wanted


def _own(args: argparse.Namespace, source: Checkpoint | Path) -> list[Path]:
    name, card = files_named(args.name), _card_of(args, source)
    if isinstance(source, Checkpoint):
        return export(source, name, args.weights or "ema", card)
    return export_file(source, name, args.weights, args.config, args.overrides, card)


def _card_of(args: argparse.Namespace, source: Checkpoint | Path) -> Callable[[Path], Card] | None:
    """What makes the card of an export, if there will be one; raises ConfigError as `_wants_card`."""
    if not _wants_card(args):
        return None
    make = network_card if is_network(source) else tokenizer_card
    return lambda name: make(name, source, args.results, args.license)


def _diffusers(args: argparse.Namespace, source: Checkpoint | Path) -> list[Path]:
    folder, named = folder_named(args.name), (args.weights, args.config, args.overrides)
    if is_network(source):
        for option in ("latents", "multiplier"):
            if getattr(args, option) is not None:
                raise ConfigError(
                    f"--{option} changes nothing for a LightningDiT, whose statistics it was trained with"
                )
        more = {"results": args.results, "beside": source, "license": args.license}
        return export_pipeline(network_of(source, *named), folder, args.tokenizer, **more)
    if args.tokenizer is not None:
        raise ConfigError(f"--tokenizer changes nothing: {args.source} is a tokenizer itself")
    written = export_tokenizer(source, folder, *named, args.latents, args.multiplier, _card_of(args, source))
    if args.latents is None:
        said = read_json(written[0])
        stated = said["latents_mean"] is not None or said["shift_factor"] is not None
        numbers = f"those of {args.source}" if stated else "null"
        factor = f"scaling_factor {said['scaling_factor']:g}"
        print(f"latents_mean and latents_std are {numbers}, {factor}: --latents gives others")
    return written


def _push(args: argparse.Namespace, written: Sequence[Path]) -> None:
    """Put what was written on the hub, a card as the repository's README.md."""
    folder = folder_named(args.name) if args.format == "diffusers" else written[0].parent
    files = {path.relative_to(folder).as_posix(): path for path in written}
    files = {CARD if name.endswith(".md") else name: path for name, path in files.items()}
    options = {"private": args.private, "revision": args.revision, "message": f"Export of {Path(args.source).name}"}
    try:
        address = upload(files, args.push, **options)
    except (ConfigError, DownloadError) as e:
        where = folder if args.format == "diffusers" else ", ".join(map(str, written))
        raise type(e)(f"{e}. All is written here ({where}); `hf upload {args.push} {where}` tries again") from None
    print(f"{args.push}: {len(files)} files are on the hub, {address}")
