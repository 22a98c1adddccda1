"""Scripts that start a run again: supervise.sh on commands of all ends, slurm.sbatch between stand-ins of SLURM."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.children import alive, eventually, running

SCRIPTS = Path(__file__).parents[1] / "launch" / "scripts"
#: For the environment: what a signal is handed on to ends before the handing on does.
SLOW_KILL = {"BASH_FUNC_kill%%": '() { builtin kill "$@"; local status=$?; sleep 0.3; return $status; }'}


def program(path: Path, text: str) -> Path:
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return path


#: Ends as the next line of `plan` says: step reached (or -), status of the run (or null, or -), status of the launcher.
COMMAND = """
cd "{directory}"
read -r step own status <<<"$(sed -n "$(($(wc -l <starts) + 1))p" plan)"
echo start >>starts
mkdir -p run/checkpoints
[ "$step" = - ] || mkdir -p "run/checkpoints/step_$(printf %07d "$step")"
[ "$step" = - ] || touch "run/checkpoints/step_$(printf %07d "$step")/manifest.json"
[ "$own" = - ] || sed "s/STATUS/$own/" own >"$LIGHTNINGDIT_LAST_EXIT"
exit "$status"
"""


def supervise(tmp_path: Path, plan: list[str], **env: str) -> tuple[int, int, str]:
    """Run a command that ends as planned → the status, the number of starts, what was said."""
    (tmp_path / "plan").write_text("\n".join(plan) + "\n")
    (tmp_path / "starts").write_text("")
    own = {"status": "STATUS", "reason": 'a, "b"', "step": 1, "directory": str(tmp_path / "run")}
    (tmp_path / "own").write_text(json.dumps(own, indent=1).replace('"STATUS"', "STATUS"))
    command = program(tmp_path / "command", COMMAND.format(directory=tmp_path))
    environment = os.environ | {"PAUSE": "0", "MAX_STARTS": "2", **env}
    done = subprocess.run(
        ["bash", SCRIPTS / "supervise.sh", command], env=environment, capture_output=True, text=True, timeout=120
    )
    return done.returncode, len((tmp_path / "starts").read_text().splitlines()), done.stderr


@pytest.mark.parametrize(
    ("plan", "status", "starts"),
    [
        (["3 0 0"], 0, 1),
        (["3 75 75", "6 74 247", "9 0 0"], 0, 3),
        (["3 75 0", "6 null 0", "9 0 0"], 0, 3),  # a launcher that ends with 0 all the same
        (["3 - 137", "6 0 0"], 0, 2),
        (["3 2 1", "6 0 0"], 2, 1),
        (["3 65 1", "6 0 0"], 65, 1),
        (["3 130 1", "6 0 0"], 130, 1),
        (["- - 69", "6 0 0"], 0, 2),
        (["3 0 1", "6 0 0"], 0, 2),  # the run was done, not what came after it
        (["3 74 74", "3 74 74", "3 74 74", "9 0 0"], 74, 3),
        (["3 74 74", "3 74 74", "4 74 74", "3 74 74", "9 0 0"], 0, 5),
        (["- - 1", "- - 1", "9 0 0"], 1, 2),
    ],
)
def test_a_command_is_started_again_until_it_is_done_or_useless(tmp_path, plan, status, starts):
    assert supervise(tmp_path, plan)[:2] == (status, starts)


@pytest.mark.parametrize("starts", ["08", "0x8", "", "99999999999999999999"])
def test_a_number_of_starts_is_decimal(tmp_path, starts):
    status, made, said = supervise(tmp_path, ["3 74 1"] * 10, MAX_STARTS=starts, PAUSE="00")
    if starts in ("08", ""):
        assert (status, made) == (74, 9 if starts else 6) and "line" not in said
    else:
        assert (status, made) == (2, 0) and f"MAX_STARTS {starts}" in said and "whole numbers" in said


def test_why_it_is_not_started_again_is_said(tmp_path):
    assert "ended with status 2: not started again" in supervise(tmp_path, ["- - 2"])[2]
    assert 'ended with status 2 (a, "b"): not started again' in supervise(tmp_path, ["3 2 1"])[2]
    assert "no progress since step 3 in 2 starts: given up" in supervise(tmp_path, ["3 74 1"] * 4)[2]


def test_a_directory_that_is_in_use_is_given_minutes(tmp_path):
    slept = {"BASH_FUNC_sleep%%": f'() {{ echo "$1" >>{tmp_path / "slept"}; }}'}
    assert supervise(tmp_path, ["- - 69", "3 74 74", "9 0 0"], PAUSE="2", **slept)[:2] == (0, 3)
    assert (tmp_path / "slept").read_text().split() == ["120", "2"]


def test_a_signal_while_another_start_waits_for_the_lock_is_not_lost(tmp_path):
    (tmp_path / "run").mkdir()
    owner = {"host": os.uname().nodename, "pid": os.getpid()}
    (tmp_path / "run/.lock").write_text(json.dumps(owner))
    command = program(tmp_path / "command", f"echo start >>{tmp_path / 'starts'}\nexit 74")
    slept = {"BASH_FUNC_sleep%%": f'() {{ echo "$1" >>{tmp_path / "slept"}; command sleep "$1"; }}'}
    environment = os.environ | {"PAUSE": "0", "RUN_DIR": str(tmp_path / "run")} | slept
    with running(["bash", SCRIPTS / "supervise.sh", command], env=environment) as supervisor:
        assert eventually(lambda: (tmp_path / "slept").exists() and "1" in (tmp_path / "slept").read_text())
        supervisor.send_signal(signal.SIGTERM)
        assert supervisor.wait(timeout=50) == 74  # the lock is waited for a minute
    assert (tmp_path / "starts").read_text() == "start\n"


def test_rows_of_the_log_are_progress_too(tmp_path):
    (tmp_path / "run").mkdir()
    rows = [{"step": step, "last_step": 900} for step in (1, 2)]
    (tmp_path / "run/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = supervise(tmp_path, ["- - 1"] * 9, RUN_DIR=str(tmp_path / "run"))[2]
    assert "no progress since step 2 in 2 starts" in said


@pytest.mark.parametrize(
    ("number", "handed_on"),
    [
        (signal.SIGTERM, "TERM"),
        (signal.SIGINT, "INT"),
        (signal.SIGUSR1, "TERM"),
        (signal.SIGHUP, "TERM"),
        (signal.SIGKILL, "TERM"),
    ],
)
def test_a_signal_goes_to_the_command_and_ends_both(tmp_path, number, handed_on):
    """Launchers die of SIGUSR1 and SIGHUP, while the run still saves. SIGKILL ends the supervisor."""
    got = tmp_path / "got"
    names = "TERM INT USR1 HUP"
    trap = f'for name in {names}; do trap "echo $name >>{got}; exit 75" $name; done'
    command = program(tmp_path / "command", f"{trap}\necho $$ >{tmp_path / 'pid'}\nwhile :; do sleep 0.05; done")
    environment = os.environ | {"PAUSE": "0"} | SLOW_KILL
    with running(["bash", SCRIPTS / "supervise.sh", command], env=environment) as supervisor:
        assert eventually(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
        supervisor.send_signal(number)
        status = supervisor.wait(timeout=120)
    pid = int((tmp_path / "pid").read_text())
    assert eventually(lambda: not alive(pid)), "the command goes on"
    assert status == (75 if number != signal.SIGKILL else -signal.SIGKILL)
    assert got.read_text().split() == [handed_on]


# --- SLURM

SRUN = """
while [[ "$1" == --* ]]; do echo "$1" >>"{directory}/options"; shift; done
trap 'builtin kill -USR1 $(jobs -p)' USR1
trap 'builtin kill -KILL $(jobs -p); exit 137' TERM HUP
for task in 0 1; do
    SLURM_PROCID=$task SLURM_NTASKS=2 SLURM_LOCALID=$task "$@" &
done
until wait; do :; done
exit "$(cat "{directory}/status")"
"""
TASK = """
trap 'warned=1' USR1
echo "$RANK $WORLD_SIZE $LOCAL_RANK $MASTER_ADDR $MASTER_PORT $*" >>"{directory}/tasks"
for ((i = 0; i < 2400; i++)); do [ -e "{directory}/until_warned" ] && [ -z "$warned" ] && sleep 0.05 || break; done
[ "$RANK" != 0 ] || cat "{directory}/own" >"$LIGHTNINGDIT_LAST_EXIT"
"""
SCONTROL = """
if [ "$1" = show ]; then printf 'node-3\\nnode-4\\n'; else echo "$*" >>"{directory}/requeued"; fi
"""


def sbatch(tmp_path: Path, status: int, own: int | str | None, **env: str) -> dict:
    """A command, and its environment: the job's script as SLURM runs it on its first node, with tasks that end so."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "task": TASK}.items():
        program(tmp_path / name, text.format(directory=tmp_path))
    (tmp_path / "status").write_text(str(status))
    (tmp_path / "own").write_text("" if own is None else f'{{\n "status": {own},\n "reason": "x"\n}}\n')
    root = tmp_path / "root"
    (root / "launch/scripts").mkdir(parents=True)
    (root / "launch/scripts/environment.sh").write_text(f"PYTHON={tmp_path / 'task'}\n")
    slurm = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "node-[3-4]", "SLURM_SUBMIT_DIR": str(root)}
    environment = os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | env
    command = ["bash", SCRIPTS / "slurm.sbatch", "train", "lightningdit", "my run.yaml"]
    return {"args": command, "env": environment}


def finished(command: dict) -> subprocess.CompletedProcess:
    return subprocess.run(**command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("status", "own", "requeued"),
    [
        (0, 0, False),
        (75, 75, True),
        (137, 74, True),
        (74, None, True),
        (2, 2, False),
        (65, 65, False),
        (137, None, False),
        (137, "null", True),
    ],
)
def test_a_job_is_put_back_where_another_start_goes_on(tmp_path, status, own, requeued):
    done = finished(sbatch(tmp_path, status, own, SLURM_CPUS_PER_TASK="12"))
    assert (tmp_path / "requeued").exists() is requeued, done.stderr
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 123456\n" and done.returncode == 0
    else:
        assert done.returncode == (own if own is not None else status)
    tasks = sorted((tmp_path / "tasks").read_text().splitlines())
    ends = "node-3 23456 -m launch train lightningdit my run.yaml"
    assert tasks == [f"0 2 0 {ends}", f"1 2 1 {ends}"]
    assert not list((tmp_path / "root").glob(".last_exit*"))
    options = (tmp_path / "options").read_text().split()
    assert options == ["--kill-on-bad-exit=0", "--wait=120", "--cpus-per-task=12"]


def test_a_signal_to_the_script_has_the_tasks_save(tmp_path):
    """srun kills them at a SIGTERM, and hands SIGUSR1 on."""
    (tmp_path / "until_warned").touch()
    with running(**sbatch(tmp_path, 75, 75, **SLOW_KILL), stdout=subprocess.PIPE, text=True) as job:
        assert eventually(
            lambda: (tmp_path / "tasks").exists() and len((tmp_path / "tasks").read_text().split("\n")) == 3
        )
        job.send_signal(signal.SIGTERM)
        assert "ended with status 75" in job.communicate(timeout=120)[0]
    assert (tmp_path / "requeued").read_text() == "requeue 123456\n"


def test_a_job_is_not_put_back_for_ever(tmp_path):
    done = finished(sbatch(tmp_path, 75, 75, SLURM_RESTART_COUNT="4", MAX_RESTARTS="4"))
    assert done.returncode == 75 and not (tmp_path / "requeued").exists() and "not again" in done.stderr


def test_the_warning_reaches_the_tasks_and_the_log_is_kept():
    options = [line for line in (SCRIPTS / "slurm.sbatch").read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"#SBATCH --requeue", "#SBATCH --signal=USR1@180", "#SBATCH --open-mode=append"} <= set(options)


@pytest.mark.skipif(sys.prefix == sys.base_prefix, reason="needs to run in a virtual environment")
def test_elastic_needs_an_address_for_several_nodes(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "MASTER_ADDR"}
    environment |= {"NODES": "2", "VIRTUAL_ENV": sys.prefix, "DS_ACCELERATOR": "cpu"}
    done = finished({"args": ["bash", SCRIPTS / "elastic.sh", "train"], "env": environment})
    assert done.returncode and "MASTER_ADDR" in done.stderr
