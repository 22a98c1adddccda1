"""The end of a run: by a signal to one of its processes, with its launcher, and in order."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from common.files import WriteError
from launch.__main__ import main
from launch.config import load
from launch.runtime import launcher, lifetime, processes
from launch.runtime.launcher import LaunchEnvironment, LaunchError, launch_environment
from launch.training import checkpoint
from launch.training.build import make_trainer
from launch.training.engine import start_processes
from tests import toy
from tests.children import alive, eventually, exit_code, print_to, started
from tests.run_rows import rows

_fork = multiprocessing.get_context("fork")
ROOT = Path(__file__).parents[1]
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def run_file(tmp_path) -> str:
    toy.write_latents(tmp_path / "latents")
    train = {"output_dir": str(tmp_path), "log_every": 4, "ckpt_every": 100}
    return str(
        toy.write_run(
            tmp_path / "run.yaml", toy.LIGHTNINGDIT, data={"data_path": str(tmp_path / "latents")}, train=train
        )
    )


# --- its standard streams


@pytest.mark.parametrize("command", [["--help"], ["train"]])
def test_a_full_disk_below_standard_output_is_named(run_file, command):
    argv = [*command, *(["lightningdit", run_file] if command == ["train"] else [])]
    with open("/dev/full", "w") as full:
        child = subprocess.run(
            [sys.executable, "-m", "launch", *argv],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=240,
            cwd=ROOT,
        )
    assert child.returncode == 2 and "Traceback" not in child.stderr
    assert "error: cannot write to standard output: No space left on device" in child.stderr


@pytest.mark.parametrize("closed", [[1], [0, 1, 2]])
def test_a_run_without_standard_streams_is_the_same_run(tmp_path, run_file, closed):
    def child():
        for descriptor in closed:
            os.close(descriptor)
        os.execve(
            sys.executable,
            [sys.executable, "-m", "launch", "train", "lightningdit", run_file],
            os.environ | {"PYTHONPATH": str(ROOT)},
        )

    process = _fork.Process(target=child)
    assert exit_code(process) == 0
    assert rows(tmp_path / "run")[-1]["step"] == 6 and checkpoint.newest(tmp_path / "run/checkpoints").step == 6


# --- its directory


@pytest.mark.parametrize("tensorboard", [True, False])
def test_a_run_whose_directory_vanishes_ends_before_it_makes_another(tmp_path, run_file, monkeypatch, tensorboard):
    """At the next checkpoint, where no row comes before."""
    settings = ["train.ckpt_every=3", f"train.tensorboard={tensorboard}", "train.log_every=100", "train.max_steps=9"]
    run = make_trainer(load(run_file, settings, kind="lightningdit")[0], "lightningdit", start_processes())
    step = run.train_step

    def and_vanish(stream):
        step(stream)
        if run.step == 4:
            run.saver.wait()  # step 3's checkpoint, whose row is then written before the directory is gone
        if run.step == 5:
            (tmp_path / "run").rename(tmp_path / "elsewhere")

    monkeypatch.setattr(run, "train_step", and_vanish)
    with pytest.raises(WriteError, match=r"run/metrics\.jsonl is gone"):
        run.run()
    assert run.step == 6 and not (tmp_path / "run").exists()
    assert checkpoint.newest(tmp_path / "elsewhere/checkpoints").step == 3


# --- the launcher


def set_launcher(monkeypatch, variables: dict[str, str]) -> None:
    """Of the variables that a launcher sets, have these and no others."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": ""}, "WORLD_SIZE is not set"),
        ({"RANK": "", "WORLD_SIZE": "2"}, r"RANK is '': .* from 0 to 1"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, r"RANK is '2': .* from 0 to 1"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, r"WORLD_SIZE is 'two': .* of at least 1"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, r"WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"WORLD_SIZE": "0"}, r"WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": ""}, r"WORLD_SIZE is ''"),
        ({"WORLD_SIZE": "1", "LOCAL_RANK": "1"}, "LOCAL_RANK is '1', but RANK is not set"),
        ({"LOCAL_RANK": "zero"}, "LOCAL_RANK is 'zero', but RANK is not set"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK is '', but RANK is not set"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "LOCAL_RANK is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "LOCAL_RANK is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "2"}, r"LOCAL_RANK is '2': .* from 0 to 1"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "zero"}, r"LOCAL_RANK is 'zero'"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": " "}, "MASTER_ADDR does not say"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "a"}, "MASTER_PORT is not set"),
        (
            {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "0"},
            "MASTER_PORT is '0'",
        ),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "-1"}, r"LOCAL_RANK is '-1'"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "MASTER_ADDR does not say where they meet"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "http"},
            r"MASTER_PORT is 'http'",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "70000"},
            r"MASTER_PORT is '70000': .* 65535",
        ),
    ],
)
def test_an_environment_that_makes_no_sense_is_named(monkeypatch, variables, said):
    set_launcher(monkeypatch, variables)
    with pytest.raises(LaunchError, match=said):
        launch_environment()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"WORLD_SIZE": "1"}, None),
        ({"LOCAL_RANK": "0"}, None),
        ({"WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": "http"}, None),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "node-0", "MASTER_PORT": "29500"},
            LaunchEnvironment(1, 2, 0, "node-0", 29500),
        ),
    ],
)
def test_the_place_that_a_launcher_gives(monkeypatch, variables, expected):
    set_launcher(monkeypatch, variables)
    assert launch_environment() == expected


@pytest.mark.parametrize(
    ("asked", "gpus_here", "found"),
    [
        (None, True, "cuda"),
        (None, False, "cpu"),
        ("cpu", True, "cpu"),
        ("cpu", False, "cpu"),
        ("cuda", True, "cuda"),
    ],
)
def test_the_device_is_the_one_that_is_asked_for_or_here(monkeypatch, asked, gpus_here, found):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    if asked is not None:
        monkeypatch.setenv("DS_ACCELERATOR", asked)
    assert launcher.accelerator(gpus_here=gpus_here) == found


@pytest.mark.parametrize("asked", ["cuda", "nonsense", "", "CPU", "xpu", "cuda:0"])
def test_a_device_that_is_not_here_is_an_error(monkeypatch, asked):
    monkeypatch.setenv("DS_ACCELERATOR", asked)
    with pytest.raises(LaunchError, match=f"DS_ACCELERATOR is '{asked}'.*: set it to cpu"):
        launcher.accelerator(gpus_here=False)


def test_deepspeed_does_not_look_for_a_device_that_is_not_here(run_file):
    """In a process of its own, as DeepSpeed is imported once."""
    program = "import sys; sys.modules['deepspeed'] = None; from launch.__main__ import main; main(sys.argv[1:])"
    env = os.environ | {"DS_ACCELERATOR": "cuda", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", program, "train", "lightningdit", run_file]
    done = subprocess.run(command, env=env, text=True, capture_output=True, timeout=120)
    assert done.stderr.startswith("error: DS_ACCELERATOR is 'cuda', but this process sees no")


@pytest.mark.parametrize("program", ["status", "export", "quickstart"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_program_of_one_process_refuses_to_be_several(monkeypatch, capsys, program, rank):
    set_launcher(monkeypatch, dict(zip(VARIABLES, (str(rank), "2", str(rank), "node-0", "29500"), strict=True)))
    assert main([program]) == 2
    said = f"error: {program} runs as one process, and WORLD_SIZE is 2: start it with `python -m launch`"
    assert (said in capsys.readouterr().err) is (rank == 0)


@pytest.mark.parametrize("known_after", [0, 3, None])
def test_a_name_that_nobody_knows_is_waited_for_and_named(monkeypatch, caplog, known_after):
    """Names of a cluster's machines may become known late."""
    now, asked = [0.0], []

    def look_up(address, port):
        asked.append(address)
        if known_after is None or len(asked) <= known_after:
            raise OSError(-2, "Name or service not known")

    monkeypatch.setattr(processes.socket, "getaddrinfo", look_up)
    monkeypatch.setattr(processes.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(processes.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    if known_after is None:
        with pytest.raises(LaunchError, match="MASTER_ADDR is 'node-0', a name that does not resolve here"):
            processes.rendezvous(LaunchEnvironment(1, 2, 0, "node-0", 29500))
        assert now[0] == pytest.approx(processes.HOSTNAME_TIMEOUT, abs=2)
    else:
        processes._await_hostname("node-0")
        assert len(asked) == known_after + 1
    assert len(caplog.records) == (known_after != 0)


def _launch_below(argv: list[str], port: int) -> None:
    """A launcher: starts the program as its child, and only waits."""
    if os.fork() == 0:
        os.environ |= {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        from launch.__main__ import run

        run(argv)
    os.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_ends_with_its_launcher_and_keeps_what_it_has(tmp_path, run_file, number):
    from tests.children import _context as forkserver
    from tests.children import free_port

    argv = ["train", "lightningdit", run_file, "train.max_steps=1000000", "train.log_every=1"]
    parent = forkserver.Process(target=_launch_below, args=(argv, free_port()))
    lock = tmp_path / "run" / ".lock"
    with started(parent):
        assert eventually(lambda: (tmp_path / "run/metrics.jsonl").exists() and rows(tmp_path / "run"), 240)
        child = json.loads(lock.read_text())["pid"]
        assert child != parent.pid and alive(child)
        os.kill(parent.pid, number)
        parent.join(60)
        assert eventually(lambda: not alive(child), 240), "the run goes on without its launcher"
    assert checkpoint.newest(tmp_path / "run/checkpoints").state["step"] > 0 and not lock.exists()


@pytest.mark.parametrize(
    ("variables", "nohup", "parent", "follows"),
    [
        ({"RANK": "0"}, False, "python", True),
        ({"RANK": "0"}, True, "python", True),
        ({"RANK": "0"}, False, "bash", True),
        ({"RANK": "0"}, True, "bash", False),
        ({}, False, "python", False),
    ],
)
def test_who_follows_the_process_that_started_it(monkeypatch, variables, nohup, parent, follows):
    """A launcher's ranks, also below nohup; not what a person starts, nor what a shell started to outlive it."""
    followed = []
    monkeypatch.setattr(launcher, "signal_on_parent_exit", lambda number, pid: followed.append((number, pid)))
    monkeypatch.setattr(launcher.process_table, "name", lambda pid: parent)
    monkeypatch.delenv("RANK", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
    try:
        launcher.exit_with_launcher()
    finally:
        signal.signal(signal.SIGHUP, former)
    assert followed == ([(signal.SIGTERM, os.getppid())] if follows else [])


def _watch(pid: int, other: int | None, ready) -> None:
    launcher._signal_when_ended(pid, os.getpid() if other is None else other)
    ready.set()
    time.sleep(600)


@pytest.mark.parametrize("ended", ["runner", "launcher"])
def test_the_end_of_the_runner_stops_us_and_that_of_the_launcher_stops_the_runner(ended):
    """The runner would end with 0 where its launcher was killed."""
    runner, parent = (_fork.Process(target=time.sleep, args=(600,)) for _ in range(2))
    runner.start()
    parent.start()
    watched, other = (runner.pid, None) if ended == "runner" else (parent.pid, runner.pid)
    ready = _fork.Event()
    us = _fork.Process(target=_watch, args=(watched, other, ready))
    us.start()
    assert ready.wait(60) and us.is_alive()
    os.kill(watched, signal.SIGKILL)
    told = us if ended == "runner" else runner
    told.join(60)
    assert told.exitcode == -signal.SIGTERM
    for process in (us, runner, parent):
        process.kill()
        process.join()


def test_deepspeeds_processes_watch_each_other(monkeypatch):
    commands = {os.getppid(): "python -m deepspeed.launcher.launch", 7: "python deepspeed --module launch"}
    watched = []
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(launcher, "signal_on_parent_exit", lambda number, pid: None)
    monkeypatch.setattr(launcher.process_table, "command", commands.get)
    monkeypatch.setattr(launcher.process_table, "parent", {os.getppid(): 7}.get)
    monkeypatch.setattr(launcher, "_signal_when_ended", lambda pid, other: watched.append((pid, other)))
    launcher.exit_with_launcher()
    assert watched == [(7, os.getpid()), (os.getppid(), 7)]


def test_a_checkpoint_slower_than_a_launchers_patience_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(launcher, "_warned", False)
    monkeypatch.setenv("RANK", "0")
    for seconds in (29.0, 41.0, 55.0):
        launcher.warn_of_slow_checkpoint(seconds)
    (message,) = caplog.messages
    assert "took 41 s" in message and "30 s after" in message


# --- the order of leaving


def _leave(tmp: Path, what: str) -> None:
    print_to(str(tmp / "said"))
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    lifetime.EXIT_TIMEOUT = 1.0
    import atexit

    atexit._clear()
    atexit.register(print, "registered")

    def first():
        print("first")
        if what == "hangs":
            time.sleep(600)
        if what == "fails":
            raise RuntimeError("fault of a library")

    if what == "thread":
        threading.Thread(target=time.sleep, args=(600,)).start()
    lifetime.exit_process(0 if what != "status" else 5, first)


@pytest.mark.parametrize(
    ("what", "status", "said"),
    [
        ("nothing", 0, "first\nregistered\n"),
        ("status", 5, "first\nregistered\n"),
        ("thread", 0, "first\nregistered\n"),
        ("hangs", 1, ""),
        ("fails", 1, "first\nregistered\n"),
    ],
)
def test_a_process_leaves_in_order_and_within_seconds(tmp_path, what, status, said):
    process = _fork.Process(target=_leave, args=(tmp_path, what))
    assert exit_code(process) == status
    text = (tmp_path / "said").read_text()
    assert said in text and ("fault of a library" in text) == (what == "fails")
