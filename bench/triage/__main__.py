"""Check and measure this tree on a GPU in eight minutes, whatever crashes or hangs.

    python -m bench.triage OUT [--minutes M] [--only PART[/TASK]] [--second] [--from ROWS] [--rehearse]

`bash bench/gpu.sh OUT MINUTES` calls it for less than 20 minutes. OUT gets rows.jsonl, summary.txt (to be read first),
log.txt and logs.tgz, and nothing else; rows of an earlier run are kept where this one has none that replace them. Ends
with 1 if something failed or was wrong, with 2 if there is no GPU, with 128 and its number after a signal.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from bench.triage.coordinator import Triage
from bench.triage.parts import first_parts, second_parts, select_parts
from bench.triage.processes import command
from bench.triage.records import read_rows

NO_DEVICE = 2


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.triage", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="a folder, made if it is not there")
    parser.add_argument("--minutes", type=float, default=8.0, help="in all (default 8)")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="PART[/TASK]",
        help=f"repeatable; parts: {', '.join(part.name for part in first_parts())}",
    )
    parser.add_argument("--second", action="store_true", help="three more minutes, by the rows of a first run")
    parser.add_argument(
        "--from",
        dest="earlier",
        type=Path,
        metavar="ROWS",
        help="rows of an earlier run, to be read besides those in OUT",
    )
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="on a CPU, with tiny sizes: that everything starts and ends; no figure means anything",
    )
    options = parser.parse_args(argv)
    if not options.minutes > 0:  # nan too
        parser.error(f"--minutes is {options.minutes:g}; allowed: more than 0")
    if options.second and options.only:
        parser.error("either --second or --only")
    if options.earlier and not options.earlier.is_file():
        parser.error(f"--from {options.earlier}: there is no such file")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "log.txt").open("a", encoding="utf-8").close()
        earlier = read_rows(options.out / "rows.jsonl")
    except OSError as error:
        parser.error(f"OUT {options.out} is no folder to write to: {error}")
    if options.rehearse and any(row.get("gpu") for row in earlier):
        parser.error(f"--rehearse: {options.out} holds rows of a GPU, which a CPU's would replace; name another folder")
    try:
        options.parts = select_parts(first_parts(), options.only)
    except ValueError as error:
        parser.error(f"--only: {error}")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    earlier = read_rows(options.earlier) if options.earlier else ()
    triage = Triage(options.out, options.minutes, earlier, command=rehearsed if options.rehearse else command)
    signals: list[int] = []

    def stop(number: int, frame: object) -> None:
        signals.append(number)
        triage.stop(signal.Signals(number).name)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
    succeeded = triage.run(second_parts(triage.rows) if options.second else options.parts)
    with suppress(OSError):  # the reader of the pipe may be gone
        print((options.out / "summary.txt").read_text(encoding="utf-8"), flush=True)
    if signals:
        return 128 + signals[0]
    return NO_DEVICE if triage.no_device else int(not succeeded)


def rehearsed(module: str, arguments: Sequence[str], limit: float) -> list[str]:
    return command("bench.triage.rehearsal", [module, *arguments], limit)


if __name__ == "__main__":
    sys.exit(main())
