"""Real child processes of a triage: they end in time with all they have started, and print tracebacks."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.triage.processes import Child, Ended, command

ROOT = Path(__file__).parents[1]
IGNORES_SIGTERM = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("started", child.pid, flush=True)
time.sleep(60)
"""
EXITS_ON_SIGTERM = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(5))
print("up", flush=True)
time.sleep(60)
"""
LEAVES_A_CHILD = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("left", child.pid, flush=True)
"""


def ended(child: Child, patience: float = 20.0) -> Ended:
    until = time.monotonic() + patience
    while time.monotonic() < until:
        if (found := child.poll()) is not None:
            return found
        time.sleep(0.01)
    child.kill()
    raise AssertionError("it did not end")


def gone(pid: int, patience: float = 5.0) -> bool:
    """Whether nobody runs under that number, or only what is to be buried."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def word_after(log: Path, word: str) -> int:
    return int(log.read_text().split(word)[1].split()[0])


def test_a_child_that_ends_by_itself(tmp_path):
    log = tmp_path / "log"
    found = ended(Child([sys.executable, "-c", "import sys; print('here'); sys.exit(3)"], log, 20))
    assert (found.status, found.why) == (3, "") and 0 < found.seconds < 20 and log.read_text() == "here\n"
    crashed = ended(Child([sys.executable, "-c", "import os; os.abort()"], log, 20))
    assert (crashed.status, crashed.why) == (-signal.SIGABRT, "")


def test_a_child_that_ignores_sigterm_is_killed_with_its_own_children(tmp_path):
    log = tmp_path / "log"
    child = Child([sys.executable, "-c", IGNORES_SIGTERM], log, limit=3.0, grace=0.3)
    found = ended(child)
    assert (found.status, found.why) == (-signal.SIGKILL, "timeout") and 3.3 <= found.seconds < 15
    assert gone(word_after(log, "started"))


def test_processes_of_a_child_end_with_it(tmp_path):
    log = tmp_path / "log"
    found = ended(Child([sys.executable, "-c", LEAVES_A_CHILD], log, 20))
    assert (found.status, found.why) == (0, "") and gone(word_after(log, "left"))


def test_a_stopped_child_may_end_in_order(tmp_path):
    log = tmp_path / "log"
    child = Child([sys.executable, "-c", EXITS_ON_SIGTERM], log, 20)
    while "up" not in log.read_text():
        time.sleep(0.01)
    child.stop()
    assert (ended(child).status, ended(child).why) == (5, "stopped")


def test_a_child_is_in_a_session_of_its_own(tmp_path):
    """Ctrl-C reaches the coordinator alone, which ends children in order."""
    log = tmp_path / "log"
    ended(Child([sys.executable, "-c", "import os; print(os.getsid(0) == os.getpid())"], log, 20))
    assert log.read_text() == "True\n"


def test_a_hung_module_says_where_it_hangs(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "hangs.py").write_text("import time\n\ndef waits_for_ever():\n    time.sleep(60)\n\nwaits_for_ever()\n")
    log = tmp_path / "log"
    child = Child(command("hangs", [], limit=4.0), log, limit=4.0, grace=0.3)
    assert ended(child).why == "timeout" and "waits_for_ever" in log.read_text()


def test_a_child_that_nothing_ends_is_given_up(tmp_path, monkeypatch):
    """As one that waits for a driver; here, SIGKILL does not reach it."""
    child = Child([sys.executable, "-c", IGNORES_SIGTERM], tmp_path / "log", limit=1.0, grace=0.3)
    with monkeypatch.context() as patched:
        patched.setattr(os, "killpg", lambda *arguments: None)
        found = ended(child)
    assert (found.status, found.why) == (-signal.SIGKILL, "timeout") and 1.6 <= found.seconds < 15
    child.kill()


def test_a_child_does_not_outlive_a_killed_coordinator(tmp_path):
    (tmp_path / "deaf.py").write_text(IGNORES_SIGTERM)
    program = """
import sys, time
from pathlib import Path
from bench.triage.processes import Child, command
child = Child(command("deaf", [], 60), Path(sys.argv[1]), 60)
print(child._process.pid, flush=True)
time.sleep(60)
"""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    words = [sys.executable, "-c", program, str(tmp_path / "log")]
    running = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)
    pid = int(running.stdout.readline())
    while "started" not in (tmp_path / "log").read_text():
        time.sleep(0.02)
    running.kill()
    running.communicate()
    assert gone(pid)
    os.kill(word_after(tmp_path / "log", "started"), signal.SIGKILL)


def test_a_module_runs_as_if_it_were_called_by_name(tmp_path):
    (tmp_path / "says.py").write_text(
        "import sys\nprint(vars(sys.modules['__main__']) is globals(), sys.argv[1:])\nsys.exit(4)\n"
    )
    done = subprocess.run(
        command("says", ["--a", "b c"], 20),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"},
    )
    assert (done.returncode, done.stdout) == (4, "True ['--a', 'b c']\n"), done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_coordinator_ends_its_children(number, tmp_path):
    """The program itself, at its first child, which here hangs and hears nothing."""
    (tmp_path / "deaf.py").write_text(IGNORES_SIGTERM)
    out = tmp_path / "out"
    program = f"""
import sys
from functools import partial
from bench.triage import __main__ as program
from bench.triage.parts import Part
from bench.triage.processes import Child
from bench.triage.tasks import Task
program.Triage = partial(program.Triage, start=partial(Child, grace=0.3))
program.first_parts = lambda: (Part("first", 20, (Task("deaf", "deaf", takes=()),)),
                         Part("second", 20, (Task("next", "deaf"),)))
sys.exit(program.main([{str(out)!r}]))
"""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}", "TMPDIR": str(tmp_path)}
    running = subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True)
    deadline, said = time.monotonic() + 20, ""
    while time.monotonic() < deadline and "started" not in said:
        time.sleep(0.05)
        said = "".join(log.read_text() for log in tmp_path.glob("triage-*/logs/first-deaf.log"))
    pid = int(said.split("started")[1].split()[0])
    running.send_signal(number)
    printed, _ = running.communicate(timeout=20)
    assert running.returncode == 128 + number, printed
    assert gone(pid) and not list(tmp_path.glob("triage-*"))
    assert {path.name for path in out.iterdir()} == {"rows.jsonl", "summary.txt", "log.txt", "logs.tgz"}
    rows = (out / "rows.jsonl").read_text()
    assert "the run was stopped" in rows and signal.Signals(number).name in rows and '"second"' in rows
