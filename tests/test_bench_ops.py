"""The driver of `bench.ops` on a CPU: what takes part, what is recorded, when it stops, what a row says."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import kernels
from bench import ops
from bench.baselines import Adapter, Provider
from bench.measure import program, rows, timing
from bench.measure.ceilings import Ceilings
from bench.measure.progress import Ready
from bench.measure.rows import Log
from bench.measure.timing import HostDevice
from bench.measure.work import Reference, Sets
from bench.ops import DirectionJob, OpComparison, OpJob, jobs, parse, plan
from kernels.testing.tolerance import reference

ROOT = Path(__file__).parents[1]
SWIGLU = kernels.OPS["swiglu"]
KEYS = {
    "format",
    "kind",
    "date",
    "device",
    "gpu",
    "capability",
    "driver",
    "python",
    "torch",
    "cuda",
    "triton",
    "revision",
    "run",
    "op",
    "case",
    "dtype",
    "direction",
    "provider",
    "status",
    "reason",
}
FIGURES = {"includes", "version", "clocks", "p20_us", "p50_us", "p80_us", "spread", "samples", "calls", "sets"}
FIGURES |= {
    "coverage",
    "peak_gb",
    "footprint_mb",
    "method",
    "bytes",
    "flops",
    "limit_us",
    "bound",
    "fraction",
    "times_faster_than",
}


class Millisecond(HostDevice):
    """Iterations take a millisecond each, whatever they do."""

    def seconds(self, iteration, count):
        iteration()
        return [0.001] * count


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """SmallCount buffers and short iterations."""
    monkeypatch.setattr(timing, "FOOTPRINT", 20_000)
    monkeypatch.setattr(timing, "ITERATION_BYTES", 60_000)
    monkeypatch.setattr(rows, "revision", lambda: "1234abc")
    rows.machine.cache_clear()
    yield
    rows.machine.cache_clear()


def case_of(op, name: str):
    return next(case for case in op.cases if case.id == name)


def bench(path: Path | None = None, **settings) -> OpComparison:
    """Without our own backends, which have an interpreter at most, and without Inductor."""
    defaults = {"seconds": 0.01, "ceilings": None, "compiler": lambda f: f}
    invited = {"invited": lambda name: name not in ("triton", "cuda")}
    return OpComparison(Millisecond(), Log("cpu", path), **defaults | invited | settings)


def providers(monkeypatch, **runs) -> None:
    """Let these functions take part, and nobody else; one called `load` is the provider's own."""
    everybody = [
        Provider(name, run if run.__name__ == "load" else lambda run=run: Adapter(run)) for name, run in runs.items()
    ]
    monkeypatch.setattr(ops, "providers_for", lambda *_: everybody)


def test_rows_of_a_job(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    job = OpJob(SWIGLU, case_of(SWIGLU, "odd"), torch.float32)
    written = bench(out, invited=lambda name: name in ("eager", "compile", "torch"), directions=ops.DIRECTIONS).run(job)
    assert [json.loads(line) for line in out.read_text().splitlines()] == written == list(rows.read(out, "cpu"))
    assert {(r["direction"], r["provider"]) for r in written} == {
        (direction, name) for direction in ops.DIRECTIONS for name in ("eager", "compile", "torch")
    }
    for row in written:
        assert set(row) == KEYS | FIGURES and row["format"] == 2 and row["status"] == "ok"
        assert (row["op"], row["case"], row["dtype"], row["revision"]) == ("swiglu", "odd", "float32", "1234abc")
        assert set(row["times_faster_than"]) == {"eager", "compile", "torch"} - {row["provider"]}
        assert row["p20_us"] == row["p50_us"] == row["p80_us"] == pytest.approx(1000 / row["calls"])
        assert row["times_faster_than"].get("eager", 1.0) == 1.0
    forward, backward, both = (next(r for r in written if r["direction"] == d) for d in ops.DIRECTIONS)
    assert forward["bytes"] == 4 * 3 * 5 * 37 * 3 and backward["bytes"] == 4 * 3 * 5 * 37 * 5
    assert both["bytes"] == forward["bytes"] + backward["bytes"]
    for row in (forward, backward):
        assert row["footprint_mb"] == row["sets"] * row["bytes"] / 1e6 >= timing.FOOTPRINT / 1e6
        assert row["calls"] * row["bytes"] >= timing.ITERATION_BYTES and row["calls"] > row["sets"] > 1
    assert "swiglu odd float32 forward  eager" in capsys.readouterr().out


def test_forward_modes_are_timed_beside_those_of_torch():
    op = kernels.OPS["swiglu_jvp"]
    names = ("eager", "func-jvp", "func-jvp-compile")
    written = bench(invited=names.__contains__).run(OpJob(op, case_of(op, "odd"), torch.float32))
    assert [(row["direction"], row["provider"], row["status"]) for row in written] == [
        (direction, name, "ok") for direction in ("forward", "backward") for name in names
    ]
    for row in written:
        assert set(row["times_faster_than"]) == set(names) - {row["provider"]}
        assert ("of the reference of swiglu" in row["includes"]) == row["provider"].startswith("func-jvp")


def test_a_row_from_a_cpu_does_not_look_like_one_from_a_gpu(tmp_path):
    out = tmp_path / "rows.jsonl"
    row = bench(out, invited=lambda name: name == "eager").run(OpJob(SWIGLU, case_of(SWIGLU, "odd"), torch.float32))[0]
    assert (row["device"], row["gpu"], row["driver"], row["fraction"], row["clocks"]) == ("cpu", None, None, None, {})
    assert list(rows.read(out)) == []


def test_fraction_of_the_limit():
    ceilings = Ceilings(1e9, {torch.float32: 1e12})
    job = OpJob(SWIGLU, case_of(SWIGLU, "odd"), torch.float32)
    row = bench(ceilings=ceilings, invited=lambda name: name == "eager").run(job)[0]
    assert row["bound"] == "memory" and row["limit_us"] == pytest.approx(row["bytes"] / 1e3)
    assert row["fraction"] == pytest.approx(row["limit_us"] / row["p50_us"])
    assert f"{row['fraction']:.1%} of the memory limit" in bench().text(row)


def test_figures_of_a_provider():
    job = OpJob(SWIGLU, case_of(SWIGLU, "odd"), torch.float16)
    backward = DirectionJob(job, "backward", None, {}, moved=8_000_000, flops=4_000_000_000)
    ready = Ready({}, early={"": timing.Timing(2, "graph", [2e-6, 4e-6, 6e-6])})
    got = bench(ceilings=Ceilings(4e12, {torch.float16: 1e15})).figures(backward, ready)
    assert (got["limit_us"], got["bound"], got["fraction"]) == (pytest.approx(4.0), "compute", pytest.approx(1.0))
    assert (got["bytes"], got["flops"]) == (8_000_000, 4_000_000_000)


def test_incorrect_failing_and_missing_providers_are_recorded_and_the_rest_is_timed(monkeypatch):
    def wrong(gate_up, *, bias=None):
        return torch.sigmoid(gate_up.chunk(2, -1)[0]) * gate_up.chunk(2, -1)[1]

    def wrong_backward(gate_up, *, bias=None):
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up.detach() + 0 * up

    def breaks(gate_up, *, bias=None):
        raise RuntimeError("out of shared memory\nand more")

    runs = iter(range(1, 100))

    def breaks_later(gate_up, *, bias=None):
        if next(runs) > 30:
            raise RuntimeError("illegal address")
        return reference(SWIGLU)(gate_up)

    def load():
        raise ImportError("No module named 'fast'")

    providers(
        monkeypatch,
        wrong=wrong,
        wrong_backward=wrong_backward,
        breaks=breaks,
        breaks_later=breaks_later,
        missing=load,
        right=reference(SWIGLU),
    )
    written = bench().run(OpJob(SWIGLU, case_of(SWIGLU, "odd"), torch.float32))
    status = {(r["direction"], r["provider"]): (r["status"], r["reason"]) for r in written}
    assert status[None, "missing"] == ("unavailable", "not installed: No module named 'fast'")
    assert status["forward", "wrong"][0] == "incorrect" and "result 0: error" in status["forward", "wrong"][1]
    assert status["backward", "wrong"][0] == "incorrect"
    assert status["forward", "wrong_backward"] == ("ok", "")
    assert status["backward", "wrong_backward"][0] == "incorrect"
    assert status["forward", "breaks"] == ("failed", "RuntimeError: out of shared memory\nand more")
    assert status["forward", "breaks_later"] == ("failed", "RuntimeError: illegal address")
    assert status["forward", "right"] == status["backward", "right"] == ("ok", "")
    assert all("p50_us" not in row for row in written if row["status"] != "ok"), "no number without correctness"
    assert [row["times_faster_than"].keys() for row in written if row["provider"] == "right"] == [
        {"wrong_backward"},
        set(),
    ]


def test_a_job_that_fails_as_a_whole_is_a_row(monkeypatch):
    monkeypatch.setattr(ops, "Reference", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory")))
    (row,) = bench().run(OpJob(SWIGLU, case_of(SWIGLU, "odd"), torch.float32))
    assert (row["provider"], row["status"], row["reason"]) == ("all", "failed", "OutOfMemoryError: no memory")
    assert bench().alarming(row)


@pytest.mark.parametrize("name", ["swiglu", "adamw_ema_"])
def test_our_backend_takes_part(name, monkeypatch):
    """In Triton's interpreter, when the tests' process runs it."""
    monkeypatch.setattr(timing, "FOOTPRINT", 0)
    monkeypatch.setattr(timing, "ITERATION_BYTES", 0)
    op = kernels.OPS[name]
    if "triton" not in op.backends or op.reasons("triton"):
        pytest.skip("no Triton backend here")
    case = next(case for case in op.cases if not case.production)
    invited = ("eager", "triton")
    written = bench(invited=invited.__contains__, emulated=True, seconds=0.0).run(OpJob(op, case, torch.float32))
    assert {row["provider"] for row in written if row["status"] == "ok"} == set(invited), written
    if op.backend("triton").emulated:
        refused = bench(invited=invited.__contains__).run(OpJob(op, case, torch.float32))
        assert [r["reason"] for r in refused if r["provider"] == "triton"] == ["it would run in an emulator"]


def test_iterations_call_the_sets_in_turn_and_keep_the_results():
    expected = Reference(SWIGLU, case_of(SWIGLU, "odd").inputs(torch.float32))
    seen = []

    def run(gate_up, *, bias=None):
        seen.append(gate_up.data_ptr())
        return reference(SWIGLU)(gate_up)

    iteration = Sets(expected, 3, 7).iteration(Provider("one", None), Adapter(run), "forward", HostDevice())
    seen.clear()
    results = iteration.run()
    assert iteration.calls == len(seen) == len(results) == 7 and len(set(seen)) == 3
    assert all(seen[i] == seen[i - 3] for i in range(3, 7)), "in turn"
    assert len({result["result 0"].data_ptr() for result in results}) == 7
    assert not any(result["result 0"].requires_grad for result in results)


def test_backward_iterations_repeat_without_a_new_forward_pass():
    expected, runs = Reference(SWIGLU, case_of(SWIGLU, "odd").inputs(torch.float32)), []
    adapter = Adapter(lambda gate_up, *, bias=None: runs.append(1) or reference(SWIGLU)(gate_up))
    iteration = Sets(expected, 2, 5).iteration(Provider("one", None), adapter, "backward", HostDevice())
    before = len(runs)
    first, second = iteration.run(), iteration.run()
    assert len(runs) == before == 2
    assert all(torch.equal(a, b) for one, two in zip(first, second, strict=True) for a, b in zip(one, two, strict=True))


def test_what_providers_overwrite_is_their_own_and_put_back():
    op = kernels.OPS["adamw_ema_"]
    inputs = case_of(op, "late").inputs(torch.float32)
    before = {name: value.clone() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    iteration = Sets(Reference(op, inputs), 2, 4).iteration(
        Provider("one", None), Adapter(reference(op)), "forward", HostDevice()
    )
    iteration.run()
    assert all(torch.equal(inputs[name], value) for name, value in before.items())
    seen = []
    spy = Adapter(lambda **given: seen.append(given["param"].clone()) or reference(op)(**given))
    iteration = Sets(Reference(op, inputs), 1, 1).iteration(Provider("one", None), spy, "forward", HostDevice())
    iteration.run()
    iteration.restore()
    iteration.run()
    assert not torch.equal(seen[-2], before["param"]) and torch.equal(seen[-1], before["param"])


def test_gradients_that_overwrite_saved_tensors_are_put_back_too(monkeypatch):
    """Liger's backward pass does that."""
    from tests import stand_ins

    stand_ins.install(monkeypatch, stand_ins.LIGER)
    liger = next(c for c in ops.providers_for(SWIGLU) if c.name == "liger")
    expected = Reference(SWIGLU, case_of(SWIGLU, "odd").inputs(torch.float32))
    iteration = Sets(expected, 1, 1).iteration(liger, liger.load(), "backward", HostDevice())
    iteration.restore()
    ((first, _),) = iteration.run()
    first = first.clone()
    ((drifted, _),) = iteration.run()
    assert not torch.equal(first, drifted)
    iteration.restore()
    ((again, _),) = iteration.run()
    assert torch.equal(first, again)


# The plan


def test_the_representative_case_comes_first():
    todo = jobs(kernels.OPS.values())
    assert [job.rank for job in todo] == sorted(job.rank for job in todo)
    first = [job for job in todo if job.rank == 0]
    assert {(job.op.name, job.case.id) for job in first} >= {
        ("gated_residual_adaln_rms_norm", "XL"),
        ("rope_attention", "XL"),
        ("swiglu", "XL"),
        ("vf_loss", "dinov2_large"),
        ("adamw_ema_", "XL_eighth"),
    }
    assert len(first) == len(kernels.OPS) and {job.dtype for job in first} == {torch.bfloat16}
    assert len(todo) == len(set(map(str, todo))) > 60 and all(job.case.production for job in todo)


def test_the_representative_case_is_the_headline_models_or_else_the_first():
    found = {name: ops.representative(op) for name, op in kernels.OPS.items()}
    assert all(case_of(kernels.OPS[name], case).production for name, case in found.items())
    want = {"swiglu": "XL", "vf_loss": "dinov2_large", "group_norm_silu": "f16_256", "adamw_ema_": "XL_eighth"}
    assert {name: found[name] for name in want} == want


def test_options_choose():
    quick, rest = (list(map(str, plan(parse([flag])))) for flag in ("--quick", "--after-quick"))
    assert len(quick) == len(kernels.OPS) and sorted(quick + rest) == sorted(map(str, plan(parse([]))))
    chosen = plan(parse(["swiglu", "adaln_rms_norm", "--case", "XL", "--dtype", "float32", "--dtype", "bfloat16"]))
    assert list(map(str, chosen)) == [
        "swiglu XL bfloat16",
        "adaln_rms_norm XL bfloat16",
        "swiglu XL float32",
        "adaln_rms_norm XL float32",
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["swigl"], "no op is called 'swigl'"),
        (["--case", "XXL"], "no case is called 'XXL'"),
        (["--dtype", "float64"], "invalid choice"),
    ],
)
def test_unknown_names_are_refused(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(argv)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("provider", "status", "alarming"),
    [
        ("triton", "ok", 0),
        ("triton", "incorrect", 1),
        ("triton", "failed", 1),
        ("triton", "unavailable", 0),
        ("triton", "unsupported", 0),
        ("liger", "incorrect", 0),
        ("cuda", "failed", 1),
        ("all", "failed", 1),
    ],
)
def test_exit_status(provider, status, alarming):
    assert bench().alarming({"op": "swiglu", "provider": provider, "status": status}) == alarming


def test_without_a_gpu_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert ops.main(["--quick"]) == 2
    assert "needs a GPU" in capsys.readouterr().err


def test_options_reach_the_comparison(monkeypatch):
    seen = []
    monkeypatch.setattr(program, "run", lambda module, options, make, todo: seen.append((make(None, None, None), todo)))
    ops.main(["swiglu", "--quick", "--direction", "both", "--without", "liger", "--seconds", "2"])
    ((made, todo),) = seen
    assert made.directions == ("both",) and made.invited("eager") and not made.invited("liger")
    assert list(map(str, todo)) == ["swiglu XL bfloat16"]


# Rows


def test_of_one_run_the_last_row_of_a_name_counts(tmp_path):
    out = tmp_path / "rows.jsonl"
    first, second = Log("cpu", out), Log("cpu", out)
    for log, variant, rate in ((first, "a", 1), (first, "b", 2), (second, "a", 3), (first, "a", 4), (second, "a", 5)):
        log.write({"kind": "step", "model": "XL", "batch": 1, "variant": variant, "rate": rate})
    first.write({"kind": "step", "model": "XL", "batch": 2, "variant": "a", "rate": 6})
    for rate in (7, 7):
        first.write({"kind": "other", "rate": rate})
    old = {"format": 2, "kind": "step", "device": "cpu"}  # of before there were runs: so many measurements
    with out.open("a") as file:
        file.writelines(json.dumps(old | {"rate": rate}) + "\n" for rate in (8, 9))
    assert [row["rate"] for row in rows.read(out, "cpu")] == [2, 4, 5, 6, 7, 8, 9]


def test_a_run_cut_off_leaves_whole_rows(tmp_path):
    out = tmp_path / "rows.jsonl"
    log = Log("cpu", out)
    for number in range(3):
        log.write({"kind": "other", "number": number})
        assert len(list(rows.read(out, "cpu"))) == number + 1
    assert [row["number"] for row in rows.read(out, "cpu")] == [0, 1, 2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", ""),
        ("[1]", "it has no format and kind"),
        ("{}", "it has no"),
        ('{"format": 99, "kind": "op"}', "row format 99, this version reads 2"),
        ('{"format": 2, "kind": "op", "run": "a"}', "'op'"),
    ],
)
def test_lines_that_are_no_rows_are_refused(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"format": 2, "kind": "other", "device": "cuda"}\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"rows.jsonl, line 2: not a row \({message}"):
        list(rows.read(path))


def test_revision(tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("GIT_REVISION", "feedbeef")
    assert rows.revision() == "feedbeef"
    monkeypatch.delenv("GIT_REVISION")
    assert rows.revision(tmp_path) == "unknown"
    for command in (["init", "-q"], ["-c", "user.name=a", "-c", "user.email=b", "commit", "-qm", "c", "--allow-empty"]):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    clean = rows.revision(tmp_path)
    assert len(clean) == 40
    (tmp_path / "file").write_text("new")
    subprocess.run(["git", "-C", tmp_path, "add", "file"], check=True)
    assert rows.revision(tmp_path) == f"{clean}-dirty"


def test_what_the_driver_does_not_tell_is_left_out(monkeypatch):
    monkeypatch.setattr(rows, "_nvidia_smi", lambda *_: ["1980", "[N/A]", None, "54"])
    assert rows.clocks() == {"sm_mhz": 1980.0, "celsius": 54.0}


def test_nothing_in_bench_imports_the_tests():
    sources = [*(ROOT / "bench").rglob("*.py")]
    assert len(sources) > 8
    assert not [str(path) for path in sources if "import tests" in path.read_text() or "from tests" in path.read_text()]


def test_help_says_what_is_measured(capsys):
    with pytest.raises(SystemExit) as stopped:
        ops.main(["--help"])
    assert stopped.value.code == 0 and "No number without correctness" in capsys.readouterr().out
