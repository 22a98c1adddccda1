"""Compare a run with the committed rows of its GPU, or one git revision with another.

    python -m bench.regress ROWS                            rows of a run against bench/results/<gpu>.jsonl
    python -m bench.regress ROWS --update --reason TEXT     and make them the committed ones
    python -m bench.regress --against REV [-- ARGUMENTS]    the bench of REV and of this tree, by turns, on this machine

Compared are fractions of the limit that was measured in the same run: 5 % of one may be lost by an op, 3 % by a whole
step. A row that seems slower, or is too noisy to tell, is measured again, twice. Ends with 0; 1 if something of ours
fell, turned wrong or is missing; 2 if there is no baseline for this GPU; 64 where the arguments are wrong.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NoReturn

from bench.gate import baseline, compare
from bench.gate.compare import NotMeasured
from bench.measure.rows import ROOT, Row, machine, read
from kernels.backends.device import cuda_reasons

NO_BASELINE, USAGE = 2, 64
#: Seconds after which a row that is measured again is given up.
PATIENCE = 900


#: Kind of row → the arguments of `python -m` that measure it.
COMMANDS = {
    "op": "bench.ops {op} --case {case} --dtype {dtype} --direction {direction} --only {provider}",
    "step": "bench.step --model {model} --batch {batch} --variant {variant}",
    "sampling": "bench.sampling --model {model} --batch {batch} --precision {precision} --variant {provider}",
    "tokenizer": "bench.tokenizer {part} --batch {batch} --precision {precision} --variant {provider}",
}


def command(row: Row) -> list[str]:
    """The arguments of `python -m` that measure exactly this row."""
    variant, *choices = row.get("variant", "").split("+")
    words = [word.format_map(row | {"variant": variant}) for word in COMMANDS[row["kind"]].split()]
    return words + [word for choice in choices for word in ("--kernels", choice)]


def run_bench(root: Path, arguments: list[str], out: Path, timeout: float | None = None) -> int:
    """Run a bench of the tree at `root` in a process of its own, its rows appended to `out`; its exit status."""
    variables = {name: value for name, value in os.environ.items() if root == ROOT or name != "GIT_REVISION"}
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-m", *arguments, "--out", str(out)], cwd=root, env=variables, timeout=timeout
    ).returncode


@dataclass(frozen=True)
class Again:
    """Measures a row again, where that is the same code on the same GPU, and there is time.

    Attributes:
        run: as `run_bench`.
        here: the machine of this process, as rows state it; asked when it is first needed.
        end: reading of `clock` after which nothing is begun.
        measured: all rows that were measured again.
    """

    run: Callable[..., int] = run_bench
    here: Callable[[], Row] = lambda: machine("cuda")
    reasons: Callable[[], list[str]] = cuda_reasons
    end: float = float("inf")
    clock: Callable[[], float] = time.monotonic
    measured: list[Row] = field(default_factory=list)

    def __call__(self, row: Row) -> list[Row]:
        self._check(row)
        print(f"measuring again: {' '.join(command(row))}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "rows.jsonl"
            try:
                status = self.run(ROOT, command(row), out, PATIENCE)
            except subprocess.TimeoutExpired as error:
                raise NotMeasured(f"no end after {PATIENCE} s") from error
            names = compare.covering(compare.key(row))
            found = [other for other in read(out) if compare.key(other) in names] if out.exists() else []
        if not found:
            raise NotMeasured(f"the bench ended with {status} and no such row")
        self.measured.extend(found)
        return found

    def _check(self, row: Row) -> None:
        if reasons := self.reasons():
            raise NotMeasured("; ".join(reasons))
        if self.clock() >= self.end:
            raise NotMeasured("the time is up")
        here = self.here()
        for name in ("gpu", "revision"):
            if row[name] != here[name]:
                raise NotMeasured(f"the run has {name} {row[name]}, here it is {here[name]}")


@contextmanager
def checkout(revision: str, root: Path = ROOT) -> Iterator[Path]:
    """A worktree of that revision, for as long as the context lasts.

    Raises:
        ValueError: git knows no such revision.
    """
    git = partial(subprocess.run, cwd=root, capture_output=True, text=True)
    named = git(["git", "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}"])
    if named.returncode:
        raise ValueError(f"--against {revision}: git knows no such revision in {root}")
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder) / "tree"
        git(["git", "worktree", "add", "--detach", str(there), named.stdout.strip()], check=True)
        try:
            yield there
        finally:
            git(["git", "worktree", "remove", "--force", str(there)])


def by_turns(
    revision: str, arguments: list[str], root: Path = ROOT, run: Callable[..., int] = run_bench
) -> tuple[list[Row], list[Row]]:
    """Rows of that revision, measured before and after those of this tree, and the latter.

    The CUDA extension is built for that revision where this tree has one.

    Raises:
        ValueError: no such revision, or a bench gave no rows.
    """
    with checkout(revision, root) as there, tempfile.TemporaryDirectory() as folder:
        if any((root / "kernels").glob("_cuda*.so")):
            subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=there, check=True)
        theirs, ours = Path(folder) / "theirs.jsonl", Path(folder) / "ours.jsonl"
        for tree, out in ((there, theirs), (root, ours), (there, theirs)):
            print(f"== {revision if tree == there else 'this tree'}: {' '.join(arguments)}", flush=True)
            status = run(tree, arguments, out)
            if not out.exists():
                raise ValueError(f"{' '.join(arguments)} in {tree} ended with {status} and no rows")
        return list(read(theirs)), list(read(ours))


def report(findings: list[compare.Finding], known: list[Row], rows: list[Row]) -> int:
    """Print versions that differ and findings; the exit status."""
    for name in ("torch", "triton", "cuda", "driver"):
        before, after = ({row[name] for row in side} for side in (known, rows))
        if before != after:
            print(f"{name}: {', '.join(map(str, before))} in the baseline, {', '.join(map(str, after))} in the run")
    for finding in findings:
        if finding.verdict != "unchanged":
            print(compare.text(finding))
    print("rows of ours: " + ", ".join(f"{n} {v}" for v, n in Counter(f.verdict for f in findings).items()))
    return int(any(finding.failure for finding in findings))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """2 means that there is no baseline."""
        self.print_usage(sys.stderr)
        self.exit(USAGE, f"{self.prog}: error: {message}\n")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m bench.regress", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="?", type=Path, help="a file that --out of the benches wrote")
    parser.add_argument("--baseline", type=Path, help="default: bench/results/<gpu>.jsonl")
    parser.add_argument("--update", action="store_true", help="write the baseline, whatever the findings")
    parser.add_argument("--reason", help="why the baseline changes")
    parser.add_argument(
        "--partial",
        action="append",
        default=[],
        choices=tuple(compare.TOLERANCE),
        help="a kind of rows of which the run measured a part only; repeatable",
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="measure nothing again after that time")
    parser.add_argument("--against", metavar="REV", help="compare with this git revision instead of with a file")
    parser.add_argument(
        "--bench", choices=("ops", "step", "sampling", "tokenizer"), default="ops", help="the one that --against runs"
    )
    cut = argv.index("--") if "--" in argv else len(argv)
    options = parser.parse_args(argv[:cut])
    options.arguments = argv[cut + 1 :]
    if bool(options.rows) == bool(options.against):
        parser.error("either ROWS or --against REV")
    if options.update != bool(options.reason) or (options.update and options.against):
        parser.error("--update and --reason TEXT go together, and with ROWS")
    return options


def with_file(options: argparse.Namespace, again: Again) -> int:
    rows = [row for row in baseline.rows_of(options.rows) if row["kind"] != "baseline"]
    gpu = baseline.gpu_of(rows)
    path = options.baseline or baseline.path_for(gpu)
    status = NO_BASELINE
    if path.exists():
        known = list(read(path))
        findings = compare.compare(known, rows, again, options.partial)
        status, rows = report(findings, known, rows), rows + again.measured
    elif not options.update:
        print(f"no baseline for {gpu}: {path} does not exist; --update --reason TEXT makes it of these rows")
    if options.update:
        entry = baseline.update(path, rows, options.reason)
        print(f"{path} written at revision {entry['revision']}: {entry['reason']}")
        return 0
    return status


def main(argv: list[str] | None = None) -> int:
    options = parse(sys.argv[1:] if argv is None else argv)
    again = Again(end=time.monotonic() + 60 * options.minutes)
    try:
        if not options.against:
            return with_file(options, again)
        if reasons := cuda_reasons():
            raise ValueError(f"--against needs a GPU: {'; '.join(reasons)}")
        known, rows = by_turns(options.against, [f"bench.{options.bench}", *(options.arguments or ["--quick"])])
        return report(compare.compare(known, rows, again, options.partial), known, rows)
    except (ValueError, OSError) as error:
        print(f"bench.regress: {error}", file=sys.stderr)
        return USAGE


if __name__ == "__main__":
    sys.exit(main())
