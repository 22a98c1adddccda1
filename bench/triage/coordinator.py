"""The process that runs the parts of a triage: it starts children within its time and records how each ended."""

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

from bench.measure.rows import Row
from bench.triage import summary
from bench.triage.parts import Part, allowance
from bench.triage.processes import Child, Ended, command
from bench.triage.records import Records, compare_steps, read_rows
from bench.triage.tasks import Findings, Task
from bench.triage.verdicts import MEMORY, SKIPPED, WRONG, bad, classify
from common.files import write_text

#: Seconds at the end in which children only get the time to end in, and files are made.
RESERVE = 12.0
#: A program that ends by itself is told to do so this many seconds before its limit, or at this part of it.
EARLIER, EARLIER_PART = 6.0, 0.85
LOG_LINES = 20
REASON_LENGTH = 1000
#: Exit status of a program of the bench that finds no GPU.
NEEDS_DEVICE = 2
PAUSE = 0.1


@dataclass
class Running:
    """A child and the files it writes."""

    label: str
    task: Task
    child: Child
    limit: float
    log: Path
    rows: Path
    result: Path
    command: str
    taken: int = 0
    measured: list[Row] = field(default_factory=list)


class Triage:
    """One run into the folder `out`, which holds rows.jsonl, log.txt, and after each part summary.txt and logs.tgz.

    Files of children are in a temporary folder until then. `stop` may be called from a signal handler.

    Attributes:
        no_device: why there is no device to measure; empty if there is one, or it is not known yet.
    """

    def __init__(
        self,
        out: Path,
        minutes: float,
        earlier: Sequence[Row] = (),
        start: Callable[..., Child] = Child,
        command: Callable[[str, Sequence[str], float], list[str]] = command,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self._out, self._start, self._command, self._clock, self._sleep = out, start, command, clock, sleep
        self._begun = clock()
        self._end = self._begun + 60 * minutes - RESERVE
        self._stopped = self.no_device = ""
        self.records, self._earlier = Records(out / "rows.jsonl"), tuple(earlier)
        self._running: list[Running] = []
        self._failures: list[str] = []
        self._work = tempfile.TemporaryDirectory(prefix="triage-")
        self._folder = Path(self._work.name)
        (self._folder / "logs").mkdir()
        # There may be none, or one that was cut off.
        with suppress(FileNotFoundError, tarfile.TarError, EOFError), tarfile.open(out / "logs.tgz") as archive:
            archive.extractall(self._folder, filter="data")

    def stop(self, why: str) -> None:
        """Have everything end now; tasks that have not begun are skipped for that reason."""
        self._stopped = self._stopped or why

    def run(self, parts: Sequence[Part]) -> bool:
        """Whether nothing failed and nothing was wrong."""
        try:
            for place, part in enumerate(parts):
                left = self._end - self._clock()
                self._run_part(part, allowance(part, parts[place + 1 :], left))
                self._publish()
            self.say(f"next: {summary.next_step(self.rows)}")
        finally:
            for each in self._running:
                each.child.kill()
            self._publish()
            self._work.cleanup()
        return not self._failures and not self.no_device

    @property
    def rows(self) -> list[Row]:
        """Those of an earlier run, if it was given one, and those of this one."""
        return [*self._earlier, *self.records.rows]

    def say(self, text: str) -> None:
        line = f"{self._clock() - self._begun:6.1f} s  {text}"
        with (self._out / "log.txt").open("a", encoding="utf-8") as log:
            log.write(line + "\n")
        with suppress(OSError):  # a pipe that is closed, a terminal that is gone
            print(line, flush=True)

    def _run_part(self, part: Part, limit: float) -> None:
        findings = Findings(self.rows)
        waiting = deque(adapted for task in part.tasks for adapted in task.adapted(findings))
        if not waiting:
            return
        end, running = self._clock() + limit, self._running
        self.say(f"== {part.name}: at most {max(limit, 0):.0f} s")
        while waiting or running:
            while waiting and len(running) < part.at_once:
                seconds = part.limit(len(waiting), end - self._clock())
                task = waiting.popleft()
                if reason := self._reason_to_skip(task, part, seconds):
                    self._conclude(part, task, SKIPPED, reason)
                else:
                    running.append(self._begin(part, task, seconds))
            if self._stopped:
                for each in running:
                    each.child.stop()
            for each in list(running):
                ended = each.child.poll()
                self._take_rows(each)
                if ended is not None:
                    running.remove(each)
                    if self._finish(part, each, ended) == MEMORY and each.task.smaller is not None:
                        waiting.appendleft(each.task.smaller)
            if running:
                self._sleep(PAUSE)

    def _reason_to_skip(self, task: Task, part: Part, seconds: float) -> str:
        if self._stopped:
            return f"the run was stopped: {self._stopped}"
        if self.no_device:
            return self.no_device
        if seconds < part.share / 2:  # not worth starting
            return f"no time: {max(seconds, 0):.0f} s are left for it, it takes {part.share:.0f} s"
        return task.skip

    def _begin(self, part: Part, task: Task, limit: float) -> Running:
        label = f"{part.name}/{task.name}"
        stem = label.replace(" ", "-").replace("/", "-")
        rows, result = self._folder / f"{stem}.jsonl", self._folder / f"{stem}.json"
        ceilings = self._folder / "ceilings-ceilings.jsonl"
        values = {
            "--minutes": f"{max(limit - EARLIER, EARLIER_PART * limit) / 60:.3f}",
            "--ceilings": str(ceilings) if read_rows(ceilings) else "",
            "--out": str(rows),
            "--result": str(result),
        }
        given = [word for name in task.takes if values[name] for word in (name, values[name])]
        words = [*task.wrapper, *self._command(task.module, [*task.arguments, *given], limit)]
        log = self._folder / "logs" / f"{stem}.log"
        log.write_text(f"$ {shlex.join(words)}\n", encoding="utf-8")
        by_hand = shlex.join([*task.wrapper, "python", "-m", task.module, *task.arguments])
        return Running(label, task, self._start(words, log, limit), limit, log, rows, result, by_hand)

    def _take_rows(self, each: Running) -> None:
        """Copy the rows that a child has written since."""
        found = read_rows(each.rows)
        for row in found[each.taken :]:
            more = {"note": each.task.note} if each.task.note else {}
            each.measured.append(self.records.add(row | {"child": each.label} | more))
        each.taken = len(found)

    def _finish(self, part: Part, each: Running, ended: Ended) -> str:
        """Record how a child ended; the verdict."""
        log = each.log.read_text(encoding="utf-8", errors="replace").splitlines()[1:]
        report = json.loads(each.result.read_text(encoding="utf-8")) if each.result.exists() else {}
        self.records.learn(report)
        needs = [line.partition(" needs a GPU: ")[2] for line in log if " needs a GPU: " in line]
        if reasons := report.get("no_device") or (needs[:1] if ended.status == NEEDS_DEVICE else []):
            self.no_device = "; ".join(reasons)
        verdict, reason = classify(ended, each.measured if "--out" in each.task.takes else None, log, report)
        known = {key: report[key] for key in ("packages", "extension", "collectives") if key in report}
        self._conclude(
            part,
            each.task,
            verdict,
            reason,
            seconds=round(ended.seconds, 2),
            exit_status=ended.status,
            limit=round(each.limit, 1),
            command=each.command,
            log=log[-LOG_LINES:],
            **known,
        )
        return verdict

    def _conclude(self, part: Part, task: Task, verdict: str, reason: str, **more) -> None:
        row = {
            "kind": "triage",
            "part": part.name,
            "name": task.name,
            **dict(task.about),
            "verdict": verdict,
            "reason": reason[:REASON_LENGTH],
            "note": task.note,
            "share": part.share,
            "seconds": 0.0,
            "exit_status": None,
            "log": [],
            **more,
        }
        self.records.add(row)
        if bad(verdict):
            self._failures.append(f"{part.name}/{task.name}")
        self.say(": ".join(filter(None, (f"{task.name:34} {verdict:14} {row['seconds']:5.1f} s", reason, task.note))))

    def _publish(self) -> None:
        """Write the state so far into the four files."""
        for row in compare_steps(self.records.of("step")):
            self.records.add(row)
            if row["status"] == "incorrect":
                self._correct(row)
        self.records.settle()
        write_text(self._out / "summary.txt", summary.text(self.records.rows, self.rows))
        archive = shutil.make_archive(str(self._folder / "archive"), "gztar", self._folder, "logs")
        shutil.copyfile(archive, self._out / "logs.tgz")

    def _correct(self, row: Row) -> None:
        """Replace the verdict on the child that measured a wrong step: alone it had no other loss to compare with."""
        for outcome in self.records.of("triage"):
            if f"{outcome['part']}/{outcome['name']}" == row.get("child"):
                self.records.add(outcome | {"verdict": WRONG, "reason": row["reason"]})
                self._failures.append(row["child"])
                self.say(f"{outcome['name']:34} {WRONG}: {row['reason']}")
