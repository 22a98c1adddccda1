"""`python -m launch gallery RUN [RUN …] [--output FILE]`: one HTML page to look at, which opens from disk.

RUN is the directory of a run, or one above several, such as that of the quickstart. The page shows, of what lies at and
below it: samples by class and by step, pictures of training by step, curves of losses and throughput, results of
evaluate, what differs between the runs' files (of one run: from the nearest shipped file and from the defaults), which
backend served each op, and where it all comes from. It needs no network: style, scripts and pictures are in it. Runs
that go on, or were cut short, are shown as far as they can be read; what cannot be is named. Nothing else is written.
"""

import argparse
from pathlib import Path

from common.files import FileError, open_regular, path_exists, require_writable, write_text
from launch.arguments import local_path
from launch.config_files import ConfigError
from launch.gallery_page.page import MARK, build

NAME = "gallery.html"


def main(argv: list[str]) -> int:
    """Write the page and say where it is; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m launch gallery", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=local_path, metavar="RUN", help="a run's directory, or one above runs")
    parser.add_argument(
        "--output", type=local_path, metavar="FILE", help=f"default: {NAME} in RUN, of several in the working directory"
    )
    args = parser.parse_args(argv)
    _require_directories(args.runs)
    output = args.output or (args.runs[0] / NAME if len(args.runs) == 1 else Path(NAME))
    _require_output(output)
    text = build(args.runs)
    write_text(output, text)
    print(f"{output}: {len(text.encode()) / 1e6:.1f} MB, opens in a browser without a network")
    return 0


def _require_directories(paths: list[Path]) -> None:
    for i, path in enumerate(paths):
        if not path.is_dir():
            raise ConfigError(f"{path} {'is no directory, which a run is' if path.exists() else 'does not exist'}")
        if path.resolve() in {other.resolve() for other in paths[:i]}:
            raise ConfigError(f"{path} is given twice")


def _require_output(path: Path) -> None:
    """Raise ConfigError or WriteError where the page cannot or should not go there."""
    require_writable(path)
    if not path_exists(path):
        return
    try:
        with open_regular(path) as file:
            ours = MARK.encode() in file.read(2000)
    except (FileError, OSError):
        ours = False
    if not ours:
        raise ConfigError(f"--output {path} is already there and is no page of gallery: give another name")
