"""Providers that memory does not hold together, or does not hold at all: what is given back, and when."""

import weakref
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from bench.measure.comparison import coverage_text
from bench.measure.failures import status_of
from bench.measure.rows import Log, read
from bench.measure.timing import Iteration, IterationFailed
from tests.test_bench_comparison import WHOLE, Job, Told, Toy, toy, until


@dataclass(frozen=True)
class OneByOne(Toy):
    """Each takes memory: an object that its iteration holds, in a circle as hooks make them."""

    memory: list = field(default_factory=list)
    closed: list = field(default_factory=list)

    interleaved: ClassVar[bool] = False

    class Block:
        def __init__(self):
            self.circle = self

    def prepare(self, job, name, shared):
        assert not [ref for ref in self.memory if ref() is not None], "its memory was not given back"
        block = self.Block()
        self.memory.append(weakref.ref(block))
        ready = super().prepare(job, name, shared)
        run = ready.iterations["more"].run
        ready.iterations["more"] = Iteration(lambda: (block, run())[1])
        ready.close = lambda: self.closed.append(name)
        return ready


def one_by_one(path=None, **settings) -> OneByOne:
    return OneByOne(Told(), Log("cpu", path), None, **({"seconds": 0.4, "rounds": 4} | settings))


def test_one_after_the_other(tmp_path):
    """Nobody is held beside another, and their ratios are all there in the end."""
    bench = one_by_one(tmp_path / "rows.jsonl")
    rows = bench.run(Job())
    assert list(read(tmp_path / "rows.jsonl", "cpu")) == rows
    rows = sorted(rows, key=lambda row: row["provider"])
    assert [row["p50_ms"] for row in rows] == pytest.approx([30, 60, 90])
    assert all(row["coverage"] == WHOLE | {"interleaved": False} and row["seen"] for row in rows)
    assert rows[0]["times_faster_than"] == pytest.approx({"b": 2, "c": 3}) and coverage_text(rows[0]) == ""
    assert bench.closed == ["a", "b", "c"] and len(bench.memory) == 3


def test_one_after_the_other_until_the_time_is_up(tmp_path):
    """A start takes 6 rounds, and all of both parts 12: the second provider is cut off when it has two of each."""
    bench = one_by_one(tmp_path / "rows.jsonl")
    bench = replace(bench, until=until(18 + 6 + 4 + 4, bench.device))
    rows = {row["provider"]: row for row in bench.run(Job())}
    assert rows["a"]["coverage"]["cut_off"] is None and "c" not in rows and bench.closed == ["a", "b"]
    assert coverage_text(rows["b"]) == "2 of 4 rounds, not by turns, cut off: the time is up"
    assert list(rows["a"]["times_faster_than"]) == ["b"], "its last row is of the end"


@pytest.mark.parametrize("where", ["start", "first iteration", "rounds"])
@pytest.mark.parametrize("make", [toy, one_by_one])
def test_out_of_memory_gives_everything_back(where, make, monkeypatch):
    """Also what the frames of the error hold; whoever comes next has its place."""
    taken, iterations, true = [], [], Toy.prepare

    def run_out():
        tensor = OneByOne.Block()
        taken.append(weakref.ref(tensor))
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 5.00 GiB")
        except RuntimeError as error:
            raise ValueError("the compiler met an error") from error

    def prepare(self, job, name, shared):
        assert not [ref for ref in taken if ref() is not None]
        if where == "start" and name == "b":
            run_out()
        return true(self, job, name, shared)

    def iteration(name):
        iterations.append(name)
        if name == "b" and iterations.count("b") == (1 if where == "first iteration" else 40):
            run_out()
        return 0.01

    monkeypatch.setattr(Toy, "prepare", prepare)
    bench = make(iteration=iteration)
    rows = bench.run(Job())
    assert {row["provider"]: row["status"] for row in rows} == {"a": "ok", "b": "failed", "c": "ok"}
    reason = next(row["reason"] for row in rows if row["provider"] == "b")
    assert reason == "OutOfMemoryError: CUDA out of memory. Tried to allocate 5.00 GiB"
    assert len(taken) == 1 and taken[0]() is None
    if make is one_by_one:
        assert bench.closed == (["a", "c"] if where == "start" else ["a", "b", "c"])


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "OutOfMemoryError: CUDA out of memory."),
        (RuntimeError("Triton Error [CUDA]: out of memory"), "OutOfMemoryError: Triton Error [CUDA]: out of memory"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            "OutOfMemoryError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        ),
        (ValueError("no such thing"), "ValueError: no such thing"),
    ],
)
def test_reasons(error, reason):
    assert status_of(error) == ("failed", reason)
    failed = IterationFailed("b")
    failed.__cause__ = error
    assert status_of(failed) == ("failed", reason)


def test_memory_that_is_not_given_back_loses_no_row(capsys):
    def broken(name):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    assert [row["status"] for row in one_by_one(closed=SimpleNamespace(append=broken)).run(Job())] == ["ok"] * 3
    assert "its memory was not given back: failed: RuntimeError: CUDA error: an illegal" in capsys.readouterr().out
