"""Arguments that the programs share: a run file with `key=value` overrides, and paths with `~`."""

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch

from common.sections import expand_home, plain_text
from launch.config import Run, load
from launch.runtime import launcher


def local_path(text: str) -> Path:
    """A path option's value, with `~` expanded (`--output=~/x` reaches a program as it is)."""
    if not text:
        raise argparse.ArgumentTypeError("a path is wanted (got nothing)")
    try:
        return Path(expand_home(plain_text(text)))
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from None


def add_run_file(parser: argparse.ArgumentParser, help: str, example: str, *, required: bool = True) -> None:
    """The positional arguments CONFIG and `key=value …`."""
    parser.add_argument("config", nargs=None if required else "?", type=local_path, help=help)
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help=f"such as {example}; a mapping is merged into the section that is there",
    )


def require_device(name: str) -> str:
    """The name of a device that is there: cpu, cuda, cuda:1 …; raises ValueError for any other."""
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if name not in devices and not (name == "cuda" and len(devices) > 1):
        raise ValueError(f"--device {name!r} is not there: this machine has {', '.join(devices)}")
    return name


def load_run(config: Path, overrides: Iterable[str], kind: str) -> Run:
    """The run that a command line names; the main process says what of a published file was converted or ignored."""
    run, notes = load(config, overrides, kind=kind)
    if launcher.rank() == 0:
        for note in notes:
            print(f"{config}: {note}")
    return run
