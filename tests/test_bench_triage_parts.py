"""The parts of a triage, their adaptation to crashed ops, its child programs, and its summary."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import kernels
from bench import gemms, ops, roofline, sampling, tokenizer
from bench import step as bench_step
from bench.triage import check, parts, profile, summary
from bench.triage.parts import first_parts, second_parts, select_parts
from bench.triage.tasks import AUTO, ENCODE, FILES, SAMPLING, STEP_OPS, Findings, Fractions, backends, step
from bench.workloads.providers import ours
from kernels import registry
from kernels.testing.tolerance import reference, tensors_of
from tests.test_bench_triage import FACTS, checked, op_row, row, step_row

ROOT = Path(__file__).parents[1]
SWIGLU = kernels.OPS["swiglu"]


def findings(**verdicts: str) -> Findings:
    """op__backend → verdict."""
    return Findings([checked(*name.split("__"), verdict) for name, verdict in verdicts.items()])


def options(task, name: str) -> list[str]:
    words = task.arguments
    return [words[place + 1] for place, word in enumerate(words) if word == name]


def test_every_op_and_backend_is_checked():
    found = {name: tuple(b for b in op.backends if b in FILES) for name, op in kernels.OPS.items()}
    assert backends() == found and all(registry.FILES[name] + ".py" == file for name, file in FILES.items())
    for name in STEP_OPS:
        order, expected = kernels.OPS[name].order, AUTO.get(name, ("triton",))
        assert order[: len(expected)] == expected
    tasks = next(part for part in first_parts() if part.name == "ops").tasks
    assert {(dict(task.about)["op"], dict(task.about)["backend"]) for task in tasks} == {
        (op, name) for op, names in found.items() for name in names
    }
    timed = [
        op
        for part in first_parts()
        if part.name == "fractions"
        for task in part.tasks
        for child in task.adapted(findings())
        for op in child.arguments
        if op in kernels.OPS
    ]
    assert sorted(timed) == sorted(kernels.OPS)
    assert all(sorted(ours(op)) == sorted(found[name]) for name, op in kernels.OPS.items()), "bench.ops times the same"


def test_the_order_and_the_budgets():
    found = {part.name: part.budget for part in first_parts()}
    page = (ROOT / "bench" / "README.md").read_text()
    table = re.findall(r"^\| (`[a-z`, -]+`) \| ([\d, ]+) \|", page, re.MULTILINE)
    stated = {
        name: float(seconds)
        for names, figures in table
        for name, seconds in zip(re.findall(r"`([a-z-]+)`", names), figures.split(", "), strict=True)
    }
    assert stated == found
    assert list(found)[:2] == ["machine", "build"] and list(found)[-1] == "others"
    assert [part.name for part in first_parts() if part.at_once > 1] == ["ops"], "what is timed runs alone"


def test_children_are_commands_that_their_programs_understand(monkeypatch, tmp_path):
    """Up to the point where each of them asks for a GPU."""
    for module in (bench_step, gemms, sampling, tokenizer):
        monkeypatch.setattr(module.program, "cuda_reasons", lambda: ["none here"])
    monkeypatch.setattr(roofline, "cuda_reasons", lambda: ["none here"])
    mains = {
        f"bench.{module.__name__.split('.')[-1]}": module.main
        for module in (bench_step, gemms, ops, roofline, sampling, tokenizer)
    }
    ran = set()
    broken = findings(swiglu__triton="timeout", swiglu__cuda="wrong", group_norm_silu__triton="failed")
    for part in (*first_parts(), *second_parts([])):
        for task in part.tasks:
            for child in (*task.adapted(findings()), *task.adapted(broken)):
                if child.module in mains:
                    values = {
                        "--ceilings": str(tmp_path / "c"),
                        "--minutes": "1",
                        "--out": str(tmp_path / "rows.jsonl"),
                    }
                    more = [word for name in child.takes for word in (name, values[name])]
                    status = mains[child.module]([*child.arguments, *more])
                    assert status == (0 if child.module == "bench.roofline" else 2)
                    ran.add(child.module)
    assert ran == set(mains)


def test_a_crashed_op_runs_on_another_backend_in_steps():
    bare, cuda = step("bare", 8), step("bare", 8, backend="cuda")
    assert bare.adapted(findings(swiglu__triton="ok", rope_attention__triton="wrong")) == [bare], "wrong is not crashed"
    (child,) = bare.adapted(findings(swiglu__triton="signal SIGSEGV"))
    assert options(child, "--kernels") == ["swiglu=cuda"] and child.note == "swiglu on cuda: it crashed on triton"
    assert options(child.smaller, "--kernels") == ["swiglu=cuda"] and options(child.smaller, "--batch") == ["64"]
    assert child.smaller.note == "at batch 64: out of memory at 128; swiglu on cuda: it crashed on triton"
    (child,) = bare.adapted(findings(swiglu__triton="timeout", swiglu__cuda="failed"))
    assert options(child, "--kernels") == ["swiglu=reference"]
    (child,) = cuda.adapted(findings(swiglu__triton="timeout", rope_attention__cuda="failed"))
    assert options(child, "--kernels") == ["cuda", "rope_attention=triton"]
    (child,) = bare.adapted(findings(rope_attention__cuda="failed"))
    assert child.note == "rope_attention on triton: it crashed on cuda"
    assert bare.adapted(findings(rope_attention__triton="failed")) == [bare], "auto takes CUDA's"
    (child,) = bare.adapted(findings(rope_attention__triton="failed", rope_attention__cuda="skipped"))
    assert options(child, "--kernels") == ["rope_attention=reference"]
    assert bare.adapted(findings(swiglu__cuda="failed")) == [bare], "auto does not take it"
    plain = step("plain-eager", 8)
    assert plain.adapted(findings(swiglu__triton="timeout")) == [plain]


def test_a_crashed_op_of_a_graph_takes_its_variant_along():
    grouped = step("bare-grouped", 8, graph_passes=("weight_gradients",))
    assert grouped.adapted(findings(weight_gradients__triton="failed"))[0].skip == "weight_gradients crashed on triton"
    assert not grouped.adapted(findings(linear_swiglu__triton="failed"))[0].skip


def test_wrong_backends_are_not_timed():
    task = Fractions("step", "bench.ops", ops=("swiglu", "rope_attention", "adamw_ema_"))
    (child,) = task.adapted(findings())
    assert child.arguments[:3] == ("swiglu", "rope_attention", "adamw_ema_")
    everyone = ["triton", "cuda", "library", "eager"]
    assert options(child, "--only") == everyone
    first, other = task.adapted(findings(rope_attention__cuda="wrong"))
    assert first.arguments[:2] == ("swiglu", "adamw_ema_") and options(first, "--only") == everyone
    assert other.arguments[0] == "rope_attention" and options(other, "--only") == ["triton", "library", "eager"]
    assert other.name != first.name and "cuda" in other.note


def test_sampling_and_encoding_do_without_crashed_ops():
    found = [
        options(child, "--variant")
        for verdicts in (
            {},
            {"swiglu__triton": "failed"},
            {"swiglu__triton": "failed", "rope_attention__cuda": "timeout"},
            {"adamw_ema___triton": "failed"},
            {"rope_attention__triton": "failed"},
            {"rope_attention__triton": "failed", "rope_attention__cuda": "skipped"},
        )
        for child in SAMPLING.adapted(findings(**verdicts))
    ]
    assert [variants[-1] for variants in found] == ["auto", "cuda", "reference", "auto", "auto", "reference"]
    (child,) = ENCODE.adapted(findings(group_norm_silu__triton="failed"))
    assert options(child, "--variant") == ["reference", "reference-channels-last"]
    assert not options(ENCODE.adapted(findings())[0], "--variant")


def test_selected_parts():
    found = select_parts(first_parts(), ["gemms", "ops/rope"])
    assert [part.name for part in found] == ["ceilings", "ops", "gemms"], "what reads ceilings has them measured"
    wanted = {"rope_attention triton", "rope_attention cuda", "rope_attention_jvp triton"}
    assert {task.name for task in found[1].tasks} == wanted
    assert found[1].budget == pytest.approx(55 / 5) and found[1].at_once == 5
    assert [part.name for part in select_parts(first_parts(), ["machine"])] == ["machine"]
    refused = {"step": "no part is called 'step'; allowed: machine", "ops/x": "ops has no 'x'; allowed: rope"}
    for wrong, said in refused.items():
        with pytest.raises(ValueError, match=said):
            select_parts(first_parts(), [wrong])


def test_parts_of_a_second_run(monkeypatch):
    monkeypatch.setattr(parts, "find_tool", lambda name: f"/bin/{name}")
    verdicts = {("swiglu", "triton"): "ok", ("swiglu", "cuda"): "wrong", ("vf_loss", "cuda"): "timeout"}
    fractions = {("swiglu", "triton"): 0.9, ("swiglu", "cuda"): 0.2, ("vf_loss", "triton"): 0.7}
    rows = [checked(*which, verdict) for which, verdict in verdicts.items()]
    rows += [op_row(*which, fraction) for which, fraction in fractions.items()]
    first, ncu, graphs = second_parts(rows)
    assert [task.name for task in first.tasks] == ["memcheck vf_loss cuda", "racecheck vf_loss cuda"], "a crash first"
    assert first.tasks[0].wrapper[2:5] == ("/bin/compute-sanitizer", "--tool", "memcheck")
    assert first.tasks[0].arguments[:2] == ("vf_loss", "cuda")
    assert ncu.tasks[0].arguments == ("vf_loss", "triton", "forward"), "of the best backends, the worst"
    assert ncu.tasks[0].wrapper[:3] == ("/bin/ncu", "--clock-control", "none")
    assert graphs.tasks[0].arguments[5] == "bare-cudagraphs"
    assert [part.name for part in second_parts(rows[:1])] == ["graphs"]
    assert second_parts([checked("swiglu", "cuda", "wrong")])[0].tasks[1].arguments[:2] == ("swiglu", "cuda")
    monkeypatch.setattr(parts, "find_tool", lambda name: None)
    skips = [task.skip for part in second_parts(rows) for task in part.tasks]
    assert skips == ["compute-sanitizer is not installed"] * 2 + ["ncu is not installed", ""]


MACHINE = row("triage", part="machine", name="machine", verdict="ok", reason="", packages={"timm": None})


def ended(part: str, verdict: str, reason: str = "", name: str = "") -> dict:
    return row("triage", part=part, name=name or part, verdict=verdict, reason=reason)


HEADLINE = [step_row(name, 150.0) for name in ("trainer", "bare", "plain-eager", "plain-compile")]


@pytest.mark.parametrize(
    ("rows", "advice"),
    [
        ([MACHINE | {"verdict": "failed", "reason": "no device: none"}], "why there is no GPU"),
        ([MACHINE | {"collectives": ["NCCL says no"]}, checked("swiglu", "cuda", "wrong")], "NCCL: .* NCCL says no"),
        (
            [
                MACHINE,
                ended("trainer", "failed"),
                checked("swiglu", "cuda", "wrong"),
                checked("vf_loss", "triton", "timeout"),
            ],
            "vf_loss on triton: timeout.*--second",
        ),
        (
            [MACHINE, *HEADLINE[1:], ended("trainer", "failed", "ModuleNotFoundError: x")],
            "trainer: failed.*--only trainer",
        ),
        (
            [MACHINE, *HEADLINE, ended("bare", "out of memory"), ended("variants", "timeout", "no end", "bare-folded")],
            "bare: out of memory|variants/bare-folded: timeout",
        ),
        (
            [
                MACHINE,
                *HEADLINE,
                ended("others", "skipped", "no time: 1 s") | {"share": 70.0},
                ended("gemms", "skipped", "no time: 0 s") | {"share": 25.0},
            ],
            "parts without time: bash bench/gpu.sh OUT 3 --only others --only gemms",
        ),
        (
            [MACHINE, *HEADLINE, op_row("swiglu", "triton", 0.5), op_row("vf_loss", "triton", 0.9)],
            "swiglu XL.*50.0%.*ncu",
        ),
        ([MACHINE, *HEADLINE], "nothing failed"),
        (
            [MACHINE, checked("swiglu", "cuda", "wrong"), ended("sanitizer", "failed", "", "memcheck swiglu cuda")],
            "read the sanitizer's report on swiglu on cuda: sanitizer/memcheck swiglu cuda in logs.tgz",
        ),
        (
            [MACHINE, checked("swiglu", "cuda", "wrong"), ended("sanitizer", "skipped", "", "memcheck swiglu cuda")],
            "swiglu on cuda: wrong.*--second",
        ),
        (
            [MACHINE, *HEADLINE, op_row("swiglu", "cuda", 0.5), ended("ncu", "ok", "", "swiglu cuda forward")],
            "read why swiglu XL forward cuda is at 50.0% .*: ncu/swiglu cuda forward",
        ),
    ],
)
def test_the_next_thing_to_do(rows, advice):
    assert re.search(advice, summary.next_step(rows)), summary.next_step(rows)


def test_the_summary_shows_every_kind_of_row():
    gemm = [
        row("gemm", provider="torch", layer=layer, direction="forward", flops=2e12, p50_ms=ms, tflops=2 / ms)
        for layer, ms in (("qkv", 2.0), ("w3", 6.0))
    ]
    rows = [
        MACHINE,
        *HEADLINE,
        checked("swiglu", "triton", "ok"),
        checked("swiglu", "cuda", "skipped"),
        *gemm,
        op_row("swiglu", "triton", 0.9),
        op_row("swiglu", "eager", 0.1),
        op_row("vf_loss", "cuda", 0.3),
        row("tokenizer", part="encode", provider="auto", images_per_second=2100.0, fraction=0.4),
        *(
            row("images", provider=name, source="tar", workers=16, device="cuda", images_per_second=rate)
            for name, rate in (("pil", 900.0), ("torchvision", 3100.5))
        ),
        row("images", provider="dali", source="tar") | {"status": "unavailable", "reason": "it is not installed"},
        ended("others", "skipped", "no time: 1 s are left", "sampling") | {"share": 20.0},
    ]
    text = summary.text(rows)
    assert text.startswith(f"{FACTS['gpu']}, driver 580, torch 2.11.0") and "not installed: timm" in text
    assert "swiglu                         triton right, cuda not checked" in text
    assert "500.0 TFLOP/s mean of 2 products, torch; the slowest: w3 forward, 0.3" in text
    limits = text[text.index("the lowest first") :].splitlines()
    assert "vf_loss XL forward cuda" in limits[1] and "swiglu XL forward triton" in limits[2] and not limits[3]
    assert "encode     auto                          2100.00 images/s" in text
    assert "others/sampling: no time: 1 s are left" in text and "trainer" in text
    decoded = text[text.index("Images decoded") :].splitlines()
    assert decoded[1] == "torchvision from tar, 16 workers          3100.5 images/s, on cuda"
    assert decoded[2].startswith("pil from tar") and decoded[3] == "dali: it is not installed"


@pytest.mark.parametrize(("direction", "marked"), [("forward", ["forward"]), ("backward", ["backward"])])
def test_a_profile_sees_one_call_after_the_others(direction, marked, monkeypatch):
    seen, marks = [], []

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            seen.append("forward")
            return x.clone()

        @staticmethod
        def backward(context, gradient):
            seen.append("backward")
            return gradient

    op = replace(kernels.OPS["swiglu"], check=lambda gate_up, *, bias=None: None)
    backend = replace(op.backend("reference"), run=lambda gate_up, *, bias=None: Counted.apply(gate_up))
    monkeypatch.setattr(type(op), "backend", lambda self, name: backend)
    monkeypatch.setattr(profile, "representative", lambda op: "odd")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for name in ("start", "stop"):
        monkeypatch.setattr(torch.cuda.profiler, name, lambda: marks.append(len(seen)))
    assert profile.main(["swiglu", "triton", direction, "--device", "cpu"]) == 0
    first, last = marks
    assert first >= profile.WARM_UP and seen[first:last] == marked and last == len(seen)


@pytest.mark.parametrize("name", kernels.OPS)
def test_a_check_takes_fewer_samples_of_everything(name):
    """Shapes only: the numbers of samples agree, and nothing else is cut."""
    op = kernels.OPS[name]
    case = next(case for case in op.cases if case.id == ops.representative(op))
    whole, less = (tensors_of(made.inputs(torch.bfloat16, "meta")) for made in (case, check.fewer_samples(case, 32)))
    if all(tensor.ndim < 2 for tensor in whole):
        assert [t.shape for t in whole] == [t.shape for t in less], "it has no samples"
        return
    changed = [(a.shape, b.shape) for a, b in zip(whole, less, strict=True) if a.shape != b.shape]
    assert all(a[1:] == b[1:] and b[0] == 32 for a, b in changed) and bool(changed) == (whole[0].shape[0] > 32)
    op.check(**check.fewer_samples(case, 32).inputs(torch.bfloat16, "meta"))


def test_a_check_reports_faults_and_goes_on(monkeypatch, capsys, tmp_path):
    """With a backend whose results are other ones each time, and whose gradients are right."""
    calls, right = iter(range(1000)), reference(SWIGLU)

    def run(gate_up, *, bias=None):
        return right(gate_up) + 0.1 * next(calls)

    backends = {"reference": SWIGLU.backend("reference")}
    backends["triton"] = replace(backends["reference"], run=run)
    monkeypatch.setattr(type(SWIGLU), "backend", lambda self, name: backends[name])
    monkeypatch.setattr(type(SWIGLU), "reasons", lambda self, name: [])
    out = tmp_path / "result"
    assert check.main(["swiglu", "triton", "--result", str(out), "--samples", "0", "--device", "cpu"]) == 3
    result = json.loads(out.read_text())
    assert result["verdict"] == "wrong" and result["device"] == "cpu"
    said = ("strided float16 forward: result 0: error", "strided float16 same bits", "differs between two runs")
    assert all(text in result["reason"] for text in said)
    assert "odd float32 gradients … right" in capsys.readouterr().out
    monkeypatch.setattr(type(SWIGLU), "reasons", lambda self, name: ["not built"])
    assert check.main(["swiglu", "triton", "--result", str(out), "--device", "cpu"]) == 0
    assert json.loads(out.read_text()) | {"verdict": "skipped", "reason": "not built"} == json.loads(out.read_text())


def test_the_coordinator_imports_no_torch():
    listed = "import sys, bench.triage.__main__; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", listed], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "bench.triage.coordinator" in done.stdout.split()
    assert not {"torch", "numpy", "triton", "kernels", "tests"} & set(done.stdout.split())
