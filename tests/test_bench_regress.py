"""The gate on planted rows: findings, measurements again, updates; and two revisions of a small repository."""

import json
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from bench import ops, regress
from bench import sampling as bench_sampling
from bench import step as bench_step
from bench import tokenizer as bench_tokenizer
from bench.gate import baseline, compare
from bench.gate.compare import NotMeasured
from bench.measure import program
from bench.measure.rows import FORMAT, read

GPU = "NVIDIA H200"
MACHINE = {
    "format": FORMAT,
    "date": "2026-01-01T00:00:00+00:00",
    "device": "cuda",
    "gpu": GPU,
    "capability": "9.0",
    "driver": "580.1",
    "python": "3.12",
    "torch": "2.11.0",
    "cuda": "13.0",
    "triton": "3.6.0",
    "revision": "abc",
}


def op(fraction: float | None = 0.9, *, status: str = "ok", spread: float = 0.01, **names) -> dict:
    row = {
        "kind": "op",
        "op": "swiglu",
        "case": "XL",
        "dtype": "bfloat16",
        "direction": "forward",
        "provider": "triton",
        "status": status,
        "reason": "" if status == "ok" else "because",
    }
    return MACHINE | row | ({"fraction": fraction, "spread": spread} if status == "ok" else {}) | names


def step(fraction: float = 0.6, *, variant: str = "trainer", engine: str = "trainer", spread: float = 0.005) -> dict:
    return MACHINE | {
        "kind": "step",
        "model": "LightningDiT-XL/1",
        "batch": 128,
        "variant": variant,
        "status": "ok",
        "features": {"engine": engine},
        "reason": "",
        "fraction": fraction,
        "spread": spread,
    }


def sampling(fraction: float = 0.5, *, provider: str = "auto", ours: bool = True, spread: float = 0.01) -> dict:
    return MACHINE | {
        "kind": "sampling",
        "model": "LightningDiT-XL/1",
        "batch": 64,
        "precision": "bfloat16",
        "provider": provider,
        "ours": ours,
        "status": "ok",
        "reason": "",
        "fraction": fraction,
        "spread": spread,
    }


def tokenizer(fraction: float = 0.4, *, provider: str = "auto", ours: bool = True, spread: float = 0.01) -> dict:
    return sampling(fraction, provider=provider, ours=ours, spread=spread) | {"kind": "tokenizer", "part": "encode"}


def write(path: Path, rows: Iterable[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Bench:
    """Stands for measuring again: answers with these fractions in turn, and keeps what it was asked."""

    def __init__(self, *fractions: float):
        self.fractions, self.asked = list(fractions), []

    def __call__(self, row: dict) -> list[dict]:
        self.asked.append(row)
        if not self.fractions:
            raise NotMeasured("no GPU")
        return [row | {"fraction": self.fractions.pop(0), "spread": 0.01}]


def verdicts(before: list[dict], after: list[dict], again=None, partial=()) -> list[str]:
    return [finding.verdict for finding in compare.compare(before, after, again or Bench(), partial)]


@pytest.mark.parametrize(("make", "tolerance"), [(op, 0.05), (step, 0.03), (sampling, 0.03), (tokenizer, 0.03)])
def test_a_loss_beyond_the_tolerance_is_called_after_two_more_measurements(make, tolerance):
    before = make(0.8)
    for change, verdict, measurements in ((-0.01, "fell", 2), (0.005, "unchanged", 0), (0.11, "improved", 0)):
        fraction = 0.8 * (1 - tolerance + change)
        bench = Bench(fraction, fraction)
        assert verdicts([before], [make(fraction)], bench) == [verdict]
        assert len(bench.asked) == measurements


def test_six_percent_of_one_op_fails_and_two_percent_does_not():
    others = [op(0.8, case="1p6B"), op(0.7, direction="backward")]
    assert verdicts([op(), *others], [op(0.9 * 0.98), *others]) == ["unchanged"] * 3
    findings = compare.compare([op(), *others], [op(0.9 * 0.94), *others], Bench(0.9 * 0.94, 0.9 * 0.94))
    assert [f.verdict for f in findings] == ["fell", "unchanged", "unchanged"]
    line = compare.text(findings[0])
    assert "swiglu XL bfloat16 forward triton" in line and "90.0% →   84.6%   -6.0%  median of 3 runs" in line


def test_a_loss_that_is_not_repeated_is_no_finding():
    bench = Bench(0.9, 0.89)
    findings = compare.compare([op()], [op(0.8)], bench)
    assert [f.verdict for f in findings] == ["unchanged"] and findings[0].after == 0.89
    assert bench.asked == [op(0.8)] * 2


def test_a_noisy_row_is_measured_again_though_its_median_is_as_before():
    bench = Bench(0.8, 0.81)
    assert verdicts([op()], [op(0.9, spread=0.06)], bench) == ["fell"], "the median of all three counts"
    assert len(bench.asked) == 2
    bench = Bench(0.9, 0.9)
    assert verdicts([op()], [op(0.9, spread=0.049)], bench) == ["unchanged"] and not bench.asked
    bench = Bench(0.9, 0.9)
    assert verdicts([op(0.85), op(0.95)], [op(0.9)], bench) == ["unchanged"], "a baseline that drifts is noise too"
    assert len(bench.asked) == 2


def test_the_most_suspect_is_measured_again_first():
    cases = [op(case=case) for case in ("XL", "1p6B", "L_bias")]
    after = [op(0.9, case="XL", spread=0.2), op(0.8, case="1p6B"), op(0.7, case="L_bias")]
    bench = Bench(0.7, 0.7)
    assert [f.note[:6] for f in compare.compare(cases, after, bench)] == ["median", "not me", "not me"]
    assert {row["case"] for row in bench.asked[:2]} == {"L_bias"}


def test_a_row_that_cannot_be_measured_again_is_reported_with_the_reason():
    (finding,) = compare.compare([op()], [op(0.8)], Bench())
    assert finding.verdict == "fell" and finding.note == "not measured again: no GPU"
    assert verdicts([op()], [op(0.9, spread=0.2)], Bench()) == ["unchanged"]


@pytest.mark.parametrize("status", ["incorrect", "failed"])
def test_a_row_that_turned_wrong_fails_without_further_measurements(status):
    bench = Bench(0.9, 0.9)
    assert verdicts([op()], [op(status=status)], bench) == ["broken"] and not bench.asked
    assert verdicts([op()], [op(status=status, direction=None)]) == ["broken"], "all directions at once"
    assert verdicts([op()], [op(status=status, direction=None, provider="all")]) == ["broken"]
    assert verdicts([op()], [op(), op(status=status)]) == ["broken"], "once is enough"
    assert verdicts([], [op(status=status)]) == ["broken"], "not in the baseline yet"
    assert verdicts([op(status=status)], [op(status=status)]) == ["unchanged"], "known before"


def test_a_suspect_that_turns_out_wrong_is_broken():
    def again(row):
        return [op(status="incorrect")]

    assert verdicts([op()], [op(0.5)], again) == ["broken"]


def test_a_missing_row_needs_a_reason():
    other = op(0.8, case="1p6B")
    assert verdicts([op(), other], [other]) == ["missing", "unchanged"]
    assert verdicts([op(), other], [other], partial=["op"]) == ["left out", "unchanged"]
    assert verdicts([op(), other], [other], partial=["step"]) == ["missing", "unchanged"]
    (finding,) = compare.compare([op()], [op(status="unavailable", direction=None)], Bench())
    assert finding.verdict == "left out" and finding.note == "unavailable: because" and not finding.failure


def test_peers_are_not_checked():
    before = [op(provider="eager"), op(provider="flash-attn"), step(variant="plain-eager", engine="plain")]
    assert verdicts(before, [op(0.1, provider="eager")]) == []
    assert verdicts(before, [op(provider="cuda")]) == ["new"]
    peers = [
        sampling(provider="plain-eager", ours=False),
        tokenizer(provider="reference", ours=False),
        MACHINE
        | {
            "kind": "gemm",
            "ours": False,
            "status": "ok",
            "fraction": 0.9,
            "model": "x",
            "batch": 1,
            "layer": "qkv",
            "direction": "wgrad",
            "provider": "torch",
        },
    ]
    assert verdicts(peers, []) == [] and verdicts([*peers, sampling()], []) == ["missing"]
    assert verdicts([sampling(), tokenizer()], [], partial=["sampling", "tokenizer"]) == ["left out"] * 2


def test_the_row_in_the_middle():
    rows = [op(f) for f in (0.9, 0.7, 0.8, 0.6)]
    assert compare.typical(rows) == rows[1], "an even number: the lower one, as it was measured"
    assert compare.typical([*rows, op(status="failed")])["status"] == "failed"
    ceilings = [{"kind": "ceiling", "ceiling": "copy", "rate": rate} for rate in (4.3, 4.1, 4.2)]
    assert compare.typical(ceilings)["rate"] == 4.2


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Runs the program on rows, with a folder of its own for the committed ones."""
    results = tmp_path / "results"
    monkeypatch.setattr(baseline, "RESULTS", results)

    def run(rows: Iterable[dict], *arguments: str) -> int:
        return regress.main([str(write(tmp_path / "rows.jsonl", rows)), *arguments])

    run.baseline = results / "nvidia-h200.jsonl"
    return run


def test_without_a_baseline_it_says_so(files, capsys):
    assert files([op()]) == 2
    assert f"no baseline for {GPU}" in capsys.readouterr().out and not files.baseline.exists()


def test_exit_statuses_and_the_table(files, capsys):
    assert files([op(), step()], "--update", "--reason", "first rows") == 0
    assert files([op(), step()]) == 0
    capsys.readouterr()
    assert files([op(), step(0.6 * 0.96) | {"triton": "3.7.0"}]) == 1
    printed = capsys.readouterr().out
    assert "fell       step      LightningDiT-XL/1 128 trainer" in printed and "not measured again" in printed
    assert "triton: 3.6.0 in the baseline, 3.6.0, 3.7.0" in printed.replace("3.7.0, 3.6.0", "3.6.0, 3.7.0")
    assert "rows of ours: 1 fell, 1 unchanged" in printed and "swiglu" not in printed
    assert files([step()]) == 1 and files([step()], "--partial", "op") == 0
    assert files([op(0.99), step()]) == 0 and "improved" in capsys.readouterr().out


def test_an_update_records_reason_revision_machine_and_versions(files, capsys):
    rows = [op(), op(provider="eager"), MACHINE | {"kind": "ceiling", "ceiling": "copy", "rate": 4.3}]
    files(rows, "--update", "--reason", "first rows")
    newer = {"revision": "def", "torch": "2.12.0"}
    slower = [op(0.7) | newer, op(0.72) | newer, op(0.74) | newer]
    assert files(slower, "--update", "--reason", "slower, but right") == 0
    written = list(read(files.baseline))
    assert [row["kind"] for row in written] == ["baseline", "baseline", "ceiling", "op", "op"]
    assert [row["reason"] for row in written[:2]] == ["first rows", "slower, but right"]
    second = written[1]
    assert (second["revision"], second["torch"], second["gpu"], second["triton"]) == ("def", "2.12.0", GPU, "3.6.0")
    assert second["date"] > "2026" and {row["revision"] for row in written[2:]} == {"abc", "def"}
    assert [row["fraction"] for row in written if row.get("provider") == "triton"] == [0.72]
    assert files([op(0.72), op(provider="eager")]) == 0, "what was written is what is compared with"


def test_an_update_drops_replaced_rows_and_those_of_ops_that_are_gone(files):
    forward, backward = op(provider="cuda"), op(provider="cuda", direction="backward")
    files([op(), forward, backward, op(op="no_such_op"), op(case="no_such_case")], "--update", "--reason", "a")
    files([op(status="unavailable", direction=None, provider="cuda")], "--update", "--reason", "b")
    names = [(row["provider"], row["direction"]) for row in read(files.baseline) if row["kind"] == "op"]
    assert names == [("cuda", None), ("triton", "forward")]
    files([forward], "--update", "--reason", "c")
    assert ("cuda", None) not in {(r["provider"], r["direction"]) for r in read(files.baseline) if r["kind"] == "op"}


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["rows", "--update"],
        ["rows", "--reason", "x"],
        ["rows", "--against", "HEAD"],
        ["--against", "HEAD", "--update", "--reason", "x"],
        ["rows", "--no-such-option"],
    ],
)
def test_wrong_arguments_are_not_mistaken_for_a_missing_baseline(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        regress.main(arguments)
    assert ended.value.code == 64 and "usage" in capsys.readouterr().err


def test_rows_of_no_gpu_or_of_several_are_refused(files, capsys):
    assert files([]) == 64 and files([op(), op() | {"gpu": "NVIDIA A100-SXM4-80GB"}]) == 64
    assert "NVIDIA A100-SXM4-80GB, NVIDIA H200" in capsys.readouterr().err
    assert files([op() | {"device": "cpu"}]) == 64, "rows of a CPU are no run of a GPU"


def test_measuring_again_asks_for_exactly_the_row(tmp_path, capsys):
    options = ops.parse(regress.command(op())[1:])
    assert (options.op, options.case, options.direction, options.only) == (["swiglu"], ["XL"], ["forward"], ["triton"])
    assert options.dtypes == [torch.bfloat16]
    if not torch.cuda.is_available():
        assert bench_step.main(regress.command(step())[1:]) == 2, "its arguments are right; what lacks is the GPU"
        for row, program in ((sampling(), bench_sampling), (tokenizer(), bench_tokenizer)):
            module, *arguments = regress.command(row)
            assert f"bench.{row['kind']}" == module and program.main(arguments) == 2


def test_measuring_again_plans_one_row(monkeypatch):
    planned = []
    monkeypatch.setattr(program, "run", lambda module, options, *planned_by: planned.append(planned_by) or 0)
    other = step(variant="bare+cuda+swiglu=triton", engine="bare")
    for made, bench in (
        (step(), bench_step),
        (other, bench_step),
        (sampling(), bench_sampling),
        (tokenizer(), bench_tokenizer),
    ):
        planned.clear()
        bench.main(regress.command(made)[1:])
        ((make, (job,)),) = planned
        comparison = make(None, None, None)
        (name,) = job.providers
        assert compare.key(made) == compare.key(comparison.named(job, name) | {"kind": comparison.kind})


def again(run, **other) -> regress.Again:
    settings = {"here": lambda: MACHINE, "reasons": list} | other
    return regress.Again(run=run, **settings)


def test_measuring_again_gives_the_rows_of_that_name():
    def run(root, arguments, out, timeout):
        assert (root / "bench").is_dir() and arguments[0] == "bench.ops"
        write(out, [MACHINE | {"kind": "ceiling", "ceiling": "copy", "rate": 4.3}, op(0.77), op(provider="eager")])
        return 0

    assert again(run)(op()) == [op(0.77)]


def test_measuring_again_says_why_not():
    def silent(root, arguments, out, timeout):
        return 3

    def hanging(root, arguments, out, timeout):
        raise subprocess.TimeoutExpired(arguments, timeout)

    elsewhere = {"here": lambda: MACHINE | {"gpu": "NVIDIA H800"}}
    edited = {"here": lambda: MACHINE | {"revision": "abc-dirty"}}
    for run, other, why in (
        (silent, {}, "ended with 3 and no such row"),
        (hanging, {}, "no end after 900 s"),
        (silent, {"reasons": lambda: ["no CUDA device"]}, "no CUDA device"),
        (silent, elsewhere, "here it is NVIDIA H800"),
        (silent, edited, "here it is abc-dirty"),
        (silent, {"end": 5.0, "clock": lambda: 5.0}, "the time is up"),
    ):
        with pytest.raises(NotMeasured, match=why):
            again(run, **other)(op())


BENCH = """
import json, sys
from pathlib import Path
fraction = json.loads(Path("fraction.json").read_text())
row = json.loads(Path("row.json").read_text()) | {"fraction": fraction, "argument": sys.argv[1]}
with open(sys.argv[-1], "a") as out:
    out.write(json.dumps(row) + "\\n")
"""


@pytest.fixture
def repository(tmp_path):
    """Two commits of a tree whose bench answers with the fraction that the commit holds, and an edit on top."""
    root = tmp_path / "repository"
    (root / "bench").mkdir(parents=True)
    (root / "bench" / "__init__.py").touch()
    (root / "bench" / "ops.py").write_text(BENCH)
    (root / "row.json").write_text(json.dumps(op()))

    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        return subprocess.run(["git", *who, *words], cwd=root, check=True, capture_output=True, text=True).stdout

    git("init", "-q")
    for fraction in (0.9, 0.8):
        (root / "fraction.json").write_text(str(fraction))
        git("add", ".")
        git("commit", "-qm", str(fraction))
    (root / "fraction.json").write_text("0.7")
    return root, git


def test_two_revisions_by_turns(repository, capfd):
    root, git = repository
    order = []

    def run(tree, arguments, out):
        order.append(tree == root)
        return regress.run_bench(tree, arguments, out)

    known, rows = regress.by_turns("HEAD~1", ["bench.ops", "--quick"], root, run)
    assert order == [False, True, False]
    assert [row["fraction"] for row in known] == [0.9, 0.9] and [row["fraction"] for row in rows] == [0.7]
    assert rows[0]["argument"] == "--quick"
    assert verdicts(known, rows, Bench(0.7, 0.7)) == ["fell"]
    assert len(git("worktree", "list").splitlines()) == 1, "the other tree is gone"
    assert json.loads((root / "fraction.json").read_text()) == 0.7, "this one is as it was"
    known, _ = regress.by_turns("HEAD", ["bench.ops"], root)
    assert {row["fraction"] for row in known} == {0.8}


def test_a_revision_that_is_none_or_has_no_bench(repository):
    root, _ = repository
    with pytest.raises(ValueError, match="--against nowhere: git knows no such revision"):
        regress.by_turns("nowhere", ["bench.ops"], root)
    with pytest.raises(ValueError, match=r"bench.step in .* ended with 1 and no rows"):
        regress.by_turns("HEAD", ["bench.step"], root)


def test_against_needs_a_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert regress.main(["--against", "HEAD", "--", "swiglu"]) == 64
    assert "needs a GPU" in capsys.readouterr().err
    assert regress.parse(["--against", "HEAD", "--bench", "step", "--", "--batch", "8"]).arguments == ["--batch", "8"]


def test_names_of_files():
    assert baseline.path_for("NVIDIA H100 80GB HBM3", Path("x")) == Path("x/nvidia-h100-80gb-hbm3.jsonl")
