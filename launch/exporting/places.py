"""Where an export goes: names of files and folders, taken by all of them or none."""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from common.files import (
    link_without_overwrite,
    make_directory,
    path_exists,
    rename_directory,
    require_writable,
    sync_directory,
)
from launch.arguments import local_path
from launch.config import ConfigError

SUFFIXES = (".safetensors", ".json", ".pt")
TAKEN = "is already there: remove it, or export under another name"


def folder_named(text: str) -> Path:
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


def files_named(text: str) -> Path:
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


def paths_of(name: Path, suffixes: Sequence[str]) -> list[Path]:
    return [name.with_name(f"{name.name}{suffix}") for suffix in suffixes]


@contextmanager
def new_files(name: Path, suffixes: Sequence[str]) -> Iterator[list[Path]]:
    """Temporary paths for an export's files: they get their names, all of them or none, when the block ends well.

    Raises ConfigError where one is taken, before the block or meanwhile, WriteError where one cannot be written.
    """
    paths = paths_of(name, suffixes)
    for path in paths:
        if path_exists(path):
            raise ConfigError(f"{path} {TAKEN}")
        require_writable(path)
    placed: list[Path] = []
    with TemporaryDirectory(prefix=f".{name.name}.", dir=name.parent) as folder:
        yield (made := paths_of(Path(folder) / name.name, suffixes))
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
def new_folder(folder: Path) -> Iterator[Path]:
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
