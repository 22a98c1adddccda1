"""Rows of a triage among those that the gate and the pages read."""

import json

from bench import regress
from bench.gate import baseline
from bench.measure.rows import read
from bench.triage.records import Records
from tests.test_bench_triage import BARE, MACHINE, WELL, Script, checked, op_row, row, run, step_row


def test_how_children_ended_is_nothing_to_compare(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [checked("swiglu", "triton", "timeout"), row("ceiling", ceiling="copy", rate=2.9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row["kind"] for row in baseline.rows_of(path)] == ["ceiling"]


def test_the_gate_takes_the_rows_of_a_triage(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(baseline, "RESULTS", tmp_path / "results")
    features = {"engine": "bare"}
    fast, slow = (Script(rows=[step_row("bare", ms, fraction=50 / ms, features=features, spread=0.01)
                               for ms in (2 * time, time)]) for time in (100.0, 125.0))  # fmt: skip
    run(tmp_path / "first", (MACHINE, BARE), {"machine-machine": WELL, "bare-bare": fast})
    rows = str(tmp_path / "first" / "rows.jsonl")
    assert regress.main([rows]) == regress.NO_BASELINE
    assert regress.main([rows, "--update", "--reason", "the first"]) == 0
    (committed,) = (tmp_path / "results").iterdir()
    assert [row["kind"] for row in read(committed)] == ["baseline", "step"]
    assert [row.get("fraction") for row in read(committed)] == [None, 0.5], "the last row of a step"
    capsys.readouterr()
    run(tmp_path / "second", (MACHINE, BARE), {"machine-machine": WELL, "bare-bare": slow})
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
