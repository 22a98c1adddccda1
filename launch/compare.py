"""`python -m launch compare RUN [RUN …] [--published] [--output DIR]`: loss curves of runs beside each other.

RUN is the directory of a run. Prints a table of losses at common steps, with the difference to the first run, images
per second and the hours to given losses, and writes it as comparison.md, with the picture comparison.png (over steps
and over hours), into DIR. With --published the published curve of LightningDiT-XL/1 is compared with, which is the mean
squared error alone.
"""

import argparse
from pathlib import Path

from common.files import write_text
from launch.arguments import local_path
from launch.comparison import picture
from launch.comparison.curves import published, read_curves
from launch.comparison.table import report
from launch.config_files import ConfigError


def main(argv: list[str]) -> int:
    """Compare, print and write; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m launch compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=local_path, metavar="RUN", help=f"directory, at most {picture.MOST}")
    parser.add_argument("--published", action="store_true", help="beside the published curve of LightningDiT-XL/1")
    parser.add_argument("--loss", metavar="NAME", help="value of the rows (default: mse, of a tokenizer rec)")
    parser.add_argument("--reach", type=_losses, default=[], metavar="LOSS,…", help="losses to tell the hours to")
    parser.add_argument("--output", type=local_path, default=Path("comparison"), metavar="DIR", help="%(default)s")
    parser.add_argument("--format", choices=["png", "svg"], default="png", help="of the picture (default: png)")
    args = parser.parse_args(argv)
    if len(args.runs) > picture.MOST:
        raise ConfigError(f"{len(args.runs)} runs: a picture tells at most {picture.MOST} apart")
    curves, loss, kind = read_curves(args.runs, args.loss)
    if args.published:
        if kind == "vavae" or loss != "mse":
            what = f"kind {kind}" if kind == "vavae" else f"--loss {loss}"
            raise ConfigError(f"{what}: the published curve is the mse of a lightningdit, and nothing else")
        curves = [published(), *curves]
    drawn = args.output / f"comparison.{args.format}"
    text = report(curves, loss, args.reach, drawn.name)
    picture.draw(curves, loss, drawn)
    write_text(args.output / "comparison.md", text)
    print(text)
    print(f"written: {args.output / 'comparison.md'}, {drawn}")
    return 0


def _losses(text: str) -> list[float]:
    """Numbers from a list such as 0.35,0.32."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"numbers such as 0.35,0.32 are wanted (got {text!r})") from None
