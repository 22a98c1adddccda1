"""`python -m launch status DIR [--json] [--verify]`: the runs at and below DIR, and where they stand.

Of each run: its kind and state (running, by which process; finished, stopped, failed, killed), step, epoch, loss,
images per second, the time left or when it ended, and its newest whole checkpoint: one whose files are there with the
sizes that its manifest lists; --verify compares their checksums too, which reads them all. Below it, where there is
something to tell: what it resumed from, figures of samples, steps skipped and gone back from, checkpoints that are
damaged or were set aside. Nothing is written, and no run is disturbed.
"""

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from common.text import printable
from launch.arguments import local_path
from launch.config_files import ConfigError
from launch.run_directory.find import find_runs
from launch.run_directory.summary import RunSummary, summarize
from launch.text_tables import columns, cut, width

HEAD = ("run", "kind", "state", "step", "epoch", "loss", "images/s", "left or ended", "checkpoint")
#: Columns that a narrow terminal does without, in this order.
SPARED = ("kind", "epoch", "images/s", "checkpoint")
SHORTEST_NAME = 12
INDENT = "    "


def main(argv: list[str]) -> int:
    """Print where the runs stand; returns the exit status, 0 whatever their states are."""
    parser = argparse.ArgumentParser(
        prog="python -m launch status", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=local_path, metavar="DIR", help="a run's directory, or one above many")
    parser.add_argument("--json", action="store_true", help="a JSON list of the runs, with all that is known")
    parser.add_argument("--verify", action="store_true", help="also compare the checksums of all checkpoints")
    args = parser.parse_args(argv)
    if not args.directory.is_dir():
        what = "is no directory" if args.directory.exists() else "does not exist"
        raise ConfigError(f"{args.directory} {what}")
    runs = [summarize(path, verify=args.verify) for path in find_runs(args.directory)]
    if args.json:
        print(json.dumps([run.to_json() for run in runs], indent=1))
    elif not runs:
        print(f"no runs at or below {args.directory}")
    else:
        print("\n".join(as_text(runs, args.directory, shutil.get_terminal_size((120, 24)).columns)))
    return 0


def as_text(runs: Sequence[RunSummary], root: Path, limit: int) -> list[str]:
    """The table, of at most `limit` columns as far as names can be cut and columns spared, and remarks on each run."""
    shown, cells = list(HEAD), [dict(zip(HEAD, _cells(run, root), strict=True)) for run in runs]
    for spared in ("", *SPARED):
        shown = [name for name in shown if name != spared]
        rest = columns(shown[1:], [[row[name] for name in shown[1:]] for row in cells], left=0)
        room = limit - width(max(rest, key=width)) - 2
        if room >= SHORTEST_NAME:
            break
    rows = [[cut(row["run"], max(room, SHORTEST_NAME)), *(row[name] for name in shown[1:])] for row in cells]
    head, *lines = columns(shown, rows, left=1 + sum(name in ("kind", "state") for name in shown))
    text = [head]
    for run, line in zip(runs, lines, strict=True):
        text += [line, *(f"{INDENT}{printable(remark)}" for remark in remarks(run))]
    return text


def _cells(run: RunSummary, root: Path) -> list[str]:
    path = Path(run.path)
    main = next((key for key in ("mse", "rec", "loss") if key in run.losses), None)
    total = "?" if run.last_step is None else f"{run.last_step:,}"
    return [
        printable(str(path.relative_to(root) if path != root else path.resolve().name)),
        run.kind or "?",
        run.state,
        "–" if run.step is None else f"{run.step:,}/{total}",
        "–" if run.epoch is None else f"{run.epoch:.1f}",
        "–" if main is None else f"{main} {run.losses[main]:.4g}",
        "–" if run.images_per_second is None else f"{run.images_per_second:,.0f}",
        _when(run),
        "none" if run.checkpoint is None else f"{run.checkpoint:,}",
    ]


def _when(run: RunSummary) -> str:
    """The time left of what runs, when the others ended."""
    if run.ended is not None:
        return time.strftime("%m-%d %H:%M", time.localtime(run.ended))
    if run.eta_seconds is None:
        return "–"
    hours, minutes = divmod(round(run.eta_seconds / 60), 60)
    return f"{hours}h{minutes:02d}m left"


def remarks(run: RunSummary) -> list[str]:
    """What else there is to tell of a run, a line each."""
    found = []
    if run.process and run.state in ("running", "unknown"):
        found.append(f"by {run.process}" + ("" if run.state == "running" else " (whether it lives is not known here)"))
    elif run.process:
        found.append(f"{run.process} ended without a word")
    if run.exit_status or run.reason:
        found.append(f"exit status {run.exit_status}" + (f": {run.reason}" if run.reason else ""))
    if run.resumed:
        times = f"resumed {len(run.resumed)} times, last " if len(run.resumed) > 1 else "resumed "
        found.append((times if not run.resumed[-1].startswith("started") else "") + run.resumed[-1])
    if run.samples:
        figures = [f"{name} {value:.4g}" for name, value in run.samples.items() if name not in ("step", "seconds")]
        found.append(f"samples at step {run.samples['step']:,}: {', '.join(figures) or 'not finite'}")
    found += [f"{run.skipped:,} steps skipped"] if run.skipped else []
    found += [f"rolled back at step {', '.join(map(str, run.rollbacks))}"] if run.rollbacks else []
    found += [f"steps drawn anew, [first, last, seed]: {json.dumps(run.redrawn)}"] if run.redrawn else []
    found += [f"checkpoint {name}: {why}" for name, why in run.damaged.items()]
    if run.temporary and run.state not in ("running", "unknown"):
        found.append(f"left half-written: {', '.join(run.temporary)}")
    return found + run.problems
