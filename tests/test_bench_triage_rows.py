"""Rows of a triage among those that the gate and the pages read."""

import json

from bench.gate import baseline
from bench.measure.rows import FORMAT

FACTS = {"format": FORMAT, "date": "2026-01-01T00:00:00+00:00", "device": "cuda", "gpu": "NVIDIA H100 80GB HBM3"}


def test_how_children_ended_is_nothing_to_compare(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{**FACTS, "kind": "triage", "part": "ops", "name": "swiglu triton", "verdict": "timeout"},
            {**FACTS, "kind": "ceiling", "ceiling": "copy", "rate": 2.9}]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row["kind"] for row in baseline.rows_of(path)] == ["ceiling"]
