"""The coordinator of a triage, with a simulated clock and children: verdicts, time, rows and files."""

import json
import tarfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from bench.measure.rows import FORMAT
from bench.triage import tasks
from bench.triage.coordinator import Triage
from bench.triage.parts import Part, allowance
from bench.triage.processes import Ended
from bench.triage.records import read_rows
from bench.triage.tasks import Task, check, own, step

FACTS = {"device": "cuda", "gpu": "NVIDIA H100 80GB HBM3", "capability": "9.0", "driver": "580", "python": "3.12",
         "torch": "2.11.0", "cuda": "13.0", "triton": "3.6.0", "revision": "1234abc"}  # fmt: skip
MEMORY = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"


@dataclass
class Script:
    """What a child does: rows and a result when it starts, a log, and how it ends after so many seconds.

    rows: some row unless they are given.
    deaf: it ends only when it is killed, ten seconds after it was told to.
    """

    status: int = 0
    seconds: float = 5.0
    rows: list[dict] | None = None
    result: dict | None = None
    log: str = ""
    deaf: bool = False


class Stage:
    """A clock that only sleep moves, and the children that were started: their labels, commands and limits."""

    def __init__(self, scripts: dict[str, Script]):
        self.scripts, self.now = scripts, 0.0
        self.started: dict[str, list[str]] = {}
        self.limits: dict[str, float] = {}
        self.at_once = self.most = 0
        self.on_sleep = lambda: None

    def start(self, command, log: Path, limit: float) -> "Player":
        label = log.stem
        self.started[label], self.limits[label] = command, limit
        script = self.scripts.get(label, Script())
        words = dict(pairwise(command))
        if "--out" in words:
            some = [row("data", provider=label, workers=0, batch_size=1)]
            rows = some if script.rows is None else script.rows
            Path(words["--out"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
        if "--result" in words and script.result is not None:
            Path(words["--result"]).write_text(json.dumps(script.result))
        with log.open("a") as file:
            file.write(script.log)
        return Player(self, script, limit)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.on_sleep()


class Player:
    def __init__(self, stage: Stage, script: Script, limit: float):
        self.stage, self.script, self.begun, self.limit = stage, script, stage.now, limit
        self.told_at, self.why = None, ""
        stage.at_once += 1
        stage.most = max(stage.most, stage.at_once)

    def poll(self) -> Ended | None:
        ran = self.stage.now - self.begun
        if self.told_at is None and ran >= self.limit:
            self.told_at, self.why = ran, "timeout"
        if self.told_at is not None and (not self.script.deaf or ran >= self.told_at + 10):
            return self.end(-9 if self.script.deaf else -15, ran)
        return self.end(self.script.status, ran) if self.told_at is None and ran >= self.script.seconds else None

    def end(self, status: int, ran: float) -> Ended:
        self.stage.at_once -= 1
        return Ended(status, ran, self.why)

    def stop(self) -> None:
        if self.told_at is None:
            self.told_at, self.why = self.stage.now - self.begun, "stopped"

    def kill(self) -> None:
        self.stage.at_once -= 1


def run(out: Path, parts, scripts=None, minutes: float = 8.0, earlier=(), on_sleep=None):
    """Whether all was well, the rows of the file by label, and the stage."""
    out.mkdir(exist_ok=True)
    stage = Stage(scripts or {})
    triage = Triage(out, minutes, earlier, start=stage.start, clock=lambda: stage.now, sleep=stage.sleep,
                    command=lambda module, arguments, limit: [module, *arguments])  # fmt: skip
    stage.triage = triage
    if on_sleep is not None:
        stage.on_sleep = lambda: on_sleep(stage)
    well = triage.run(parts)
    assert {path.name for path in out.iterdir()} == {"rows.jsonl", "summary.txt", "log.txt", "logs.tgz"}
    rows = read_rows(out / "rows.jsonl")
    return well, {f"{row['part']}/{row['name']}": row for row in rows if row["kind"] == "triage"}, stage


def row(kind: str, **keys) -> dict:
    return {"format": FORMAT, "kind": kind, "date": "2026-01-01T00:00:00+00:00", **FACTS, "status": "ok", "reason": "",
            **keys}  # fmt: skip


def step_row(variant: str, ms: float, batch: int = 128, **keys) -> dict:
    return row("step", **{"model": tasks.MODEL, "batch": batch, "variant": variant, "p50_ms": ms, "fraction": 0.4,
                          "images_per_second": batch / ms * 1e3, "peak_gb": 55.0, "loss": 2.0, "times_faster_than": {},
                          "coverage": None, **keys})  # fmt: skip


def op_row(op: str, provider: str, fraction: float, direction: str = "forward", **keys) -> dict:
    return row("op", **{"op": op, "case": "XL", "dtype": "bfloat16", "direction": direction, "provider": provider,
                        "fraction": fraction, "bound": "memory", "p50_us": 100.0, "times_faster_than": {"eager": 4.0},
                        **keys})  # fmt: skip


def checked(op: str, backend: str, verdict: str) -> dict:
    return row("triage", part="ops", name=f"{op} {backend}", op=op, backend=backend, verdict=verdict, reason="why")


MACHINE = Part("machine", 12, (own("machine", "machine"),))
CEILINGS = Part("ceilings", 8, (Task("ceilings", "bench.roofline", takes=("--out",)),))
OPS = Part("ops", 55, tuple(check(op, name) for op in ("swiglu", "vf_loss") for name in ("triton", "cuda")), at_once=3)
BARE = Part("bare", 45, (step("bare", 8),), essential=True)
PLAIN = Part("plain-eager", 25, (step("plain-eager", 8),), essential=True)
WELL = Script(result={**FACTS, "verdict": "ok", "reason": "", "packages": {"lpips": None}})


def test_each_ending_has_its_verdict(tmp_path):
    scripts = {
        "machine-machine": WELL,
        "ops-swiglu-triton": Script(-11, log="a line\n" * 40 + "XL bfloat16 gradients … Segmentation fault\n"),
        "ops-swiglu-cuda": Script(3, result={"verdict": "wrong", "reason": "XL forward: error 3.0"}),
        "ops-vf_loss-triton": Script(seconds=1e9, deaf=True, log="XL bfloat16 forward …"),
        "ops-vf_loss-cuda": Script(1, log="Traceback …\nRuntimeError: CUDA error: illegal memory access\nmore\n"),
        "bare-bare": Script(1, rows=[step_row("bare", 150.0, status="failed", reason=MEMORY)]),
        "bare-bare-at-64": Script(1, log=f"{MEMORY}\n"),
    }
    well, told, stage = run(tmp_path / "out", (MACHINE, OPS, BARE), scripts)
    assert not well and {name: told[name]["verdict"] for name in told} == {
        "machine/machine": "ok", "ops/swiglu triton": "signal SIGSEGV", "ops/swiglu cuda": "wrong",
        "ops/vf_loss triton": "timeout", "ops/vf_loss cuda": "failed", "bare/bare": "out of memory",
        "bare/bare at 64": "out of memory"}  # fmt: skip
    lines = told["ops/swiglu triton"]["log"]
    assert len(lines) == 20 and lines[-1] == "XL bfloat16 gradients … Segmentation fault"
    assert told["ops/swiglu cuda"]["reason"] == "XL forward: error 3.0"
    assert told["ops/vf_loss cuda"]["reason"] == "RuntimeError: CUDA error: illegal memory access"
    assert told["ops/vf_loss cuda"]["exit_status"] == 1 and told["ops/vf_loss cuda"]["seconds"] == pytest.approx(5, 0.1)
    hung = told["ops/vf_loss triton"]
    assert hung["exit_status"] == -9 and hung["seconds"] == pytest.approx(hung["limit"] + 10, abs=0.3)
    assert stage.most == 3 and all({k: line[k] for k in FACTS} == FACTS for line in told.values())
    assert told["bare/bare at 64"]["note"].startswith("at batch 64") and "64" in stage.started["bare-bare-at-64"]
    text = (tmp_path / "out" / "summary.txt").read_text()
    assert "triton SIGNAL SIGSEGV, cuda WRONG" in text and "XL forward: error 3.0" in text and "lpips" in text
    with tarfile.open(tmp_path / "out" / "logs.tgz") as logs:
        assert {f"logs/{label}.log" for label in stage.started} <= set(logs.getnames())


def test_when_the_time_is_up_everything_left_has_a_row_that_says_so(tmp_path):
    slow = {label: Script(seconds=70.0) for label in ("bare-bare", "plain-eager-plain-eager")}
    trainer = Part("trainer", 60, (step("trainer", 8),), essential=True)
    later = trainer, Part("others", 35, (Task("a", "m"), Task("b", "m")))
    well, told, stage = run(tmp_path / "out", (MACHINE, BARE, PLAIN, *later), {"machine-machine": WELL, **slow}, 3.0)
    assert told["bare/bare"]["verdict"] == "ok" and told["plain-eager/plain-eager"]["verdict"] == "timeout"
    assert told["trainer/trainer"]["verdict"] == "ok", "an essential part keeps its time"
    assert [told[f"others/{name}"]["verdict"] for name in "ab"] == ["ok", "ok"]
    assert not well and stage.now <= 180
    well, told, stage = run(tmp_path / "late", (MACHINE, BARE, *later), {"machine-machine": WELL, **slow}, 1.0)
    skipped = [label for label, line in told.items() if line["verdict"] == "skipped"]
    assert skipped == ["trainer/trainer", "others/a", "others/b"] and not well and stage.now <= 60
    assert all(told[label]["reason"].startswith("no time: ") for label in skipped)


def test_the_rule_of_time():
    """A part takes its budget; more where later essential parts keep theirs; never more than is left."""
    first, essential, last = Part("a", 20, ()), Part("b", 50, (), essential=True), Part("c", 1000, ())
    assert allowance(first, (essential, last), 480) == 60, "twice its budget and 20 s"
    assert allowance(first, (essential, last), 90) == 40, "what the essential part leaves"
    assert allowance(first, (essential, last), 60) == 20, "its own budget in any case"
    assert allowance(first, (essential, last), 10) == 10
    assert allowance(last, (), 300) == 300


def test_tasks_of_a_part_share_its_time_and_what_one_leaves_goes_to_the_next(tmp_path):
    part = Part("others", 30, tuple(Task(name, "m") for name in "abc"))
    scripts = {"others-a": Script(seconds=5), "others-b": Script(seconds=1e9), "others-c": Script(seconds=1e9)}
    _, told, stage = run(tmp_path / "out", (part,), scripts)
    assert stage.limits["others-a"] == pytest.approx(60), "80 s but for the shares of the other two"
    assert stage.limits["others-b"] == pytest.approx(65, abs=0.2)
    assert [line["verdict"] for line in told.values()] == ["ok", "timeout", "timeout"]
    assert stage.limits["others-c"] == pytest.approx(10, abs=0.5), "a hang leaves the share of the next one"
    minutes = float(stage.started["others-a"][stage.started["others-a"].index("--minutes") + 1])
    assert 60 * minutes == pytest.approx(54, abs=0.1), "to end by itself, before its limit"


def test_a_stop_ends_children_and_leaves_four_files(tmp_path):
    def stop(stage):
        if stage.now > 30:
            stage.triage.stop("SIGTERM")

    scripts = {"machine-machine": WELL, "bare-bare": Script(seconds=1e9, deaf=True, rows=[step_row("bare", 150.0)])}
    _, told, stage = run(tmp_path / "out", (MACHINE, BARE, PLAIN), scripts, on_sleep=stop)
    assert stage.now == pytest.approx(40.2, abs=0.5) and stage.at_once == 0
    assert told["bare/bare"]["verdict"] == "skipped" and "stopped" in told["bare/bare"]["reason"]
    assert told["plain-eager/plain-eager"]["reason"] == "the run was stopped: SIGTERM"
    assert "853.3 images/s" in (tmp_path / "out" / "summary.txt").read_text(), "what had been timed is not lost"


def test_nothing_outlives_a_fault_of_the_coordinator(tmp_path):
    stages = []

    def break_down(stage):
        stages.append(stage)
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        run(tmp_path / "out", (OPS,), on_sleep=break_down)
    assert stages[0].most == 3 and stages[0].at_once == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"rows.jsonl", "summary.txt", "log.txt", "logs.tgz"}


def test_steps_are_judged_and_compared_when_all_are_known(tmp_path):
    folded = Part("variants", 90, (step("bare-folded", 8),))
    scripts = {
        "machine-machine": WELL,
        "bare-bare": Script(rows=[step_row("bare", 400.0), step_row("bare", 200.0)]),
        "variants-bare-folded": Script(rows=[step_row("bare-folded", 100.0, loss=2.1)]),
        "plain-eager-plain-eager": Script(rows=[step_row("plain-eager", 600.0, loss=2.01)]),
    }
    well, told, _ = run(tmp_path / "out", (MACHINE, BARE, folded, PLAIN), scripts)
    rows = {line["variant"]: line for line in read_rows(tmp_path / "out" / "rows.jsonl") if line["kind"] == "step"}
    assert rows["bare"]["times_faster_than"] == {"plain-eager": pytest.approx(3.0)}, "the later row counts"
    assert rows["plain-eager"]["times_faster_than"] == {"bare": pytest.approx(1 / 3)}
    assert rows["bare-folded"]["status"] == "incorrect" and "2.10000" in rows["bare-folded"]["reason"]
    assert not well and told["variants/bare-folded"]["verdict"] == "wrong" and told["bare/bare"]["verdict"] == "ok"
    lines = (tmp_path / "out" / "rows.jsonl").read_text().splitlines()
    assert len(lines) == 4 + 3, "one row of each name"
    assert "3.00x plain-eager" in (tmp_path / "out" / "summary.txt").read_text()


def test_steps_at_other_batches_are_not_compared(tmp_path):
    scripts = {
        "bare-bare": Script(rows=[step_row("bare", 200.0)]),
        "plain-eager-plain-eager": Script(1, rows=[step_row("plain-eager", 1.0, status="failed", reason=MEMORY)]),
        "plain-eager-plain-eager-at-64": Script(rows=[step_row("plain-eager", 300.0, batch=64, loss=9.0)]),
    }
    _, told, _ = run(tmp_path / "out", (BARE, PLAIN), scripts)
    rows = [line for line in read_rows(tmp_path / "out" / "rows.jsonl") if line["kind"] == "step"]
    assert [(line["batch"], line["status"], line["times_faster_than"]) for line in rows] == [
        (128, "ok", {}), (128, "failed", {}), (64, "ok", {})]  # fmt: skip
    assert rows[2]["note"] == "at batch 64: out of memory at 128"
    assert told["plain-eager/plain-eager"]["verdict"] == "out of memory"


def test_ceilings_are_measured_once_and_read_by_the_others(tmp_path):
    copy = row("ceiling", ceiling="copy", rate=2.9)
    _, _, stage = run(tmp_path / "out", (CEILINGS, BARE), {"ceilings-ceilings": Script(rows=[copy])})
    assert stage.started["bare-bare"][stage.started["bare-bare"].index("--ceilings") + 1].endswith(".jsonl")
    _, _, stage = run(tmp_path / "none", (CEILINGS, BARE), {"ceilings-ceilings": Script(1, rows=[])})
    assert "--ceilings" not in stage.started["bare-bare"], "each measures its own"


def test_the_extension_is_built_only_where_the_one_here_does_not_run(tmp_path):
    building = Part("build", 60, (tasks.BUILD,))
    _, told, _ = run(tmp_path / "out", (MACHINE, building), {"machine-machine": WELL})
    assert set(told) == {"machine/machine"}
    lacking = Script(result={**FACTS, "verdict": "ok", "reason": "", "extension": ["not built"]})
    _, told, stage = run(tmp_path / "other", (MACHINE, building), {"machine-machine": lacking})
    assert stage.started["build-extension"] == ["setup", "--quiet", "build_ext", "--inplace"]
    assert told["build/extension"]["note"] == "not built"


def test_without_a_device_nothing_is_started(tmp_path):
    nothing = {"no_device": ["no CUDA device is visible"], "verdict": "failed", "reason": "no device: x"}
    scripts = {"machine-machine": Script(result=nothing)}
    well, told, stage = run(tmp_path / "out", (MACHINE, CEILINGS, OPS, BARE), scripts)
    assert not well and list(stage.started) == ["machine-machine"] and len(told) == 7
    assert stage.triage.no_device and "why there is no GPU" in (tmp_path / "out" / "summary.txt").read_text()


def test_facts_of_the_machine_come_from_the_first_child_that_reports_them(tmp_path):
    """Where the first child hung."""
    scripts = {"machine-machine": Script(seconds=1e9), "bare-bare": Script(rows=[step_row("bare", 150.0)])}
    _, told, _ = run(tmp_path / "out", (MACHINE, BARE), scripts)
    assert {line["gpu"] for line in told.values()} == {FACTS["gpu"]}


def test_a_second_run_into_the_folder_keeps_rows_that_it_does_not_replace(tmp_path):
    bare, plain = (Script(rows=[step_row(name, ms)]) for name, ms in (("bare", 200.0), ("plain-eager", 600.0)))
    run(tmp_path / "out", (BARE, PLAIN), {"bare-bare": bare, "plain-eager-plain-eager": Script(-11)})
    _, told, _ = run(tmp_path / "out", (PLAIN,), {"plain-eager-plain-eager": plain})
    assert {label: line["verdict"] for label, line in told.items()} == dict.fromkeys(told, "ok") and len(told) == 2
    with tarfile.open(tmp_path / "out" / "logs.tgz") as logs:
        assert "logs/bare-bare.log" in logs.getnames()
    assert "3.00x plain-eager" in (tmp_path / "out" / "summary.txt").read_text()


def test_a_bench_that_measures_nothing_has_failed_and_one_that_ends_early_says_so(tmp_path):
    part = Part("others", 30, (Task("none", "m"), Task("some", "m"), Task("told", "m", takes=())))
    some = Script(rows=[op_row("swiglu", "triton", 0.9)], log="time is up, not measured: vf_loss dinov2_large\n")
    none = Script(rows=[], log="so it is\n")
    _, told, _ = run(tmp_path / "out", (part,), {"others-none": none, "others-some": some})
    assert told["others/none"]["verdict"] == "failed"
    assert told["others/none"]["reason"] == "it has measured nothing: so it is"
    assert told["others/some"]["verdict"] == told["others/told"]["verdict"] == "ok"
    assert "others/some: time is up, not measured: vf_loss" in (tmp_path / "out" / "summary.txt").read_text()


def test_files_of_a_killed_run_are_no_hindrance(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".rows.jsonl.tmp").write_text("{")
    (tmp_path / "out" / "rows.jsonl").write_text(json.dumps(step_row("plain-eager", 600.0)) + '\n{"format": 2, "ki')
    (tmp_path / "out" / "logs.tgz").write_bytes(b"\x1f\x8b cut")
    run(tmp_path / "out", (BARE,), {"bare-bare": Script(rows=[step_row("bare", 200.0)])})
    assert "3.00x plain-eager" in (tmp_path / "out" / "summary.txt").read_text()
