"""`python -m launch export SOURCE NAME [--weights ema|model]`: weights for others to use, of either model.

SOURCE is a checkpoint's directory, or a run's (its newest is taken). Writes NAME.safetensors and NAME.json, and NAME.pt
in the published layout (`model` and `ema`; for a tokenizer `state_dict`). None of them may be there already.

SOURCE may also be a weights file, such as a published .pt, or a folder where diffusers keeps an AutoencoderKL: then
NAME.safetensors and NAME.json are written. The sizes of a tokenizer are read off its tensors; for a LightningDiT
`--config CONFIG [key=value …]` names the run file that tells its network and, by `data.data_path`, the statistics of
its latents.

With `--format diffusers` a tokenizer of any of these SOURCEs becomes the folder NAME with config.json and
diffusion_pytorch_model.safetensors, which `diffusers.AutoencoderKL.from_pretrained(NAME)` loads. Pipelines normalise
latents z by `(z - latents_mean) / latents_std * scaling_factor` of its config: `--latents` names where these numbers
are, a set of latents that this tokenizer made, or a LightningDiT (checkpoint, run, export) that was trained on them.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from common.files import (
    link_without_overwrite,
    make_directory,
    path_exists,
    read_json,
    rename_directory,
    require_writable,
    sync_directory,
)
from common.tensors import Tensors, model_of, read_entry, save_pickled, weights_file
from launch.arguments import load_run, local_path
from launch.config import ConfigError, select_ops, stored_run
from launch.trained import build_diffusion, diffusion_weights, from_checkpoint, statistics_for
from launch.training.checkpoint import Checkpoint
from launch.training.checkpoint_search import find_checkpoint
from lightningdit.latents import LatentStatistics
from lightningdit.weights import save_export, save_published
from vavae.diffusers_layout import (
    CONFIG_FILE,
    inexpressible,
    is_diffusers,
    read_config,
    write_folder,
)
from vavae.model import AutoencoderKL
from vavae.sizes import infer_config
from vavae.weights import build_tokenizer, write_export

SUFFIXES = (".safetensors", ".json", ".pt")
TAKEN = "is already there: remove it, or export under another name"


def main(argv: list[str]) -> int:
    """Export and say what was written; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m launch export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=local_path, help="checkpoint, directory of a run, or weights")
    parser.add_argument("name", help="path of the files to write, without a suffix or with one of theirs")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="for --config")
    parser.add_argument("--weights", choices=["ema", "model"], default="ema", help="for the safetensors (default: ema)")
    parser.add_argument("--config", type=local_path, help="run file of a weights file")
    parser.add_argument("--format", choices=["own", "diffusers"], default="own", help="see above (default: own)")
    parser.add_argument("--latents", type=local_path, metavar="PATH", help="where a diffusers folder's statistics are")
    parser.add_argument(
        "--multiplier",
        type=float,
        metavar="FACTOR",
        help="scaling_factor of a diffusers folder (default: a LightningDiT's data.latent_multiplier, else 1)",
    )
    args = parser.parse_intermixed_args(argv)
    _check_options(args)
    named = (args.weights, args.config, args.overrides)
    checkpoint = None if weights_file(args.source).is_file() else find_checkpoint(args.source)
    if args.format == "diffusers":
        folder = _folder(args.name)
        written = export_diffusers(checkpoint or args.source, folder, *named, args.latents, args.multiplier)
    elif checkpoint is None:
        written = export_file(args.source, _name(args.name), *named)
    else:
        written = export(checkpoint, _name(args.name), args.weights)
    what = f"from {args.source}" if checkpoint is None else f"{checkpoint.state['kind']}, step {checkpoint.step:,}"
    for path in written:
        print(f"{path}: {what}, {path.stat().st_size / 1e6:,.1f} MB")
    if args.format == "diffusers" and args.latents is None:
        said = read_json(written[0])
        numbers = "null" if said["latents_mean"] is None else f"those of {args.source}"
        factor = f"scaling_factor {said['scaling_factor']:g}"
        print(f"latents_mean and latents_std are {numbers}, {factor}: --latents gives others")
    return 0


def _check_options(args: argparse.Namespace) -> None:
    """Raise ConfigError for options that would change nothing, and for values that no option has."""
    if args.overrides and args.config is None:
        raise ConfigError(f"{args.overrides[0]} changes nothing without --config, the run file of a weights file")
    if args.config is not None and not weights_file(args.source).is_file() and args.source.exists():
        raise ConfigError(f"{args.source} is no weights file: a checkpoint holds its own run, without --config")
    for option in ("latents", "multiplier"):
        if args.format != "diffusers" and getattr(args, option) is not None:
            raise ConfigError(f"--{option} changes nothing without --format diffusers")
    if args.multiplier is not None and not 0 < args.multiplier < math.inf:
        raise ConfigError(f"--multiplier {args.multiplier:g}: a number above 0 is wanted")


def _folder(text: str) -> Path:
    """The path of a folder to be made; raises ConfigError for what has no name, or a file's."""
    try:
        path = local_path(text)
    except argparse.ArgumentTypeError as e:
        raise ConfigError(f"NAME: {e}") from None
    if path.name in ("", ".."):
        raise ConfigError(f"NAME is the path of a folder to be made, such as tokenizer (got {text!r})")
    if path.suffix in SUFFIXES:
        raise ConfigError(f"NAME is a folder with --format diffusers, and {text!r} ends as a file does")
    return path


def _name(text: str) -> Path:
    """The path of an export without suffix; raises ConfigError for what names a folder, or nothing."""
    try:
        path = local_path(text)
    except argparse.ArgumentTypeError as e:
        raise ConfigError(f"NAME: {e}") from None
    named = path.with_suffix("") if path.suffix in SUFFIXES else path
    if not named.name or named.name in (*SUFFIXES, ".", ".."):
        raise ConfigError(f"NAME is the path of files, without their suffix, such as weights (got {text!r})")
    if text.endswith("/") or (named == path and path.is_dir()):
        raise ConfigError(
            f"{text} is a folder, and NAME is the path of files: {path / 'weights'} puts them into it, "
            f"{path}.safetensors beside it"
        )
    return named


def _paths(name: Path, suffixes: Sequence[str]) -> list[Path]:
    return [name.with_name(f"{name.name}{suffix}") for suffix in suffixes]


@contextmanager
def _new_files(name: Path, suffixes: Sequence[str]) -> Iterator[list[Path]]:
    """Temporary paths for an export's files: they get their names, all of them or none, when the block ends well.

    Raises ConfigError where one is taken, before the block or meanwhile, WriteError where one cannot be written.
    """
    paths = _paths(name, suffixes)
    for path in paths:
        if path_exists(path):
            raise ConfigError(f"{path} {TAKEN}")
        require_writable(path)
    placed: list[Path] = []
    with TemporaryDirectory(prefix=f".{name.name}.", dir=name.parent) as folder:
        yield (made := _paths(Path(folder) / name.name, suffixes))
        try:
            for source, path in zip(made, paths, strict=True):
                link_without_overwrite(source, path)
                placed.append(path)
            sync_directory(name.parent)
        except BaseException as e:
            for path in placed:
                path.unlink(missing_ok=True)
            if isinstance(e, FileExistsError):
                raise ConfigError(f"{paths[len(placed)]} {TAKEN}") from None
            raise


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to fill: it gets its name, with all that is in it, when the block ends well.

    Raises ConfigError where the name is taken, before the block or meanwhile, WriteError where it cannot be made.
    """
    if path_exists(folder):
        raise ConfigError(f"{folder} {TAKEN}")
    require_writable(folder)
    with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        yield (made := make_directory(Path(temporary) / folder.name))
        try:
            rename_directory(made, folder)
        except FileExistsError:
            raise ConfigError(f"{folder} {TAKEN}") from None


def export_file(
    source: Path, name: Path, weights: str = "ema", config: Path | None = None, overrides: Sequence[str] = ()
) -> list[Path]:
    """Write a weights file as an export → its paths: safetensors, JSON; see the module for `config`.

    Raises ValueError where the file cannot be read, is neither model's, or does not fit, or a path is taken.
    """
    suffixes = SUFFIXES[:2]
    with _new_files(name, suffixes) as (made, _):
        taken, tensors = read_entry(source, (weights, "state_dict", "model", "ema"))
        if model_of(tensors) == "LightningDiT":
            if config is None:
                raise ConfigError(
                    f"{source} is a LightningDiT, and its file tells neither the network nor the "
                    "latents: give --config, the run file it was trained with"
                )
            run = load_run(config, overrides, "lightningdit").model_copy(update={"ckpt_path": str(source)})
            found = diffusion_weights(run, weights)
            build_diffusion(found, select_ops("reference"), str(source))  # it fits
            save_export(made, found)
        else:
            tokenizer = _tokenizer(tensors, source, config, overrides)
            said = {"step": None, "weights": taken or "unnamed", "source": str(source)}
            write_export(made, tokenizer.state_dict(), tokenizer.config, **said)
    return _paths(name, suffixes)


def _tokenizer(tensors: Tensors, source: Path, config: Path | None, overrides: Sequence[str]) -> AutoencoderKL:
    sizes = infer_config(tensors, source) if config is None else load_run(config, overrides, "vavae").model
    return build_tokenizer(tensors, sizes, select_ops("reference"), source)


def export(checkpoint: Checkpoint, name: Path, weights: str = "ema") -> list[Path]:
    """Write the three files of a checkpoint's weights → their paths: safetensors, JSON, pt.

    Raises ValueError where one of them is already there.
    """
    with _new_files(name, SUFFIXES) as made:
        if checkpoint.state["kind"] == "lightningdit":
            save_export(made[0], from_checkpoint(checkpoint, weights))
            save_published(made[2], checkpoint.weights("model", "model"), checkpoint.weights("model", "ema"))
        else:
            run = stored_run(checkpoint.state["config"], checkpoint.path / "state.json", kind="vavae")
            tensors = checkpoint.weights("autoencoder", weights)
            write_export(made[0], tensors, run.model, **_said(checkpoint, weights))
            save_pickled(made[2], {"state_dict": tensors})
    return _paths(name, SUFFIXES)


def _stated_statistics(folder: Path, channels: int, multiplier: float | None) -> LatentStatistics | None:
    """What a diffusers folder's own config says of its latents; None without one."""
    if (config := read_config(folder)) is None:
        return None
    mean, std = config.latents_mean, config.latents_std
    if mean is None or std is None:
        mean, std = (config.shift_factor or 0.0,) * channels, (1.0,) * channels
    factor = config.scaling_factor if multiplier is None else multiplier
    tensors = torch.tensor(mean), torch.tensor(std)
    return LatentStatistics.checked(*tensors, factor, channels=channels, source=folder / CONFIG_FILE)


def _said(checkpoint: Checkpoint, weights: str) -> dict:
    return {"step": checkpoint.step, "weights": weights, "checkpoint": str(checkpoint.path)}


def export_diffusers(
    source: Checkpoint | Path,
    folder: Path,
    weights: str = "ema",
    config: Path | None = None,
    overrides: Sequence[str] = (),
    latents: Path | None = None,
    multiplier: float | None = None,
) -> list[Path]:
    """Write a tokenizer as an `AutoencoderKL` folder of diffusers → its files; see the module for `latents`.

    Raises ValueError where the folder is already there, the source is no tokenizer or one that diffusers cannot
    express, or the statistics are those of another tokenizer's latents.
    """
    with _new_folder(folder) as made:
        if isinstance(source, Path):
            taken, tensors = read_entry(source, (weights, "state_dict", "model", "ema"))
            tokenizer = _tokenizer(tensors, source, config, overrides)
            said = {"step": None, "weights": taken or "unnamed", "source": str(source)}
        else:
            if source.state["kind"] != "vavae":
                raise ConfigError(
                    f"{source.path} is a LightningDiT, for which diffusers has no class: tokenizers alone"
                )
            run = stored_run(source.state["config"], source.path / "state.json", kind="vavae")
            tensors = source.weights("autoencoder", weights)
            tokenizer = build_tokenizer(tensors, run.model, select_ops("reference"), source.path)
            said = _said(source, weights)
        if reasons := inexpressible(tokenizer.config):
            raise ConfigError(f"diffusers has no such autoencoder: {'; '.join(reasons)}")
        scale = None
        if isinstance(source, Path) and latents is None and is_diffusers(tensors):
            scale = _stated_statistics(source, tokenizer.config.embed_dim, multiplier)
        scale = scale or statistics_for(tokenizer, latents, multiplier)
        mean, std = (None if scale.is_identity else values.tolist() for values in (scale.mean, scale.std))
        written = write_folder(made, tokenizer.state_dict(), tokenizer.config, mean, std, scale.multiplier, **said)
    return [folder / path.name for path in written]
