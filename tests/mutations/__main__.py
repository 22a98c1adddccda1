"""`python -m tests.mutations [--only PATTERN] [--jobs 2] [--list]`: do the tests find realistic mistakes?

Plants each mistake of the table in a copy of the tree, runs the tests that ought to find it there, and says whether one
of them failed; a test that hangs or a process that is killed by a signal counts, too. Before that all those tests have
to pass without a mistake. At the end the rate; exit status 1 where it is below 95 %, or a mistake could not be tried.
Takes seven minutes on two cores, so it is no part of the tests; `test_mutations.py` only keeps the table alive.
"""

import argparse
import os
import queue
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.mutations import ROOT, KernelMistake, Mistake, mutated
from tests.mutations.table import MISTAKES

WANTED = 0.95
OF_CSRC = "test_csrc_mutations.py::test_a_mutation_is_found"
FAILED = (1, 2)  # pytest's statuses where tests fail, or cannot be imported


@dataclass(frozen=True)
class Outcome:
    """Whether a mistake was found; None where that cannot be said, and `note` then why."""

    found: bool | None
    seconds: float = 0.0
    note: str = ""

    def __str__(self) -> str:
        verdict = {True: "found", False: "NOT FOUND", None: "ERROR"}[self.found]
        return f"{verdict:9} {self.seconds:6.1f} s"


@dataclass
class Case:
    """What one pytest run says of a test: whether all its cases that were not skipped passed, and their seconds."""

    passed: int = 0
    failed: int = 0
    seconds: float = 0.0


def main(argv: list[str] | None = None) -> int:
    """Plant each mistake and run its tests; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--only", default="*", metavar="PATTERN", help="mistakes by name, such as launch/* or *clock*")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once (default: 2)")
    parser.add_argument("--list", action="store_true", help="print the table and stop")
    args = parser.parse_args(argv)
    chosen = {name: mistake for name, mistake in MISTAKES.items() if fnmatch(name, args.only)}
    if not chosen:
        parser.error(f"no mistake is called {args.only}")
    if args.list:
        print("\n".join(f"{name}: {m.file}: {m.old!r} → {m.new!r}" for name, m in chosen.items()))
        return 0
    outcomes = try_all(chosen, args.jobs)
    return summary(outcomes)


def try_all(chosen: Mapping[str, Mistake | KernelMistake], jobs: int, root: Path = ROOT) -> dict[str, Outcome]:
    """The outcome of each mistake, printed as it comes."""
    outcomes: dict[str, Outcome] = {}

    def say(name: str, outcome: Outcome) -> None:
        outcomes[name] = outcome
        print(f"{outcome}  {name}{outcome.note and f'  ({outcome.note})'}", flush=True)

    planted = {name: mistake for name, mistake in chosen.items() if isinstance(mistake, Mistake)}
    of_csrc = [name for name, mistake in chosen.items() if isinstance(mistake, KernelMistake)]
    with TemporaryDirectory(prefix="mutations_") as folder:
        trees = [copied(root, Path(folder, f"tree_{number}")) for number in range(jobs)]
        limits = {}
        for name, outcome in unmutated(planted, trees[0], jobs).items():
            if outcome.found is None:
                say(name, outcome)
            else:
                limits[name] = 30 + 10 * outcome.seconds
        free: queue.Queue[Path] = queue.Queue()
        for tree in trees:
            free.put(tree)

        def next_one(name: str) -> tuple[str, Outcome]:
            tree = free.get()
            try:
                return name, tried(planted[name], tree, limits[name])
            finally:
                free.put(tree)

        with ThreadPoolExecutor(jobs) as pool:
            for done in as_completed([pool.submit(next_one, name) for name in limits]):
                say(*done.result())
        for name, outcome in those_of_csrc(of_csrc, root, Path(folder), jobs).items():
            say(name, outcome)
    return outcomes


def copied(root: Path, tree: Path) -> Path:
    """A copy of the tracked files; the built extension, which nothing writes, is linked."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (root / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, tree / name)
    for extension in root.glob("kernels/_cuda*.so"):
        (tree / "kernels" / extension.name).symlink_to(extension)
    return tree


def unmutated(planted: Mapping[str, Mistake], tree: Path, jobs: int) -> dict[str, Outcome]:
    """All tests of these mistakes without any: an outcome with `found` None where they do not pass, else False."""
    tests = {test: f"tests/{test}" for mistake in planted.values() for test in mistake.tests.split()}
    if not tests:
        return {}
    print(f"{len(tests)} tests without a mistake …", flush=True)
    cases, status, output = run(tests.values(), tree, "-n", str(jobs), "--dist", "loadfile")
    if status not in (0, 1):
        print(output)
    outcomes = {}
    for name, mistake in planted.items():
        found = {test: of_selection(cases, test) for test in mistake.tests.split()}
        wrong = [test for test, case in found.items() if case.failed or not case.passed]
        note = f"without it fails, or selects nothing: {', '.join(wrong)}" if wrong else ""
        outcomes[name] = Outcome(None if wrong else False, sum(case.seconds for case in found.values()), note)
    return outcomes


def tried(mistake: Mistake, tree: Path, limit: float) -> Outcome:
    """Plant a mistake, run its tests for at most `limit` seconds, and take it out again."""
    file, begun = tree / mistake.file, time.monotonic()
    before = file.read_bytes()
    try:
        file.write_text(mutated(mistake, tree))
    except (ValueError, OSError) as error:
        return Outcome(None, note=str(error))
    try:
        _, status, output = run([f"tests/{test}" for test in mistake.tests.split()], tree, "-x", limit=limit)
    finally:
        file.write_bytes(before)
    seconds = time.monotonic() - begun
    if status is None:
        return Outcome(True, seconds, f"hangs: ended after {limit:.0f} s")
    if status < 0:
        return Outcome(True, seconds, f"ended by {signal.Signals(-status).name}")
    if status not in (0, *FAILED):
        return Outcome(None, seconds, f"pytest ended with {status}: {output[-500:]}")
    return Outcome(status in FAILED, seconds)


def those_of_csrc(names: list[str], root: Path, folder: Path, jobs: int) -> dict[str, Outcome]:
    """What `test_csrc_mutations.py` finds: it plants the mistakes itself, in copies of csrc, and builds each."""
    if not names:
        return {}
    tests = {name: f"{OF_CSRC}[{name.partition('/')[2]}]" for name in names}
    print(f"{len(tests)} mistakes of csrc, each compiled …", flush=True)
    own = [f"tests/{test}" for test in tests.values()]
    cases, status, output = run(own, root, "-n", str(jobs), scratch=folder)
    if status not in (0, 1):
        print(output)
    outcomes = {}
    for name, test in tests.items():
        case = of_selection(cases, test)
        known = case.passed or case.failed
        outcomes[name] = Outcome(case.passed > 0 if known else None, case.seconds, "" if known else "it was not run")
    return outcomes


def run(tests: Iterable[str], tree: Path, *options: str, limit: float | None = None,
        scratch: Path | None = None) -> tuple[dict[str, Case], int | None, str]:  # fmt: skip
    """pytest in a tree → cases by node id, its exit status (None: ended after `limit` seconds), the end of its output.

    What it started is ended with it. scratch: where it may write, if not beside the tree.
    """
    scratch = (scratch or tree.parent) / f"scratch_{tree.name}"
    scratch.mkdir(exist_ok=True)
    report = scratch / "report.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line", f"--junitxml={report}",
               f"--basetemp={scratch / 'tests'}", *options, *tests]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=tree, env=environment, text=True, start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    status, output = None, ""
    try:
        output, _ = process.communicate(timeout=limit)
        status = process.returncode
    except subprocess.TimeoutExpired:
        pass
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return read_cases(report), status, output


def read_cases(report: Path) -> dict[str, Case]:
    """Cases of a JUnit report by node id relative to `tests/`; none where there is no report."""
    cases: dict[str, Case] = {}
    if not report.is_file():
        return cases
    for element in ElementTree.parse(report).iter("testcase"):
        file = element.get("classname", "").removeprefix("tests.").replace(".", "/")
        case = cases.setdefault(f"{file}.py::{element.get('name')}", Case())
        kinds = {child.tag for child in element}
        case.failed += bool(kinds & {"failure", "error"})
        case.passed += not kinds & {"failure", "error", "skipped"}
        case.seconds += float(element.get("time", 0))
    return cases


def of_selection(cases: Mapping[str, Case], test: str) -> Case:
    """All cases of a test, or the one that is named."""
    found = [case for node, case in cases.items() if node == test or node.startswith(f"{test}[")]
    return Case(*(sum(getattr(case, key) for case in found) for key in ("passed", "failed", "seconds")))


def summary(outcomes: Mapping[str, Outcome]) -> int:
    """Print what was found of each package and the rate; returns the exit status."""
    packages = dict.fromkeys(name.partition("/")[0] for name in outcomes)
    for package in packages:
        of_it = [outcome.found for name, outcome in outcomes.items() if name.startswith(f"{package}/")]
        print(f"{package:14} {of_it.count(True):3} of {len(of_it)}")
    verdicts = [outcome.found for outcome in outcomes.values()]
    for title, verdict in (("not found", False), ("not tried", None)):
        if names := [name for name, outcome in outcomes.items() if outcome.found is verdict]:
            print(f"{title}: {', '.join(names)}")
    rate = verdicts.count(True) / len(verdicts)
    print(f"found: {verdicts.count(True)} of {len(verdicts)} mistakes, {rate:.1%} (wanted: {WANTED:.0%})")
    return int(rate < WANTED or None in verdicts)


if __name__ == "__main__":
    sys.exit(main())
