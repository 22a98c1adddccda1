"""Scripts that start a run again: supervise.sh on commands of all ends, slurm.sbatch between stand-ins of SLURM."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.children import alive

SCRIPTS = Path(__file__).parents[1] / "launch" / "scripts"


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
        ["bash", SCRIPTS / "supervise.sh", command], env=environment, capture_output=True, text=True, timeout=60
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
        (["3 0 1", "6 0 0"], 0, 2),  # the run was done, not what came after it
        (["3 74 74", "3 74 74", "3 74 74", "9 0 0"], 74, 3),
        (["3 74 74", "3 74 74", "4 74 74", "3 74 74", "9 0 0"], 0, 5),
        (["- - 1", "- - 1", "9 0 0"], 1, 2),
    ],
)
def test_a_command_is_started_again_until_it_is_done_or_useless(tmp_path, plan, status, starts):
    assert supervise(tmp_path, plan)[:2] == (status, starts)


def test_why_it_is_not_started_again_is_said(tmp_path):
    assert 'ended with status 2 (a, "b"): not started again' in supervise(tmp_path, ["3 2 1"])[2]
    assert "no progress since step 3 in 2 starts: given up" in supervise(tmp_path, ["3 74 1"] * 4)[2]


def test_rows_of_the_log_are_progress_too(tmp_path):
    (tmp_path / "run").mkdir()
    rows = [{"step": step, "last_step": 900} for step in (1, 2)]
    (tmp_path / "run/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = supervise(tmp_path, ["- - 1"] * 9, RUN_DIR=str(tmp_path / "run"))[2]
    assert "no progress since step 2 in 2 starts" in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGKILL])
def test_a_signal_goes_to_the_command_and_ends_both(tmp_path, number):
    """SIGKILL ends the supervisor, and the command gets SIGTERM."""
    got = tmp_path / "got"
    names = "TERM INT USR1"
    trap = f'for name in {names}; do trap "echo $name >>{got}; exit 75" $name; done'
    command = program(tmp_path / "command", f"{trap}\necho $$ >{tmp_path / 'pid'}\nwhile :; do sleep 0.05; done")
    supervisor = subprocess.Popen(["bash", SCRIPTS / "supervise.sh", command], env=os.environ | {"PAUSE": "0"})
    end = time.monotonic() + 30
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < end
        time.sleep(0.02)
    supervisor.send_signal(number)
    status = supervisor.wait(timeout=30)
    pid = int((tmp_path / "pid").read_text())
    while alive(pid):
        assert time.monotonic() < end, "the command goes on"
        time.sleep(0.02)
    assert status == (75 if number != signal.SIGKILL else -signal.SIGKILL)
    assert got.read_text().split() == [{signal.SIGKILL: "TERM"}.get(number, number.name.removeprefix("SIG"))]


# --- SLURM

SRUN = """
while [[ "$1" == --* ]]; do shift; done
for task in 0 1; do
    SLURM_PROCID=$task SLURM_NTASKS=2 SLURM_LOCALID=$task "$@" &
done
wait
exit "$(cat "{directory}/status")"
"""
TASK = """
echo "$RANK $WORLD_SIZE $LOCAL_RANK $MASTER_ADDR $MASTER_PORT $*" >>"{directory}/tasks"
[ "$RANK" != 0 ] || cat "{directory}/own" >"$LIGHTNINGDIT_LAST_EXIT"
"""
SCONTROL = """
if [ "$1" = show ]; then printf 'node-3\\nnode-4\\n'; else echo "$*" >>"{directory}/requeued"; fi
"""


def sbatch(tmp_path: Path, status: int, own: int | None, **env: str) -> subprocess.CompletedProcess:
    """Run the job's script as SLURM would on its first node, with tasks that end so."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "task": TASK}.items():
        program(tmp_path / name, text.format(directory=tmp_path))
    (tmp_path / "status").write_text(str(status))
    (tmp_path / "own").write_text("" if own is None else f'{{\n "status": {own},\n "reason": "x"\n}}\n')
    root = tmp_path / "root"
    (root / "launch/scripts").mkdir(parents=True)
    (root / "launch/scripts/environment.sh").write_text(f"PYTHON={tmp_path / 'task'}\n")
    slurm = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "node-[3-4]", "SLURM_SUBMIT_DIR": str(root), **env}
    environment = os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", SCRIPTS / "slurm.sbatch", "train", "lightningdit", "my run.yaml"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


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
    ],
)
def test_a_job_is_put_back_where_another_start_goes_on(tmp_path, status, own, requeued):
    done = sbatch(tmp_path, status, own)
    assert (tmp_path / "requeued").exists() is requeued, done.stderr
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 123456\n" and done.returncode == 0
    else:
        assert done.returncode == (own if own is not None else status)
    tasks = sorted((tmp_path / "tasks").read_text().splitlines())
    ends = "node-3 23456 -m launch train lightningdit my run.yaml"
    assert tasks == [f"0 2 0 {ends}", f"1 2 1 {ends}"]
    assert not list((tmp_path / "root").glob(".last_exit*"))


def test_a_job_is_not_put_back_for_ever(tmp_path):
    done = sbatch(tmp_path, 75, 75, SLURM_RESTART_COUNT="4", MAX_RESTARTS="4")
    assert done.returncode == 75 and not (tmp_path / "requeued").exists() and "not again" in done.stderr


def test_the_warning_reaches_the_tasks_and_the_log_is_kept():
    options = [line for line in (SCRIPTS / "slurm.sbatch").read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"#SBATCH --requeue", "#SBATCH --signal=USR1@180", "#SBATCH --open-mode=append"} <= set(options)


@pytest.mark.skipif(sys.prefix == sys.base_prefix, reason="needs to run in a virtual environment")
def test_elastic_needs_an_address_for_several_nodes(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "MASTER_ADDR"}
    environment |= {"NODES": "2", "VIRTUAL_ENV": sys.prefix, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(["bash", SCRIPTS / "elastic.sh", "train"], env=environment, capture_output=True, text=True)
    assert done.returncode and "MASTER_ADDR" in done.stderr
