"""Rows of a triage among those that the gate and the pages read."""

import json

import pytest

from bench import regress
from bench.gate import baseline
from bench.measure.rows import read
from bench.triage import __main__ as program
from bench.triage.records import Records
from tests.test_bench_triage import BARE, MACHINE, MACHINE_OK, PLAIN, Behaviour, checked, op_row, row, run, step_row


def test_verdicts_are_not_compared(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [checked("swiglu", "triton", "timeout"), row("ceiling", ceiling="copy", rate=2.9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row["kind"] for row in baseline.rows_of(path)] == ["ceiling"]


def test_the_gate_takes_the_rows_of_a_triage(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(baseline, "RESULTS", tmp_path / "results")
    features = {"engine": "bare"}
    fast, slow = (
        Behaviour(
            rows=[step_row("bare", ms, fraction=50 / ms, features=features, spread=0.01) for ms in (2 * time, time)]
        )
        for time in (100.0, 125.0)
    )
    run(tmp_path / "first", (MACHINE, BARE), {"machine-machine": MACHINE_OK, "bare-bare": fast})
    rows = str(tmp_path / "first" / "rows.jsonl")
    assert regress.main([rows]) == regress.NO_BASELINE
    assert regress.main([rows, "--update", "--reason", "the first"]) == 0
    (committed,) = (tmp_path / "results").iterdir()
    assert [row["kind"] for row in read(committed)] == ["baseline", "step"]
    assert [row.get("fraction") for row in read(committed)] == [None, 0.5], "the last row of a step"
    capsys.readouterr()
    run(tmp_path / "second", (MACHINE, BARE), {"machine-machine": MACHINE_OK, "bare-bare": slow})
    assert regress.main([str(tmp_path / "second" / "rows.jsonl")]) == 1
    assert "50.0% →   40.0%" in capsys.readouterr().out


def test_rows_of_one_name_are_one_row(tmp_path):
    records = Records(tmp_path / "rows.jsonl")
    for fraction in (0.1, 0.2):
        records.add(op_row("swiglu", "triton", fraction))
        records.add(op_row("swiglu", "triton", fraction, direction="backward"))
    records.settle()
    again = Records(tmp_path / "rows.jsonl").of("op")
    assert [(row["direction"], row["fraction"]) for row in again] == [("forward", 0.2), ("backward", 0.2)]
    assert again == records.of("op") and records.facts["gpu"] == "NVIDIA H100 80GB HBM3"


def test_a_skipped_task_does_not_replace_a_verdict(tmp_path):
    """A second run into the same folder, without the GPU or the time of the first."""
    records = Records(tmp_path / "rows.jsonl")
    records.add(checked("swiglu", "triton", "timeout"))
    records.add(checked("swiglu", "cuda", "skipped"))
    again = Records(tmp_path / "rows.jsonl")
    for backend in ("triton", "cuda"):
        again.add(checked("swiglu", backend, "skipped"))
    again.settle()
    found = Records(tmp_path / "rows.jsonl").of("triage")
    assert [row["verdict"] for row in found] == ["timeout", "skipped"]
    again.add(checked("swiglu", "triton", "ok"))
    assert [row["verdict"] for row in again.of("triage")] == ["ok", "skipped"]


def test_a_rehearsal_is_not_written_over_rows_of_a_gpu(tmp_path, capsys):
    Records(tmp_path / "rows.jsonl").add(op_row("swiglu", "triton", 0.5))
    with pytest.raises(SystemExit):
        program.parse([str(tmp_path), "--rehearse"])
    assert "holds rows of a GPU" in capsys.readouterr().err
    assert program.parse([str(tmp_path)]).out == tmp_path


def test_a_folder_that_cannot_be_one_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "rows.jsonl").mkdir()
    for out in (tmp_path / "file", tmp_path):
        with pytest.raises(SystemExit):
            program.parse([str(out)])
        assert f"OUT {out} is no folder to write to" in capsys.readouterr().err


def test_a_program_without_a_device_stops_the_others(tmp_path):
    """Where one part alone is asked for, nobody has looked for a device before."""
    alone = Behaviour(status=2, rows=[], log="bench.step needs a GPU: no CUDA device is visible\n")
    _, outcomes, fake = run(tmp_path, (BARE, PLAIN), {"bare-bare": alone})
    assert fake.triage.no_device == "no CUDA device is visible"
    assert outcomes["plain-eager/plain-eager"]["verdict"] == "skipped"


def test_a_closed_pipe_does_not_stop_a_run(tmp_path, monkeypatch):
    def closed(*text, **how):
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", closed)
    _, outcomes, _ = run(tmp_path, (MACHINE, BARE), {"machine-machine": MACHINE_OK})
    assert set(outcomes) == {"machine/machine", "bare/bare"}
    assert "== bare" in (tmp_path / "log.txt").read_text()
