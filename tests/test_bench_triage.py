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
from bench.triage.tasks import Task, check, step, triage_task

FACTS = {
    "device": "cuda",
    "gpu": "NVIDIA H100 80GB HBM3",
    "capability": "9.0",
    "driver": "580",
    "python": "3.12",
    "torch": "2.11.0",
    "cuda": "13.0",
    "triton": "3.6.0",
    "revision": "1234abc",
}
MEMORY = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"


@dataclass
class Behaviour:
    """Of a simulated child: its rows and result from the start, its log, and its status after so many seconds.

    rows: some row unless they are given.
    ignores_sigterm: it ends only when it is killed, ten seconds after it was told to.
    """

    status: int = 0
    seconds: float = 5.0
    rows: list[dict] | None = None
    result: dict | None = None
    log: str = ""
    ignores_sigterm: bool = False


class FakeProcesses:
    """A clock that only sleep moves, and the children that were started: their labels, commands and limits."""

    def __init__(self, behaviours: dict[str, Behaviour]):
        self.behaviours, self.now = behaviours, 0.0
        self.started: dict[str, list[str]] = {}
        self.limits: dict[str, float] = {}
        self.at_once = self.most = 0
        self.on_sleep = lambda: None

    def start(self, command, log: Path, limit: float) -> "FakeChild":
        label = log.stem
        self.started[label], self.limits[label] = command, limit
        behaviour = self.behaviours.get(label, Behaviour())
        words = dict(pairwise(command))
        if "--out" in words:
            some = [row("data", provider=label, workers=0, batch_size=1)]
            rows = some if behaviour.rows is None else behaviour.rows
            Path(words["--out"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
        if "--result" in words and behaviour.result is not None:
            Path(words["--result"]).write_text(json.dumps(behaviour.result))
        with log.open("a") as file:
            file.write(behaviour.log)
        return FakeChild(self, behaviour, limit)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.on_sleep()


class FakeChild:
    def __init__(self, fake: FakeProcesses, behaviour: Behaviour, limit: float):
        self.fake, self.behaviour, self.begun, self.limit = fake, behaviour, fake.now, limit
        self.stopped_at, self.why = None, ""
        fake.at_once += 1
        fake.most = max(fake.most, fake.at_once)

    def poll(self) -> Ended | None:
        ran = self.fake.now - self.begun
        if self.stopped_at is None and ran >= self.limit:
            self.stopped_at, self.why = ran, "timeout"
        if self.stopped_at is not None and (not self.behaviour.ignores_sigterm or ran >= self.stopped_at + 10):
            return self.end(-9 if self.behaviour.ignores_sigterm else -15, ran)
        return (
            self.end(self.behaviour.status, ran) if self.stopped_at is None and ran >= self.behaviour.seconds else None
        )

    def end(self, status: int, ran: float) -> Ended:
        self.fake.at_once -= 1
        return Ended(status, ran, self.why)

    def stop(self) -> None:
        if self.stopped_at is None:
            self.stopped_at, self.why = self.fake.now - self.begun, "stopped"

    def kill(self) -> None:
        self.fake.at_once -= 1


def run(out: Path, parts, behaviours=None, minutes: float = 8.0, earlier=(), on_sleep=None):
    """Whether it succeeded, the verdicts in the file by label, and the processes that were simulated."""
    out.mkdir(exist_ok=True)
    fake = FakeProcesses(behaviours or {})
    triage = Triage(
        out,
        minutes,
        earlier,
        start=fake.start,
        clock=lambda: fake.now,
        sleep=fake.sleep,
        command=lambda module, arguments, limit: [module, *arguments],
    )
    fake.triage = triage
    if on_sleep is not None:
        fake.on_sleep = lambda: on_sleep(fake)
    succeeded = triage.run(parts)
    assert {path.name for path in out.iterdir()} == {"rows.jsonl", "summary.txt", "log.txt", "logs.tgz"}
    rows = read_rows(out / "rows.jsonl")
    return succeeded, {f"{row['part']}/{row['name']}": row for row in rows if row["kind"] == "triage"}, fake


def row(kind: str, **keys) -> dict:
    return {
        "format": FORMAT,
        "kind": kind,
        "date": "2026-01-01T00:00:00+00:00",
        **FACTS,
        "status": "ok",
        "reason": "",
        **keys,
    }


def step_row(variant: str, ms: float, batch: int = 128, **keys) -> dict:
    return row(
        "step",
        **{
            "model": tasks.MODEL,
            "batch": batch,
            "variant": variant,
            "p50_ms": ms,
            "fraction": 0.4,
            "images_per_second": batch / ms * 1e3,
            "peak_gb": 55.0,
            "loss": 2.0,
            "times_faster_than": {},
            "coverage": None,
            **keys,
        },
    )


def op_row(op: str, provider: str, fraction: float, direction: str = "forward", **keys) -> dict:
    return row(
        "op",
        **{
            "op": op,
            "case": "XL",
            "dtype": "bfloat16",
            "direction": direction,
            "provider": provider,
            "fraction": fraction,
            "bound": "memory",
            "p50_us": 100.0,
            "times_faster_than": {"eager": 4.0},
            **keys,
        },
    )


def checked(op: str, backend: str, verdict: str) -> dict:
    return row("triage", part="ops", name=f"{op} {backend}", op=op, backend=backend, verdict=verdict, reason="why")


MACHINE = Part("machine", 12, (triage_task("machine", "machine"),))
CEILINGS = Part("ceilings", 8, (Task("ceilings", "bench.roofline", takes=("--out",)),))
OPS = Part("ops", 55, tuple(check(op, name) for op in ("swiglu", "vf_loss") for name in ("triton", "cuda")), at_once=3)
BARE = Part("bare", 45, (step("bare", 8),), essential=True)
PLAIN = Part("plain-eager", 25, (step("plain-eager", 8),), essential=True)
MACHINE_OK = Behaviour(result={**FACTS, "verdict": "ok", "reason": "", "packages": {"lpips": None}})


def test_each_ending_has_its_verdict(tmp_path):
    behaviours = {
        "machine-machine": MACHINE_OK,
        "ops-swiglu-triton": Behaviour(-11, log="a line\n" * 40 + "XL bfloat16 gradients … Segmentation fault\n"),
        "ops-swiglu-cuda": Behaviour(3, result={"verdict": "wrong", "reason": "XL forward: error 3.0"}),
        "ops-vf_loss-triton": Behaviour(seconds=1e9, ignores_sigterm=True, log="XL bfloat16 forward …"),
        "ops-vf_loss-cuda": Behaviour(1, log="Traceback …\nRuntimeError: CUDA error: illegal memory access\nmore\n"),
        "bare-bare": Behaviour(1, rows=[step_row("bare", 150.0, status="failed", reason=MEMORY)]),
        "bare-bare-at-64": Behaviour(1, log=f"{MEMORY}\n"),
    }
    succeeded, outcomes, fake = run(tmp_path / "out", (MACHINE, OPS, BARE), behaviours)
    assert not succeeded and {name: outcomes[name]["verdict"] for name in outcomes} == {
        "machine/machine": "ok",
        "ops/swiglu triton": "signal SIGSEGV",
        "ops/swiglu cuda": "wrong",
        "ops/vf_loss triton": "timeout",
        "ops/vf_loss cuda": "failed",
        "bare/bare": "out of memory",
        "bare/bare at 64": "out of memory",
    }
    lines = outcomes["ops/swiglu triton"]["log"]
    assert len(lines) == 20 and lines[-1] == "XL bfloat16 gradients … Segmentation fault"
    assert outcomes["ops/swiglu cuda"]["reason"] == "XL forward: error 3.0"
    assert outcomes["ops/vf_loss cuda"]["reason"] == "RuntimeError: CUDA error: illegal memory access"
    assert outcomes["ops/vf_loss cuda"]["exit_status"] == 1 and outcomes["ops/vf_loss cuda"][
        "seconds"
    ] == pytest.approx(5, 0.1)
    hung = outcomes["ops/vf_loss triton"]
    assert hung["exit_status"] == -9 and hung["seconds"] == pytest.approx(hung["limit"] + 10, abs=0.3)
    assert fake.most == 3 and all({k: line[k] for k in FACTS} == FACTS for line in outcomes.values())
    assert outcomes["bare/bare at 64"]["note"].startswith("at batch 64") and "64" in fake.started["bare-bare-at-64"]
    text = (tmp_path / "out" / "summary.txt").read_text()
    assert "triton SIGNAL SIGSEGV, cuda WRONG" in text and "XL forward: error 3.0" in text and "lpips" in text
    with tarfile.open(tmp_path / "out" / "logs.tgz") as logs:
        assert {f"logs/{label}.log" for label in fake.started} <= set(logs.getnames())


def test_when_the_time_is_up_everything_left_has_a_row_that_says_so(tmp_path):
    slow = {label: Behaviour(seconds=70.0) for label in ("bare-bare", "plain-eager-plain-eager")}
    trainer = Part("trainer", 60, (step("trainer", 8),), essential=True)
    later = trainer, Part("others", 35, (Task("a", "m"), Task("b", "m")))
    succeeded, outcomes, fake = run(
        tmp_path / "out", (MACHINE, BARE, PLAIN, *later), {"machine-machine": MACHINE_OK, **slow}, 3.0
    )
    assert outcomes["bare/bare"]["verdict"] == "ok" and outcomes["plain-eager/plain-eager"]["verdict"] == "timeout"
    assert outcomes["trainer/trainer"]["verdict"] == "ok", "an essential part keeps its time"
    assert [outcomes[f"others/{name}"]["verdict"] for name in "ab"] == ["ok", "ok"]
    assert not succeeded and fake.now <= 180
    succeeded, outcomes, fake = run(
        tmp_path / "late", (MACHINE, BARE, *later), {"machine-machine": MACHINE_OK, **slow}, 1.0
    )
    skipped = [label for label, line in outcomes.items() if line["verdict"] == "skipped"]
    assert skipped == ["trainer/trainer", "others/a", "others/b"] and not succeeded and fake.now <= 60
    assert all(outcomes[label]["reason"].startswith("no time: ") for label in skipped)


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
    behaviours = {
        "others-a": Behaviour(seconds=5),
        "others-b": Behaviour(seconds=1e9),
        "others-c": Behaviour(seconds=1e9),
    }
    _, outcomes, fake = run(tmp_path / "out", (part,), behaviours)
    assert fake.limits["others-a"] == pytest.approx(60), "80 s but for the shares of the other two"
    assert fake.limits["others-b"] == pytest.approx(65, abs=0.2)
    assert [line["verdict"] for line in outcomes.values()] == ["ok", "timeout", "timeout"]
    assert fake.limits["others-c"] == pytest.approx(10, abs=0.5), "a hang leaves the share of the next one"
    minutes = float(fake.started["others-a"][fake.started["others-a"].index("--minutes") + 1])
    assert 60 * minutes == pytest.approx(54, abs=0.1), "to end by itself, before its limit"


def test_a_stop_ends_children_and_leaves_four_files(tmp_path):
    def stop(fake):
        if fake.now > 30:
            fake.triage.stop("SIGTERM")

    behaviours = {
        "machine-machine": MACHINE_OK,
        "bare-bare": Behaviour(seconds=1e9, ignores_sigterm=True, rows=[step_row("bare", 150.0)]),
    }
    _, outcomes, fake = run(tmp_path / "out", (MACHINE, BARE, PLAIN), behaviours, on_sleep=stop)
    assert fake.now == pytest.approx(40.2, abs=0.5) and fake.at_once == 0
    assert outcomes["bare/bare"]["verdict"] == "skipped" and "stopped" in outcomes["bare/bare"]["reason"]
    assert outcomes["plain-eager/plain-eager"]["reason"] == "the run was stopped: SIGTERM"
    assert "853.3 images/s" in (tmp_path / "out" / "summary.txt").read_text(), "what had been timed is not lost"


def test_nothing_outlives_a_fault_of_the_coordinator(tmp_path):
    fakes = []

    def break_down(fake):
        fakes.append(fake)
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        run(tmp_path / "out", (OPS,), on_sleep=break_down)
    assert fakes[0].most == 3 and fakes[0].at_once == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"rows.jsonl", "summary.txt", "log.txt", "logs.tgz"}


def test_steps_are_judged_and_compared_when_all_are_known(tmp_path):
    folded = Part("variants", 90, (step("bare-folded", 8),))
    behaviours = {
        "machine-machine": MACHINE_OK,
        "bare-bare": Behaviour(rows=[step_row("bare", 400.0), step_row("bare", 200.0)]),
        "variants-bare-folded": Behaviour(rows=[step_row("bare-folded", 100.0, loss=2.1)]),
        "plain-eager-plain-eager": Behaviour(rows=[step_row("plain-eager", 600.0, loss=2.01)]),
    }
    succeeded, outcomes, _ = run(tmp_path / "out", (MACHINE, BARE, folded, PLAIN), behaviours)
    rows = {line["variant"]: line for line in read_rows(tmp_path / "out" / "rows.jsonl") if line["kind"] == "step"}
    assert rows["bare"]["times_faster_than"] == {"plain-eager": pytest.approx(3.0)}, "the later row counts"
    assert rows["plain-eager"]["times_faster_than"] == {"bare": pytest.approx(1 / 3)}
    assert rows["bare-folded"]["status"] == "incorrect" and "2.10000" in rows["bare-folded"]["reason"]
    assert (
        not succeeded
        and outcomes["variants/bare-folded"]["verdict"] == "wrong"
        and outcomes["bare/bare"]["verdict"] == "ok"
    )
    lines = (tmp_path / "out" / "rows.jsonl").read_text().splitlines()
    assert len(lines) == 4 + 3, "one row of each name"
    assert "3.00x plain-eager" in (tmp_path / "out" / "summary.txt").read_text()


def test_steps_at_other_batches_are_not_compared(tmp_path):
    behaviours = {
        "bare-bare": Behaviour(rows=[step_row("bare", 200.0)]),
        "plain-eager-plain-eager": Behaviour(1, rows=[step_row("plain-eager", 1.0, status="failed", reason=MEMORY)]),
        "plain-eager-plain-eager-at-64": Behaviour(rows=[step_row("plain-eager", 300.0, batch=64, loss=9.0)]),
    }
    _, outcomes, _ = run(tmp_path / "out", (BARE, PLAIN), behaviours)
    rows = [line for line in read_rows(tmp_path / "out" / "rows.jsonl") if line["kind"] == "step"]
    assert [(line["batch"], line["status"], line["times_faster_than"]) for line in rows] == [
        (128, "ok", {}),
        (128, "failed", {}),
        (64, "ok", {}),
    ]
    assert rows[2]["note"] == "at batch 64: out of memory at 128"
    assert outcomes["plain-eager/plain-eager"]["verdict"] == "out of memory"


def test_ceilings_are_measured_once_and_read_by_the_others(tmp_path):
    copy = row("ceiling", ceiling="copy", rate=2.9)
    _, _, fake = run(tmp_path / "out", (CEILINGS, BARE), {"ceilings-ceilings": Behaviour(rows=[copy])})
    assert fake.started["bare-bare"][fake.started["bare-bare"].index("--ceilings") + 1].endswith(".jsonl")
    _, _, fake = run(tmp_path / "none", (CEILINGS, BARE), {"ceilings-ceilings": Behaviour(1, rows=[])})
    assert "--ceilings" not in fake.started["bare-bare"], "each measures its own"


def test_the_extension_is_built_only_where_the_one_here_does_not_run(tmp_path):
    building = Part("build", 60, (tasks.BUILD,))
    _, outcomes, _ = run(tmp_path / "out", (MACHINE, building), {"machine-machine": MACHINE_OK})
    assert set(outcomes) == {"machine/machine"}
    lacking = Behaviour(result={**FACTS, "verdict": "ok", "reason": "", "extension": ["not built"]})
    _, outcomes, fake = run(tmp_path / "other", (MACHINE, building), {"machine-machine": lacking})
    assert fake.started["build-extension"] == ["setup", "--quiet", "build_ext", "--inplace"]
    assert outcomes["build/extension"]["note"] == "not built"


def test_without_a_device_nothing_is_started(tmp_path):
    nothing = {"no_device": ["no CUDA device is visible"], "verdict": "failed", "reason": "no device: x"}
    behaviours = {"machine-machine": Behaviour(result=nothing)}
    succeeded, outcomes, fake = run(tmp_path / "out", (MACHINE, CEILINGS, OPS, BARE), behaviours)
    assert not succeeded and list(fake.started) == ["machine-machine"] and len(outcomes) == 7
    assert fake.triage.no_device and "why there is no GPU" in (tmp_path / "out" / "summary.txt").read_text()


def test_facts_of_the_machine_come_from_the_first_child_that_reports_them(tmp_path):
    """Where the first child hung."""
    behaviours = {"machine-machine": Behaviour(seconds=1e9), "bare-bare": Behaviour(rows=[step_row("bare", 150.0)])}
    _, outcomes, _ = run(tmp_path / "out", (MACHINE, BARE), behaviours)
    assert {line["gpu"] for line in outcomes.values()} == {FACTS["gpu"]}


def test_a_second_run_into_the_folder_keeps_rows_that_it_does_not_replace(tmp_path):
    bare, plain = (Behaviour(rows=[step_row(name, ms)]) for name, ms in (("bare", 200.0), ("plain-eager", 600.0)))
    run(tmp_path / "out", (BARE, PLAIN), {"bare-bare": bare, "plain-eager-plain-eager": Behaviour(-11)})
    _, outcomes, _ = run(tmp_path / "out", (PLAIN,), {"plain-eager-plain-eager": plain})
    assert {label: line["verdict"] for label, line in outcomes.items()} == dict.fromkeys(outcomes, "ok") and len(
        outcomes
    ) == 2
    with tarfile.open(tmp_path / "out" / "logs.tgz") as logs:
        assert "logs/bare-bare.log" in logs.getnames()
    assert "3.00x plain-eager" in (tmp_path / "out" / "summary.txt").read_text()


def test_a_bench_that_measures_nothing_has_failed_and_one_that_ends_early_says_so(tmp_path):
    part = Part("others", 30, (Task("none", "m"), Task("some", "m"), Task("outcomes", "m", takes=())))
    some = Behaviour(rows=[op_row("swiglu", "triton", 0.9)], log="time is up, not measured: vf_loss dinov2_large\n")
    none = Behaviour(rows=[], log="so it is\n")
    _, outcomes, _ = run(tmp_path / "out", (part,), {"others-none": none, "others-some": some})
    assert outcomes["others/none"]["verdict"] == "failed"
    assert outcomes["others/none"]["reason"] == "it has measured nothing: so it is"
    assert outcomes["others/some"]["verdict"] == outcomes["others/outcomes"]["verdict"] == "ok"
    assert "others/some: time is up, not measured: vf_loss" in (tmp_path / "out" / "summary.txt").read_text()


def test_files_of_a_killed_run_are_no_hindrance(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".rows.jsonl.tmp").write_text("{")
    (tmp_path / "out" / "rows.jsonl").write_text(json.dumps(step_row("plain-eager", 600.0)) + '\n{"format": 2, "ki')
    (tmp_path / "out" / "logs.tgz").write_bytes(b"\x1f\x8b cut")
    run(tmp_path / "out", (BARE,), {"bare-bare": Behaviour(rows=[step_row("bare", 200.0)])})
    assert "3.00x plain-eager" in (tmp_path / "out" / "summary.txt").read_text()
