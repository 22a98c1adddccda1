"""Comparisons with providers that only tell invented times: what is checked, timed, and left when a run is cut off."""

import multiprocessing
import signal
import time
import weakref
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from bench.measure.ceilings import Ceilings
from bench.measure.comparison import TIME_IS_UP, Comparison, coverage_text
from bench.measure.cutoff import CutOff, Deadline, stoppable
from bench.measure.progress import ENDED, Ready
from bench.measure.rows import NAMES, Log, read
from bench.measure.timing import Iteration, Timing

ROOT = Path(__file__).parents[1]
NAMES["toy"] = ("provider",)


@dataclass(frozen=True)
class Job:
    providers: tuple[str, ...] = ("a", "b", "c")

    def __str__(self) -> str:
        return "a job"


class Told:
    """A device whose iterations take the seconds that they return; it counts the rounds."""

    kind = "cpu"
    l2_bytes = 0

    def __init__(self):
        self.rounds = 0

    def seconds(self, iteration, count):
        self.rounds += 1
        return [iteration() for _ in range(count)]


@dataclass(frozen=True)
class Toy(Comparison):
    """Provider n takes n + 1 centiseconds, twice that in the part "more"; everybody's value is 1."""

    values: dict[str, Any] = field(default_factory=dict)
    fails: dict[str, Exception] = field(default_factory=dict)
    shared: Any = "shared"
    iteration: Any = None

    kind: ClassVar[str] = "toy"

    def named(self, job, name):
        return {"provider": name}

    def set_up(self, job):
        if isinstance(self.shared, Exception):
            raise self.shared
        return self.shared

    def prepare(self, job, name, shared):
        assert shared == "shared"
        if name in self.fails:
            raise self.fails[name]
        each = (job.providers.index(name) + 1) / 100
        iterations = {
            "": Iteration(lambda: each),
            "more": Iteration(lambda: self.iteration(name) if self.iteration else 2 * each),
        }
        return Ready(iterations, self.values.get(name, 1), {"about": name})

    def wrong(self, job, values, shared):
        return {name: f"{value} is not 1" for name, value in values.items() if value != 1}

    def figures(self, job, ready):
        return {"per_second": 1 / ready.seconds()}

    def afterwards(self, job, ready):
        return {"seen": True}

    def label(self, row):
        return row["provider"]

    def measured(self, row):
        return "ok"


def toy(path=None, **settings) -> Toy:
    return Toy(Told(), Log("cpu", path), None, **({"seconds": 0.4, "rounds": 4} | settings))


WHOLE = {"rounds": 4, "of": 4, "interleaved": True, "cut_off": None}


def test_a_whole_job(tmp_path):
    rows = toy(tmp_path / "rows.jsonl").run(Job())
    assert list(read(tmp_path / "rows.jsonl", "cpu")) == rows
    assert [row["provider"] for row in rows] == ["a", "b", "c"] and {row["status"] for row in rows} == {"ok"}
    assert [row["p50_ms"] for row in rows] == pytest.approx([30, 60, 90]), "both parts together"
    first = rows[0]
    assert first["times_faster_than"] == pytest.approx({"b": 2, "c": 3})
    assert first["per_second"] == pytest.approx(1 / 0.03)
    assert first["coverage"] == WHOLE and (first["about"], first["seen"], first["peak_gb"]) == ("a", True, None)
    assert coverage_text(first) == "" and first["samples"] == 4 * 5, (
        "parts have equal time: the slower one's samples count"
    )


def test_figures_are_fractions_of_the_data_sheet_and_of_the_matmul_in_this_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    comparison = replace(toy(), ceilings=Ceilings(4e12, {torch.bfloat16: 8e14, torch.float32: 5e13}))
    assert comparison.limits(4e14) == {"mfu": pytest.approx(4e14 / 989e12), "fraction": 0.5}
    assert comparison.limits(1e13, torch.float32) == {"mfu": None, "fraction": 0.2}
    assert toy().limits(4e14) == {"mfu": None, "fraction": None}, "on a CPU"


def test_who_is_wrong_or_cannot_run_is_recorded_and_the_others_are_timed():
    rows = toy(values={"b": 2}, fails={"c": ImportError("No module named 'x'")}).run(Job())
    assert {row["provider"]: f"{row['status']} {row['reason']}".strip() for row in rows} == {
        "a": "ok",
        "b": "incorrect 2 is not 1",
        "c": "unavailable not installed: No module named 'x'",
    }
    assert "p50_ms" not in rows[1] and rows[-1]["times_faster_than"] == {}
    rows = toy(fails={"b": RuntimeError("out of memory")}).run(Job())
    assert [row["reason"] for row in rows if row["status"] == "failed"] == ["OutOfMemoryError: out of memory"]
    rows = toy(shared=ImportError("x")).run(Job())
    assert [row["status"] for row in rows] == ["unavailable"] * 3


def test_whoever_was_timed_has_a_row_at_once(tmp_path, monkeypatch):
    """As good as it can be then: nothing of those who come later, and what it covers if nothing replaces it."""
    out, seen, true = tmp_path / "rows.jsonl", [], Toy.prepare

    def prepare(self, job, name, shared):
        seen.append(list(read(out, "cpu")))
        return true(self, job, name, shared)

    monkeypatch.setattr(Toy, "prepare", prepare)
    rows = toy(out).run(Job())
    assert [[row["provider"] for row in found] for found in seen] == [[], ["a"], ["a", "b"]]
    early = {"rounds": 1, "of": 4, "interleaved": False, "cut_off": ENDED}
    assert all(row["coverage"] == early and "seen" not in row for row in seen[2])
    assert [list(row["times_faster_than"]) for row in seen[2]] == [[], ["a"]]
    assert seen[2][1]["p50_ms"] == pytest.approx(60) and seen[2][1]["status"] == "ok"
    assert list(read(out, "cpu")) == rows and [row["provider"] for row in rows] == ["a", "b", "c"]
    assert len(out.read_text().splitlines()) == 6


def test_who_turns_out_wrong_or_fails_later_takes_its_row_back(tmp_path, monkeypatch):
    out = tmp_path / "rows.jsonl"
    checked = {"a": "not what c says"}
    monkeypatch.setattr(Toy, "wrong", lambda self, job, values, shared: checked if "c" in values else {})
    rows = toy(out).run(Job())
    assert {row["provider"]: row["status"] for row in rows} == {"a": "incorrect", "b": "ok", "c": "ok"}
    assert list(read(out, "cpu")) == rows and "p50_ms" not in next(row for row in rows if row["provider"] == "a")


def test_what_providers_share_lives_until_their_rows_are_written(monkeypatch):
    class Folder:
        """Such as a directory of files that is removed with its object."""

    alive, seen = [], []

    def set_up(self, job):
        folder = Folder()
        alive.append(weakref.ref(folder))
        return folder

    monkeypatch.setattr(Toy, "set_up", set_up)
    monkeypatch.setattr(Toy, "prepare", lambda self, job, name, shared: Ready({"": Iteration(lambda: 0.01)}, 1))
    monkeypatch.setattr(Toy, "afterwards", lambda self, job, ready: seen.append(alive[0]() is not None) or {})
    toy().run(Job())
    assert seen == [True] * 3 and alive[0]() is None


def test_who_cannot_be_checked_has_failed(monkeypatch):
    def check(self, job, values, shared):
        raise MemoryError(f"no room for {len(values)}")

    monkeypatch.setattr(Toy, "wrong", check)
    rows = toy().run(Job())
    assert [(row["status"], row["reason"]) for row in rows] == [("failed", "MemoryError: no room for 1")] * 3


def test_an_iteration_that_fails_takes_no_other_with_it():
    def failing(name, after):
        iterations = {"b": 0}

        def iteration(who):
            iterations[who] = iterations.get(who, 0) + 1
            if who == name and iterations[who] > after:
                raise RuntimeError("an illegal address")
            return 0.01

        return iteration

    for after in (0, 60):  # in the first iterations of all; when all are timed by turns
        rows = toy(iteration=failing("b", after)).run(Job())
        assert {row["provider"]: row["status"] for row in rows} == {"a": "ok", "b": "failed", "c": "ok"}
        assert all(
            row["coverage"] == WHOLE and set(row["times_faster_than"]) <= {"a", "c"}
            for row in rows
            if row["status"] == "ok"
        )


def test_a_failing_look_afterwards_loses_no_row(monkeypatch):
    def broken(self, job, ready):
        raise RuntimeError("no profiler")

    monkeypatch.setattr(Toy, "afterwards", broken)
    rows = toy().run(Job())
    assert [row["status"] for row in rows] == ["ok"] * 3
    assert rows[0]["afterwards"] == "failed: RuntimeError: no profiler"


def until(rounds: int, device: Told) -> Deadline:
    """Passes when the device has seen so many rounds."""
    return Deadline(rounds, lambda: device.rounds + 0.5)


@pytest.mark.parametrize("rounds", range(0, 60, 3))
def test_when_the_time_is_up_whoever_was_timed_has_a_row(rounds, capsys):
    """Whenever it is: starting takes 6 rounds (two parts, each with warm-up and estimate), so three take 18."""
    bench = toy()
    device = bench.device
    bench = toy(until=until(rounds, device))
    object.__setattr__(bench, "device", device)
    rows = bench.run(Job())
    started = min(3, -(-rounds // 6))
    assert [row["provider"] for row in rows] == ["a", "b", "c"][:started]
    rests = [row["coverage"] for row in rows]
    printed = capsys.readouterr().out
    if rounds < 18:
        early = {"rounds": 1, "of": 4, "interleaved": False, "cut_off": TIME_IS_UP}
        assert rests == [early] * started and (TIME_IS_UP in printed)
        assert printed.count("; 1 of 4 rounds, not by turns, cut off: the time is up") == started
    else:
        assert all(rest["rounds"] <= 4 and (rest["cut_off"] is None) == (rest == WHOLE) for rest in rests)
        assert (rests == [WHOLE] * 3) == (rounds >= 18 + 12 + 24 - 1)
    assert all(row["p50_ms"] == pytest.approx(30 * (number + 1)) for number, row in enumerate(rows))
    assert all("seen" in row for row in rows), "there is time to look"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("when", "timed"), [(3, 0), (30, 1), (50, 2), (75, 3), (190, 3)])
def test_a_signal_leaves_the_rows_of_all_that_was_timed(number, when, timed, tmp_path):
    """Twice at once, as `timeout` sends it. A start takes 23 iterations of this part; from 87 on they alternate."""
    iterations = []

    def iteration(name):
        iterations.append(name)
        if len(iterations) == when:
            signal.raise_signal(number)
            signal.raise_signal(number)
        return 0.01

    before = signal.getsignal(number)
    with pytest.raises(CutOff) as cut, stoppable():
        toy(tmp_path / "rows.jsonl", iteration=iteration).run(Job())
    assert cut.value.number == number and signal.getsignal(number) is before
    rows = list(read(tmp_path / "rows.jsonl", "cpu"))
    assert [row["provider"] for row in rows] == ["a", "b", "c"][:timed]
    assert all(row["coverage"]["cut_off"] == number.name and "seen" not in row for row in rows)
    assert all(row["coverage"]["interleaved"] == (when == 190) for row in rows)
    if rows:
        assert number.name in coverage_text(rows[0])


@pytest.mark.parametrize(("where", "call", "seen"), [("afterwards", 2, 1), ("figures", 3 + 2, 2)])
def test_a_signal_while_rows_are_written_loses_none(where, call, seen, tmp_path, monkeypatch):
    """Those with all that was timed; before, figures are asked for three times."""
    true, calls = getattr(Toy, where), []

    def told(self, *arguments):
        calls.append(arguments)
        if len(calls) == call:
            signal.raise_signal(signal.SIGTERM)
        return true(self, *arguments)

    monkeypatch.setattr(Toy, where, told)
    with pytest.raises(CutOff), stoppable():
        toy(tmp_path / "rows.jsonl").run(Job())
    rows = list(read(tmp_path / "rows.jsonl", "cpu"))
    assert [row["provider"] for row in rows] == ["a", "b", "c"] and all(row["coverage"] == WHOLE for row in rows)
    assert ["seen" in row for row in rows] == [True] * seen + [False] * (3 - seen), "no time to look at the others"


def test_what_comes_after_the_first_signal_is_ignored():
    with stoppable():
        with pytest.raises(CutOff):
            signal.raise_signal(signal.SIGTERM)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)


def test_the_end_of_a_loaders_process_does_no_harm():
    """torch raises an error wherever the main process is when a worker dies, and the signal goes to all of them.

    A signal that comes just before a sleep does not end it, so the worker sleeps for a moment at a time.
    """

    def work(connection):
        connection.send("up")
        for _ in range(1200):
            time.sleep(0.05)

    def died(number, frame):
        raise RuntimeError("DataLoader worker is killed by signal: Terminated")

    before = signal.signal(signal.SIGCHLD, died)
    try:
        with stoppable():
            here, there = multiprocessing.Pipe()
            worker = multiprocessing.get_context("fork").Process(target=work, args=(there,))
            worker.start()
            here.recv()
            with pytest.raises(CutOff):
                signal.raise_signal(signal.SIGTERM)
            worker.terminate()
            worker.join()
        assert worker.exitcode == -signal.SIGTERM, "it has no rows to write"
        assert signal.getsignal(signal.SIGCHLD) is died
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_whole_of_several_parts():
    parts = {"a": Timing(1, "", [1.0, 2.0, 3.0]), "b": Timing(1, "", [10.0, 10.0, 40.0])}
    ready = Ready({}, times={"a": 100}, early=parts)
    assert (ready.seconds(), ready.seconds(1.0)) == (210.0, 340.0)
