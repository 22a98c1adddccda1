"""Every Triton kernel at its production shapes, compiled for sm_90 and sm_80 on a machine without a GPU."""

import json
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

import kernels
from tests.ahead_of_time import architectures

ROOT = Path(__file__).parents[1]
OPS = [name for name, op in kernels.OPS.items() if "triton" in op.backends]


@pytest.fixture(scope="module")
def reports(request) -> dict[str, Future]:
    """Op name → the rows of `tests.ahead_of_time`, two ops at a time, of those whose test was selected."""
    selected = [item.callspec.params["name"] for item in request.session.items if item.path == request.path]
    pool = ThreadPoolExecutor(max_workers=2)
    return {name: pool.submit(rows, name) for name in selected}


def rows(op: str) -> list[dict]:
    command = [sys.executable, "-m", "tests.ahead_of_time", op]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-4000:]
    return [json.loads(line) for line in process.stdout.splitlines()]


@pytest.mark.parametrize("name", OPS)
def test_kernels_stay_within_their_limits(name, reports):
    found, limits = reports[name].result(), kernels.OPS[name].expectations.triton
    assert {row["architecture"] for row in found} == set(architectures(kernels.OPS[name].backend("triton")))
    for row in found:
        limit, where = limits.get(row["kernel"]), f"{row}"
        assert limit is not None, f"no limits for {where}"
        assert row["registers"] <= limit.registers and row["shared"] <= limit.shared_bytes, f"{limit} but {where}"
        assert row["stack"] <= (limit.float32_spills if row["dtype"] == "float32" else 0), f"spills: {where}"
        aligned = limit.loads_128_bits and row["case"] not in limit.unaligned_cases
        assert not aligned or "128" in row["load_bits"], f"no 128-bit load: {where}"
        if limit.wgmma and row["architecture"] == 90 and row["dtype"] != "float32":
            assert row["wgmma"], f"no wgmma: {where}"
    assert {row["kernel"] for row in found} == set(limits), "every limit belongs to a kernel"
