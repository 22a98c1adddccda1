"""`python -m launch compare-results A B [C …] [--format json]`: figures side by side, and which settings differ.

Each is a JSON result of evaluate or sweep, or a directory: of a sweep (its best setting), of samples beside which an
evaluation lies, or of samples alone. Prints a table of the figures, each with its difference to the first result's, one
of all facts that differ (N, solver, guidance, weights, reference, features …), and a warning where figures are not
comparable: another N, other features, another reference, another resize rule.
"""

import argparse
import json

from common.text import printable
from launch.arguments import local_path
from launch.comparison.results import LETTERS, as_json, as_text, read_result
from launch.config_files import ConfigError


def main(argv: list[str]) -> int:
    """Read, compare and print; returns the exit status, 0 also where figures are not comparable."""
    parser = argparse.ArgumentParser(
        prog="python -m launch compare-results",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", nargs="+", type=local_path, metavar="RESULT", help="JSON file or directory")
    parser.add_argument("--format", choices=["text", "json"], default="text", help="default: text, in Markdown")
    args = parser.parse_args(argv)
    if not 2 <= len(args.results) <= len(LETTERS):
        raise ConfigError(f"{len(args.results)} results: give 2 to {len(LETTERS)}")
    results = [read_result(path) for path in args.results]
    if args.format == "json":
        print(json.dumps(as_json(results), indent=1))
    else:
        print(printable(as_text(results), lines=True), end="")
    return 0
