"""The clock with a scripted device: what counts, in which order, over how many buffers."""

from pathlib import Path

import pytest
import torch

from bench import roofline
from bench.measure import ceilings, timing
from bench.measure.ceilings import Ceilings
from bench.measure.rows import Log, read
from bench.measure.timing import HostDevice, Iteration, Timing, interleave, iteration_size
from common.data_sheets import SHEETS


class Scripted:
    """A device whose iterations take the seconds that their own script says, over and over; it notes who ran."""

    kind = "cpu"
    l2_bytes = 0

    def __init__(self, **scripts: list[float]):
        self.scripts, self.ran, self.rounds = scripts, [], []

    def iteration(self, name: str, **settings) -> Iteration:
        return Iteration(lambda: self.ran.append(name), **settings)

    def seconds(self, iteration, count):
        found = []
        for _ in range(count):
            iteration()
            script = self.scripts[self.ran[-1]]
            found.append(script[(self.ran.count(self.ran[-1]) - 1) % len(script)])
        self.rounds.append((self.ran[-1], count))
        return found


def test_quantiles_and_spread():
    measured = Timing(1, "graph", [float(n) for n in range(1, 12)])
    assert (measured.quantile(0.2), measured.median, measured.quantile(0.8)) == (3, 6, 9)
    assert measured.spread == 1.0


def test_a_sample_is_an_iteration_over_its_calls():
    device = Scripted(a=[0.012])
    got = interleave({"a": device.iteration("a", calls=4, method="graph")}, device, seconds=0.1, rounds=2)["a"]
    assert set(got.samples) == {0.003} and (got.calls, got.method) == (4, "graph")


def test_providers_alternate_and_each_round_begins_with_another():
    device = Scripted(a=[0.01], b=[0.02], c=[0.04])
    interleave({name: device.iteration(name) for name in "abc"}, device, seconds=0.12, rounds=3)
    rounds = device.rounds[-9:]
    assert "".join(name for name, _ in rounds) == "abc" + "bca" + "cab"
    # Equal time for each, 0.04 s in a round, and one iteration more that does not count.
    assert {name: count for name, count in rounds} == {"a": 5, "b": 3, "c": 2}


def test_warm_up_and_the_first_iteration_of_a_round_do_not_count():
    # A round of three: one of 9 s that is dropped, two that count. Before them two to estimate, 20 to warm up.
    device = Scripted(a=[9.0, 0.01] + [9.0] * 20 + [9.0, 1.0, 2.0])
    device.scripts["a"] += [9.0, 3.0, 4.0]
    got = interleave({"a": device.iteration("a")}, device, seconds=0.04, rounds=2)["a"]
    assert device.rounds == [("a", 2), ("a", 20), ("a", 3), ("a", 3)]
    assert got.samples == [1.0, 2.0, 3.0, 4.0]


def test_an_iteration_that_fails_is_named():
    device = Scripted(a=[0.01], b=[0.01])
    iterations = {"a": device.iteration("a"), "b": Iteration(lambda: 1 / 0)}
    with pytest.raises(timing.IterationFailed) as failed:
        interleave(iterations, device, seconds=0.01)
    assert failed.value.name == "b" and isinstance(failed.value.__cause__, ZeroDivisionError)
    assert interleave({}, device, seconds=0.01) == {}


def test_what_is_overwritten_is_put_back_before_every_round():
    device, order = Scripted(a=[0.01]), []
    iteration = Iteration(
        lambda: (order.append("run"), device.ran.append("a")), restore=lambda: order.append("restore")
    )
    interleave({"a": iteration}, device, seconds=0.03, rounds=2)
    assert order[0] == "restore" and order.count("restore") == 3
    assert order[-3:] == ["restore", "run", "run"], "one iteration to drop, one that counts"


@pytest.mark.parametrize(
    ("call", "l2", "sets", "calls"),
    [
        (4_000_000_000, 0, 1, 1),
        (1_000_000_000, 0, 1, 3),  # a call that leaves any L2 behind by itself
        (100_000_000, 0, 3, 30),
        (100_000_000, 50_000_000, 3, 30),  # H100: 5 × 50 MB is less than 300 MB
        (100_000_000, 126_000_000, 7, 30),  # B200: 630 MB
        (1_000_000, 0, 300, timing.MOST_CALLS),
        (1000, 0, timing.MOST_CALLS, timing.MOST_CALLS),
        (0, 0, timing.MOST_CALLS, timing.MOST_CALLS),
    ],
)
def test_buffers_exceed_the_l2_and_iterations_a_millisecond(call, l2, sets, calls):
    assert iteration_size(call, l2) == (sets, calls)
    if sets < timing.MOST_CALLS:
        assert sets * call >= max(150_000_000, 2 * l2)
    if calls < timing.MOST_CALLS:
        assert calls * call / 4.3e12 >= 0.0006, "seconds at the bandwidth of an H200"


def test_the_hosts_clock():
    calls = []
    device = HostDevice()
    run, method = device.replayable(lambda: calls.append(1))
    assert len(device.seconds(run, 3)) == 3 and min(device.seconds(run, 3)) >= 0
    assert (method, len(calls)) == ("host clock", 7)


# Roofline


def test_limits_and_what_binds():
    known = Ceilings(4e12, {torch.bfloat16: 800e12, torch.float32: 50e12})
    assert known.limit(4_000_000, 0, torch.bfloat16) == (1e-6, "memory")
    assert known.limit(4_000_000, 1_600_000_000, torch.bfloat16) == (2e-6, "compute")
    assert known.limit(4_000_000, 400_000_000, torch.bfloat16) == (1e-6, "memory")
    assert known.limit(4_000_000, 400_000_000, torch.float32) == (8e-6, "compute")


def test_data_sheets_name_their_sources():
    assert len(SHEETS) == 5
    for name, sheet in SHEETS.items():
        assert "data sheet" in sheet.source or "Technical Brief" in sheet.source, name
        assert 100e12 < sheet.bfloat16 < 3000e12 and 1e12 < sheet.bandwidth < 10e12
        assert sheet.float8 is None or sheet.float8 == pytest.approx(2 * sheet.bfloat16, rel=0.01)


@pytest.mark.parametrize(
    "name, bfloat16, float8, bandwidth",
    [  # TFLOP/s dense and GB/s, as the vendor's data sheets print them
        ("NVIDIA A100-SXM4-80GB", 312, None, 2039),
        ("NVIDIA H100 80GB HBM3", 989, 1979, 3350),
        ("NVIDIA H800", 989, 1979, 3350),
        ("NVIDIA H200", 989, 1979, 4800),
        ("NVIDIA B200", 2250, 4500, 8000),
    ],
)
def test_data_sheets_state_what_the_vendor_states(name, bfloat16, float8, bandwidth):
    sheet = SHEETS[name]
    assert (sheet.bfloat16, sheet.bandwidth) == (bfloat16 * 1e12, pytest.approx(bandwidth * 1e9))
    assert sheet.float8 == (None if float8 is None else float8 * 1e12)
    printed = sheet.source.replace(",", "")  # the sheet's own words carry the same bandwidth, but for a twin's
    assert f"{bandwidth / 1000:g} TB/s" in printed or f"{bandwidth} GB/s" in printed or "the H100's" in printed


def test_ceilings_are_rates_of_what_was_moved_and_multiplied(tmp_path):
    """With an iteration of 1 ms: 2 × 4 KB copied, 2 · 16³ FLOPs."""

    class Slow(HostDevice):
        def seconds(self, iteration, count):
            iteration()
            return [0.001] * count

    found = ceilings.measure(Slow(), Log("cpu", tmp_path / "rows.jsonl"), seconds=0.01, size=16, copied=4096)
    rows = list(read(tmp_path / "rows.jsonl", "cpu"))
    assert found.bandwidth == pytest.approx(8192 / 0.001)
    assert found.matmul == dict.fromkeys(
        (torch.bfloat16, torch.float16, torch.float32), pytest.approx(2 * 16**3 / 0.001)
    )
    assert [row["ceiling"] for row in rows] == ["copy", "matmul bfloat16", "matmul float16", "matmul float32"]
    assert all(row["sheet"] is None for row in rows), "a CPU has no sheet here"


def ceiling_rows(path, *names: str, **changes) -> Path:
    log = Log("cpu", path)
    for number, name in enumerate(names, 1):
        log.write({"kind": "ceiling", "ceiling": name, "rate": float(number)} | changes)
    return path


CEILINGS = ("copy", "matmul bfloat16", "matmul float16", "matmul float32")


def test_ceilings_of_a_file_are_what_was_measured(tmp_path):
    path, log = tmp_path / "ceilings.jsonl", Log("cpu", tmp_path / "ceilings.jsonl")
    log.write({"kind": "other"})
    measured = ceilings.measure(HostDevice(), log, seconds=0.01, size=16, copied=4096)
    found = ceilings.read_ceilings(path, "cpu")
    assert found.bandwidth == pytest.approx(measured.bandwidth) and found.matmul == pytest.approx(measured.matmul)


def test_ceilings_of_a_file_are_refused_by_name(tmp_path):
    some = ceiling_rows(tmp_path / "some.jsonl", *CEILINGS[:2])
    with pytest.raises(ValueError, match=r"some.jsonl lacks ceilings: matmul float16, matmul float32; python -m bench"):
        ceilings.read_ceilings(some, "cpu")
    with pytest.raises(ValueError, match=r"some.jsonl lacks ceilings: copy, .*"):
        ceilings.read_ceilings(some, "cuda")  # rows of a CPU say nothing of a GPU
    other = ceiling_rows(tmp_path / "other.jsonl", *CEILINGS, gpu="NVIDIA H200")
    with pytest.raises(ValueError, match=r"other.jsonl has ceilings of NVIDIA H200; this GPU is None"):
        ceilings.read_ceilings(other, "cpu")
    (tmp_path / "no.jsonl").write_text("copy 3 TB/s\n")
    with pytest.raises(ValueError, match=r"no.jsonl, line 1: not a row"):
        ceilings.read_ceilings(tmp_path / "no.jsonl", "cpu")


ROW = {"kind": "ceiling", "ceiling": "copy", "rate": 3.0, "unit": "TB/s", "spread": 0.0, "sheet": None}


def test_roofline_measures_as_long_as_it_is_told(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(roofline, "cuda_reasons", list)
    monkeypatch.setattr(roofline, "CudaDevice", HostDevice)
    monkeypatch.setattr(roofline, "op_costs", lambda: ())
    monkeypatch.setattr(ceilings, "measure", lambda device, log, seconds: asked.append((log.write(ROW), seconds)))
    assert roofline.main(["--seconds", "0.25", "--out", str(tmp_path / "rows.jsonl")]) == 0 and asked[0][1] == 0.25
    assert [row["rate"] for row in read(tmp_path / "rows.jsonl", "cpu")] == [3.0]
    assert ceilings.text(ROW) == "copy                 3.00 TB/s (spread 0.0%)"


def test_model_and_optimizer_costs():
    forward, training = roofline.model_flops()
    assert (round(forward / 1e9, 2), round(training / 1e9, 2)) == (237.25, 711.76)
    assert roofline.optimizer_bytes_per_parameter() == 38


@pytest.mark.parametrize(
    ("op", "case", "tokens", "width", "forward", "backward"),
    [  # elements of bfloat16 for each token in units of the width
        ("adaln_rms_norm", "XL", 32768, 1152, 2, 3),
        ("gated_residual_adaln_rms_norm", "XL", 32768, 1152, 4, 6),
        ("swiglu", "XL", 32768, 3072, 3, 5),
        ("rope_attention", "XL", 32768, 1152, 4, 8),
        ("group_norm_silu", "f16_32", 8 * 32 * 32, 256, 2, 3),
    ],
)
def test_bytes_of_ops_per_token(op, case, tokens, width, forward, backward):
    cost = {(name, case): cost for name, case, cost in roofline.op_costs()}[op, case]
    assert cost.forward_bytes / (2 * tokens * width) == pytest.approx(forward, rel=0.02)
    assert cost.backward_bytes / (2 * tokens * width) == pytest.approx(backward, rel=0.02)


def test_roofline_prints_the_table_without_a_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert roofline.main([]) == 0
    printed = capsys.readouterr().out
    assert "NVIDIA H200" in printed and "711.76" in printed and "ceilings not measured: no CUDA device" in printed
