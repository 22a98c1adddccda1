"""Runs the parts of a triage within its time, writes what becomes of each child, and ends in order when told to."""

import json
import shlex
import shutil
import tarfile
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from bench.measure.rows import Row
from bench.triage import steps, summary
from bench.triage.parts import Part, allowance
from bench.triage.processes import Child, Ended, command
from bench.triage.records import Records, read_rows
from bench.triage.tasks import Known, Task
from bench.triage.verdicts import MEMORY, SKIPPED, WRONG, bad, verdict

#: Seconds before the end in which nothing runs that is not told to end: children get theirs to end in, files are made.
LAST = 12.0
#: A program that ends by itself is told to do so this long before its limit, or at this part of it.
EARLIER, EARLIER_PART = 6.0, 0.85
TAIL = 20
#: Exit status of a program of the bench that finds no GPU.
NEEDS_DEVICE = 2
LONGEST = 1000
PAUSE = 0.1


class Runs(Protocol):
    """A child, as `bench.triage.processes.Child`."""

    def poll(self) -> Ended | None: ...

    def stop(self) -> None: ...

    def kill(self) -> None: ...


#: (command, log, limit) → a child that has started.
Start = Callable[[Sequence[str], Path, float], Runs]
#: (module, arguments, limit) → the command of a child.
Command = Callable[[str, Sequence[str], float], list[str]]


@dataclass
class Running:
    """A child and the files it writes."""

    label: str
    task: Task
    child: Runs
    limit: float
    log: Path
    rows: Path
    result: Path
    command: str
    taken: int = 0
    measured: list[Row] = field(default_factory=list)


class Triage:
    """One run into the folder `out`, which holds rows.jsonl, log.txt, and after each part summary.txt and logs.tgz.

    What children write lies elsewhere until then. `stop` may be called from a handler of signals.
    """

    def __init__(self, out: Path, minutes: float, earlier: Sequence[Row] = (), start: Start = Child,
                 command: Command = command, clock: Callable[[], float] = time.monotonic,
                 sleep: Callable[[float], None] = time.sleep):  # fmt: skip
        self._out, self._start, self._command, self._clock, self._sleep = out, start, command, clock, sleep
        self._begun = clock()
        self._end = self._begun + 60 * minutes - LAST
        self._stopped = ""
        self.records, self._earlier = Records(out / "rows.jsonl"), tuple(earlier)
        self._running: list[Running] = []
        self._no_device = ""
        self._failures: list[str] = []
        self._work = tempfile.TemporaryDirectory(prefix="triage-")
        self._logs = Path(self._work.name) / "logs"
        self._logs.mkdir()
        # There may be none, or one that was cut off.
        with suppress(FileNotFoundError, tarfile.TarError, EOFError), tarfile.open(out / "logs.tgz") as archive:
            archive.extractall(self._work.name, filter="data")

    def stop(self, why: str) -> None:
        """Have everything end now; what is left is skipped for that reason."""
        self._stopped = self._stopped or why

    def run(self, parts: Sequence[Part]) -> bool:
        """Whether nothing failed and nothing was wrong."""
        try:
            for place, part in enumerate(parts):
                left = self._end - self._clock()
                self._part(part, allowance(part, parts[place + 1 :], left))
                self._publish()
            self.say(f"next: {summary.next_step(self.rows)}")
        finally:
            for each in self._running:
                each.child.kill()
            self._publish()
            self._work.cleanup()
        return not self._failures and not self._no_device

    @property
    def rows(self) -> list[Row]:
        """Those of an earlier run, if it was given one, and those of this one."""
        return [*self._earlier, *self.records.rows]

    @property
    def no_device(self) -> str:
        """Why there is no device to measure."""
        return self._no_device

    def say(self, text: str) -> None:
        line = f"{self._clock() - self._begun:6.1f} s  {text}"
        with (self._out / "log.txt").open("a", encoding="utf-8") as log:
            log.write(line + "\n")
        with suppress(OSError):  # a pipe that is closed, a terminal that is gone
            print(line, flush=True)

    def _part(self, part: Part, limit: float) -> None:
        known = Known(self.rows)
        waiting = deque(left for task in part.tasks for left in task.adapted(known))
        if not waiting:
            return
        end, running = self._clock() + limit, self._running
        self.say(f"== {part.name}: at most {max(limit, 0):.0f} s")
        while waiting or running:
            while waiting and len(running) < part.at_once:
                seconds = part.limit(len(waiting), end - self._clock())
                task = waiting.popleft()
                if why := self._reason_to_skip(task, part, seconds):
                    self._conclude(part, task, SKIPPED, why)
                else:
                    running.append(self._begin(part, task, seconds))
            if self._stopped:
                for each in running:
                    each.child.stop()
            for each in list(running):
                ended = each.child.poll()
                self._take(each)
                if ended is not None:
                    running.remove(each)
                    if self._finish(part, each, ended) == MEMORY and each.task.smaller is not None:
                        waiting.appendleft(each.task.smaller)
            if running:
                self._sleep(PAUSE)

    def _reason_to_skip(self, task: Task, part: Part, seconds: float) -> str:
        if self._stopped:
            return f"the run was stopped: {self._stopped}"
        if self._no_device:
            return self._no_device
        if seconds < part.share / 2:  # not worth starting
            return f"no time: {max(seconds, 0):.0f} s are left for it, it takes {part.share:.0f} s"
        return task.skip

    def _begin(self, part: Part, task: Task, limit: float) -> Running:
        label, folder = f"{part.name}/{task.name}", Path(self._work.name)
        file = label.replace(" ", "-").replace("/", "-")
        rows, result = folder / f"{file}.jsonl", folder / f"{file}.json"
        arguments = list(task.arguments)
        if task.minutes:
            arguments += ["--minutes", f"{max(limit - EARLIER, EARLIER_PART * limit) / 60:.3f}"]
        if task.ceilings and (ceilings := self._ceilings()):
            arguments += ["--ceilings", str(ceilings)]
        arguments += ["--out", str(rows)] if task.rows else []
        arguments += ["--result", str(result)] if task.result else []
        words = [*task.under, *self._command(task.module, arguments, limit)]
        log = self._logs / f"{file}.log"
        log.write_text(f"$ {shlex.join(words)}\n", encoding="utf-8")
        by_hand = shlex.join([*task.under, "python", "-m", task.module, *task.arguments])
        return Running(label, task, self._start(words, log, limit), limit, log, rows, result, by_hand)

    def _ceilings(self) -> Path | None:
        """A file of those of this run, if they are known."""
        path = Path(self._work.name) / "ceilings-ceilings.jsonl"
        return path if path.exists() and read_rows(path) else None

    def _take(self, each: Running) -> None:
        """Copy the rows that a child has written since."""
        found = read_rows(each.rows)
        for row in found[each.taken :]:
            more = {"note": each.task.note} if each.task.note else {}
            each.measured.append(self.records.add(row | {"child": each.label} | more))
        each.taken = len(found)

    def _finish(self, part: Part, each: Running, ended: Ended) -> str:
        lines = each.log.read_text(encoding="utf-8", errors="replace").splitlines()
        told = _object(each.result)
        self.records.learn(told)
        if reasons := told.get("no_device") or lacking_device(ended, lines):
            self._no_device = "; ".join(reasons)
        word, why = verdict(ended, each.measured if each.task.rows else None, lines[1:], told)
        known = {key: told[key] for key in ("packages", "extension", "collectives") if key in told}
        self._conclude(part, each.task, word, why, seconds=round(ended.seconds, 2), exit_status=ended.status,
                       limit=round(each.limit, 1), command=each.command, log=lines[1:][-TAIL:], **known)  # fmt: skip
        return word

    def _conclude(self, part: Part, task: Task, word: str, why: str, **more) -> None:
        row = {
            "kind": "triage", "part": part.name, "name": task.name, **dict(task.about), "verdict": word,
            "reason": why[:LONGEST], "note": task.note, "seconds": 0.0, "exit_status": None, "log": [], **more,
        }  # fmt: skip
        self.records.add(row)
        if bad(word):
            self._failures.append(f"{part.name}/{task.name}")
        self.say(": ".join(filter(None, (f"{task.name:34} {word:14} {row['seconds']:5.1f} s", why, task.note))))

    def _publish(self) -> None:
        """What is known so far, in the four files."""
        for row in steps.judged(self.records.of("step")):
            self.records.add(row)
            if row["status"] == "incorrect":
                self._correct(row)
        self.records.settle()
        (self._out / "summary.txt").write_text(summary.text(self.records.rows, self.rows), encoding="utf-8")
        archive = shutil.make_archive(str(Path(self._work.name) / "archive"), "gztar", self._work.name, "logs")
        shutil.copyfile(archive, self._out / "logs.tgz")

    def _correct(self, row: Row) -> None:
        """Whoever measured a step had nothing to judge it by, and said that it was well."""
        for told in self.records.of("triage"):
            if f"{told['part']}/{told['name']}" == row.get("child"):
                self.records.add(told | {"verdict": WRONG, "reason": row["reason"]})
                self._failures.append(row["child"])
                self.say(f"{told['name']:34} {WRONG}: {row['reason']}")


def lacking_device(ended: Ended, log: Sequence[str]) -> list[str]:
    """Why a program of the bench says that there is no GPU for it; empty if it does not."""
    found = [line.partition(" needs a GPU: ")[2] for line in log if " needs a GPU: " in line]
    return found[:1] if ended.status == NEEDS_DEVICE else []


def _object(path: Path) -> Row:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
