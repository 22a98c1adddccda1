"""`python -m launch export SOURCE NAME [--weights ema|model]`: weights for others to use, of either model.

SOURCE is a checkpoint's directory, or a run's (its newest is taken). Writes NAME.safetensors and NAME.json, and NAME.pt
in the published layout (`model` and `ema`; for a tokenizer `state_dict`). None of them may be there already.

SOURCE may also be a weights file, such as a published .pt: then NAME.safetensors and NAME.json are written. The sizes
of a tokenizer are read off its tensors; for a LightningDiT `--config CONFIG [key=value …]` names the run file that
tells its network and, by `data.data_path`, the statistics of its latents.
"""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from common.files import link_without_overwrite, path_exists, require_writable, sync_directory
from common.tensors import model_of, read_entry, save_pickled
from launch.arguments import load_run, local_path
from launch.config import ConfigError, select_ops, stored_run
from launch.trained import build_diffusion, diffusion_weights, from_checkpoint
from launch.training.checkpoint import Checkpoint, find_checkpoint
from lightningdit.weights import save_export, save_published
from vavae.sizes import infer_config
from vavae.weights import build_tokenizer, write_export

SUFFIXES = (".safetensors", ".json", ".pt")
TAKEN = "is already there: remove it, or export under another name"


def main(argv: list[str]) -> int:
    """Export and say what was written; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m launch export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=local_path, help="checkpoint, directory of a run, or weights file")
    parser.add_argument("name", help="path of the files to write, without a suffix or with one of theirs")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for --config")
    parser.add_argument("--weights", choices=["ema", "model"], default="ema", help="for the safetensors (default: ema)")
    parser.add_argument("--config", type=local_path, help="run file of a weights file")
    args = parser.parse_intermixed_args(argv)
    name = _name(args.name)
    if args.overrides and args.config is None:
        raise ConfigError(f"{args.overrides[0]} changes nothing without --config, the run file of a weights file")
    if args.source.is_file():
        what = f"from {args.source}"
        written = export_file(args.source, name, args.weights, args.config, args.overrides)
    elif args.config is not None:
        raise ConfigError(f"{args.source} is no weights file: a checkpoint holds its own run, without --config")
    else:
        checkpoint = find_checkpoint(args.source)
        what = f"{checkpoint.state['kind']}, step {checkpoint.step:,}"
        written = export(checkpoint, name, args.weights)
    for path in written:
        print(f"{path}: {what}, {path.stat().st_size / 1e6:,.1f} MB")
    return 0


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
            sizes = infer_config(tensors, source) if config is None else load_run(config, overrides, "vavae").model
            tokenizer = build_tokenizer(tensors, sizes, select_ops("reference"), source)
            said = {"step": None, "weights": taken or "unnamed", "source": str(source)}
            write_export(made, tokenizer.state_dict(), sizes, **said)
    return _paths(name, suffixes)


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
            said = {"step": checkpoint.step, "weights": weights, "checkpoint": str(checkpoint.path)}
            write_export(made[0], tensors, run.model, **said)
            save_pickled(made[2], {"state_dict": tensors})
    return _paths(name, SUFFIXES)
