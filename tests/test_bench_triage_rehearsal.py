"""The children of a triage for real, on a CPU: the programs of the bench, with tiny sizes and stand-ins for the device.

What `bash bench/gpu.sh OUT 8` does, but for the GPU; `--rehearse` runs all parts of it.
"""

import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from bench.gate import baseline
from bench.measure.rows import read
from kernels.testing import emulation

ROOT = Path(__file__).parents[1]
ONLY = ("machine", "ops/swiglu", "bare", "plain-eager", "gemms", "fractions/graph", "images", "others/encode")


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """The folder, and what the script printed and ended with."""
    out = tmp_path_factory.mktemp("rehearsal") / "out"
    if not emulation.reasons():
        emulation.module()  # compiles for minutes where the sources have changed: longer than a child may take
    words = ["bash", str(ROOT / "bench" / "gpu.sh"), str(out), "10", "--rehearse"]
    words += [word for part in ONLY for word in ("--only", part)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "GIT_REVISION": "1234abc"}
    done = subprocess.run(words, capture_output=True, text=True, env=variables)
    return out, done.stdout + done.stderr, done.returncode


def test_everything_ends_well(rehearsed):
    out, printed, status = rehearsed
    assert status == 0, printed
    assert {path.name for path in out.iterdir()} == {"rows.jsonl", "summary.txt", "log.txt", "logs.tgz"}
    rows = list(read(out / "rows.jsonl", "cpu"))
    outcomes = {f"{row['part']}/{row['name']}": row["verdict"] for row in rows if row["kind"] == "triage"}
    assert set(outcomes.values()) == {"ok"} and {name.split("/")[0] for name in outcomes} == {
        "machine",
        "ceilings",
        "ops",
        "bare",
        "plain-eager",
        "gemms",
        "fractions",
        "images",
        "others",
    }
    assert {"ops/swiglu triton", "ops/swiglu cuda", "ops/swiglu_linear_grad triton"} <= set(outcomes)
    assert {row["revision"] for row in rows} == {"1234abc"} and {row["device"] for row in rows} == {"cpu"}
    with tarfile.open(out / "logs.tgz") as logs:
        names = {name.removeprefix("logs/") for name in logs.getnames()}
        log = logs.extractfile("logs/ops-swiglu-cuda.log").read().decode()
    assert {f"{name.replace('/', '-').replace(' ', '-')}.log" for name in outcomes} <= names
    assert "odd float32 gradients … right" in log and "strided float16 same bits … right" in log


def test_measurements_are_in_the_rows_and_in_the_summary(rehearsed):
    out, _, _ = rehearsed
    rows = list(read(out / "rows.jsonl", "cpu"))
    steps = {row["variant"]: row for row in rows if row["kind"] == "step"}
    assert set(steps) == {"bare", "plain-eager"} and {row["status"] for row in steps.values()} == {"ok"}
    ratio = steps["plain-eager"]["p50_ms"] / steps["bare"]["p50_ms"]
    assert steps["bare"]["times_faster_than"] == {"plain-eager": pytest.approx(ratio)}
    assert steps["bare"]["fraction"] and steps["bare"]["child"] == "bare/bare", "of another child's ceilings"
    assert len([row for row in rows if row["kind"] == "ceiling"]) == 4, "measured once"
    assert len([row for row in rows if row["kind"] == "gemm"]) == 12
    timed = {(row["op"], row["provider"]) for row in rows if row["kind"] == "op" and row["status"] == "ok"}
    graph = ("linear_swiglu", "swiglu_linear_grad", "weight_gradients")
    assert timed == {(op, provider) for op in graph for provider in ("triton", "eager")}
    assert {row["part"] for row in rows if row["kind"] == "tokenizer"} == {"encode"}
    decoded = [row for row in rows if row["kind"] == "images"]
    assert {row["provider"] for row in decoded if row["status"] == "ok"} >= {"pil", "torchvision", "file-per-sample"}
    text = (out / "summary.txt").read_text()
    assert "triton right, cuda right" in text and "x plain-eager" in text and "TFLOP/s mean of 12 products" in text
    assert " limit, " in text and "encode     auto" in text and "== Failures" not in text


def test_the_gate_finds_nothing_in_rows_of_a_cpu(rehearsed):
    with pytest.raises(ValueError, match="rows of one GPU are needed, these are of none"):
        baseline.gpu_of(baseline.rows_of(rehearsed[0] / "rows.jsonl"))
