"""Programs of comparisons, and their ends: in time, told to stop, killed; and the ceilings that they are given."""

import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from bench.measure import ceilings, comparison, program
from bench.measure.comparison import TIME_IS_UP, coverage_text
from bench.measure.cutoff import Deadline
from bench.measure.program import work_through
from bench.measure.progress import Ready
from bench.measure.rows import Log, read
from bench.measure.timing import HostDevice, Iteration
from tests.test_bench_comparison import Job, Told, Toy, toy

ROOT = Path(__file__).parents[1]


def test_jobs_end_in_time(capsys):
    now = [0.0]
    bench = toy(until=Deadline(90.0, lambda: now[0]))

    class Recorded:
        until = bench.until

        def run(self, job):
            now[0] += 50
            return [{"status": "failed" if job == "second" else "ok"}]

        alarming, conclude = bench.alarming, bench.conclude

    assert work_through(Recorded(), ["first", "second", "third"]) == 0 and now == [50.0]
    assert capsys.readouterr().out == "time is up, not measured: second, third\nrows: 1 ok\n"
    now[0] = -100.0
    assert work_through(Recorded(), ["first", "second", "third"]) == 1, "one failed"


PROGRAM = """
import sys
from bench.measure import ceilings, program
from bench.measure.timing import HostDevice
from tests.test_bench_comparison import Job
from tests.test_bench_program import Slow
program.cuda_reasons = list
program.CudaDevice = HostDevice
ceilings.measure = lambda device, log: None
options = program.parser("bench.toy", "", 0.2).parse_args(sys.argv[1:])
sys.exit(program.run("bench.toy", options, Slow, [Job(), Job()]))
"""


@dataclass(frozen=True)
class Slow(Toy):
    """Really takes time, and says when it has started."""

    def prepare(self, job, name, shared):
        print("started", name, flush=True)
        return Ready({part: Iteration(lambda: time.sleep(0.02)) for part in ("", "more")}, 1)


def test_a_program_that_is_told_to_stop(tmp_path):
    """By `timeout`, which also says so in its exit status."""
    out = tmp_path / "rows.jsonl"
    program = [sys.executable, "-c", PROGRAM, "--seconds", "1e4", "--out", str(out)]
    process = subprocess.Popen(
        ["timeout", "--preserve-status", "1000", *program],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert any("started b" in line for line in process.stdout)
    process.send_signal(signal.SIGTERM)  # which `timeout` hands on, as when the time is up
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors
    rows = list(read(out, "cpu"))
    assert [row["provider"] for row in rows] == ["a"] and rows[0]["coverage"]["cut_off"] == "SIGTERM"
    assert rows[0]["samples"] > 0 and "cut off by SIGTERM" in errors


def test_a_program_that_is_killed(tmp_path):
    """Without a word: it can write nothing then, but the rows of whoever had been timed are there."""
    out = tmp_path / "rows.jsonl"
    program = [sys.executable, "-c", PROGRAM, "--seconds", "1e4", "--out", str(out)]
    process = subprocess.Popen(program, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert any("started c" in line for line in process.stdout)
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    rows = list(read(out, "cpu"))
    assert [row["provider"] for row in rows] == ["a", "b"] and {row["status"] for row in rows} == {"ok"}
    assert all(row["samples"] > 0 and coverage_text(row).endswith("cut off: the process ended") for row in rows)


def test_a_program_with_a_time_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(program, "cuda_reasons", list)
    monkeypatch.setattr(program, "CudaDevice", HostDevice)
    monkeypatch.setattr(ceilings, "measure", lambda device, log: None)
    monkeypatch.setattr(comparison, "EARLY", 0.05)
    out = tmp_path / "rows.jsonl"
    words = ["--minutes", "0.08", "--seconds", "20", "--out", str(out)]
    options = program.parser("bench.toy", "", 0.2).parse_args(words)
    assert program.run("bench.toy", options, Slow, [Job()]) == 0
    rows = list(read(out, "cpu"))
    assert rows and all(row["coverage"]["cut_off"] == TIME_IS_UP for row in rows)
    monkeypatch.setattr(program, "cuda_reasons", lambda: ["no CUDA device"])
    assert program.run("bench.toy", options, Slow, [Job()]) == 2


def test_a_program_reads_its_ceilings_from_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(program, "cuda_reasons", list)
    monkeypatch.setattr(program, "CudaDevice", Told)
    monkeypatch.setattr(ceilings, "measure", lambda device, log: pytest.fail("measured again"))
    seen, path, out = [], tmp_path / "ceilings.jsonl", tmp_path / "rows.jsonl"
    words = ["--ceilings", str(path), "--out", str(out)]
    options = program.parser("bench.toy", "", 0.4).parse_args(words)

    def make(device, log, ceilings, **settings):
        seen.append(ceilings)
        return Toy(device, log, ceilings, **settings)

    with pytest.raises(SystemExit) as refused:
        program.run("bench.toy", options, make, [Job()])
    assert refused.value.code == program.USAGE and not seen
    assert capsys.readouterr().err.startswith("bench.toy: --ceilings: ") and not out.read_text()
    log = Log("cpu", path)
    for name in ("copy", "matmul bfloat16", "matmul float16", "matmul float32"):
        log.write({"kind": "ceiling", "ceiling": name, "rate": 2.0})
    assert program.run("bench.toy", options, make, [Job()]) == 0
    assert seen[0].bandwidth == 2e12 and {row["kind"] for row in read(out, "cpu")} == {"toy"}
