"""`python -m tests.lost_ranks [CASE …]`: what ends a run of three processes, one case after the other.

Each case trains, harms the run once, and looks at what is left: all processes gone within a minute, one message on
standard error, the documented status, and a start anew that loses only the steps since the last whole checkpoint.
The run's processes are started by `tests.starter`, which ends none of them itself. Cases that fill the disk need a
tmpfs, which only root can mount; elsewhere they are skipped, and that is said. All take some minutes.
"""

import argparse
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from launch.runtime import exit_status, process_table
from launch.training import checkpoint
from tests import toy
from tests.children import all_ended
from tests.random_kills import last_step, program, ranks
from tests.starter import start, stop

PROCESSES, LIMIT, START_LIMIT = 3, 60.0, 180.0
Harm = Callable[[Path, list[int]], None]


def send(number: int, rank: int) -> Harm:
    return lambda run, pids: os.kill(pids[rank], number)


def send_to_watchdog_too(number: int, rank: int) -> Harm:
    """As where a whole machine is gone: nothing of the process answers."""

    def harm(run: Path, pids: list[int]) -> None:
        children = Path(f"/proc/{pids[rank]}/task/{pids[rank]}/children").read_text().split()
        for pid in [*map(int, children), pids[rank]]:
            os.kill(pid, number)

    return harm


def kill_starter(run: Path, pids: list[int]) -> None:
    parent = process_table.parent(pids[0])
    assert parent > 1, f"process {pids[0]} has ended"  # 0 would be all of this group
    os.kill(parent, signal.SIGKILL)


def stop_a_rank_and_kill_starter(run: Path, pids: list[int]) -> None:
    os.kill(pids[1], signal.SIGSTOP)
    kill_starter(run, pids)


def move_directory(run: Path, pids: list[int]) -> None:
    run.rename(run.with_name("moved"))


def fill(run: Path, pids: list[int]) -> None:
    """Leave no room on the run's file system."""
    with suppress(OSError), open(run.parent / "ballast", "wb", buffering=0) as f:
        while True:
            f.write(bytes(1 << 12))


@dataclass(frozen=True)
class Case:
    """harm: done to a run once five steps are in its log; said: in the one message, if any; settings: of the run.

    status: of the starter, that of the first process to end: where one is lost its own (137, killed) or 74.
    goes_on: whether the run's directory is there for a start anew; tmpfs: whether it has to be a small file system.
    """

    harm: Harm
    status: int
    said: str
    settings: tuple[str, ...] = ()
    goes_on: bool = True
    tmpfs: bool = False


EVERY_CHECKPOINT, NO_CHECKPOINT = ("train.ckpt_every=5",), ("train.ckpt_every=100000",)
CASES = {
    "killed": Case(send(signal.SIGKILL, 1), 137, "was killed or ended without a word"),
    "killed_main": Case(send(signal.SIGKILL, 0), 137, "rank 0 (process"),
    "stopped": Case(send(signal.SIGSTOP, 2), 74, "has been stopped for 5 s"),
    "stopped_main": Case(send(signal.SIGSTOP, 0), 74, "has been stopped for 5 s"),
    "silent": Case(send_to_watchdog_too(signal.SIGSTOP, 2), 137, "has not answered for 5 s"),
    "silent_main": Case(send_to_watchdog_too(signal.SIGSTOP, 0), 137, "has not answered for 5 s"),
    "signal": Case(send(signal.SIGUSR1, 2), 75, "", NO_CHECKPOINT),
    "launcher_killed": Case(kill_starter, -9, "", NO_CHECKPOINT),
    "launcher_killed_beside_a_stopped_rank": Case(stop_a_rank_and_kill_starter, -9, "has been stopped for 5 s"),
    "directory_gone": Case(move_directory, 2, "is gone", goes_on=False),
    "full_at_log": Case(fill, 2, "metrics.jsonl: No space left", (*NO_CHECKPOINT,), tmpfs=True),
    "full_at_checkpoint": Case(fill, 2, "No space left", ("train.ckpt_every=5", "train.log_every=4"), tmpfs=True),
    "full_at_validation": Case(fill, 2, "No space left", ("train.valid_every=2", "train.log_every=100000"), tmpfs=True),
}


@contextmanager
def tmpfs(directory: Path):
    """A small file system below `directory`; raises PermissionError where none can be mounted."""
    directory.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(directory)], capture_output=True)
    if done.returncode:
        raise PermissionError(done.stderr.decode().strip())
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def harm_and_look(directory: Path, name: str) -> list[str]:
    """Carry out a case below `directory` → sentences on what is wrong, empty where nothing is."""
    case, latents = CASES[name], toy.write_latents(directory / "latents")
    train = {
        "output_dir": str(directory / "out"),
        "max_steps": 20_000,
        "ckpt_every": 2,
        "keep_checkpoints": 2,
        "global_batch_size": 12,
    }
    data = {"data_path": str(latents), **({"valid_path": str(latents)} if "valid" in name else {})}
    train |= {"heartbeat_timeout": 5.0}
    config = toy.write_run(directory / "run.yaml", toy.LIGHTNINGDIT, data=data, train=train)
    command = [*program(config, "run"), *case.settings]
    run, said = directory / "out/run", directory / "said"
    launcher = start(PROCESSES, command, said)
    try:
        pids = _wait_for_training(run, launcher, said)
        case.harm(run, pids)
        begin = time.monotonic()
        launcher.join(LIMIT + 10)
        status = launcher.exitcode
        gone = all_ended(pids, within=max(begin + LIMIT - time.monotonic(), 0))
    finally:
        stop(launcher)
    wrong = _look(case, status, said.read_text(), gone)
    if case.tmpfs:
        (run.parent / "ballast").unlink()
    if case.goes_on:
        wrong += _start_anew(case, run, command, said)
    return wrong


def _wait_for_training(run: Path, launcher: multiprocessing.Process, said: Path) -> list[int]:
    """The processes of the run, once five steps are in its log, be it by rows of validation."""
    end = time.monotonic() + START_LIMIT
    while time.monotonic() < end and launcher.is_alive():
        if last_step(run) >= 5 and len(pids := ranks(run)) == PROCESSES:
            return pids
        time.sleep(0.02)
    raise RuntimeError(f"no training (status {launcher.exitcode}): {said.read_text()[-2000:]}")


def _look(case: Case, status: int | None, said: str, gone: bool) -> list[str]:
    wrong = [] if gone else [f"not all processes were gone within {LIMIT:g} s"]
    statuses = (74, 137) if case.status in (74, 137) else (case.status,)
    if status not in statuses:
        wrong.append(f"status {status}, not {statuses}")
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    if "Traceback" in said or len(errors) != bool(case.said) or case.said not in "".join(errors):
        wrong.append(f"said {errors}, traceback {'Traceback' in said}: {said[-1500:]}")
    return wrong


def _start_anew(case: Case, run: Path, command: list[str], said: Path) -> list[str]:
    """Go on for two steps, and see from where."""
    record = json.loads((run / "last_exit.json").read_text()) if (run / "last_exit.json").exists() else {}
    wrong = []
    expected = {137: exit_status.LOST_PEER}.get(case.status, case.status)
    if case.status >= 0 and record.get("status") not in (expected, *([None] if case.tmpfs else [])):
        wrong.append(f"last_exit.json says {record}")
    newest = checkpoint.newest(run / "checkpoints")
    step = newest.step if newest else 0
    if case.harm is not fill and step == 0:
        wrong.append("there is no checkpoint")
    again = start(PROCESSES, [*command, f"train.max_steps={step + 2}"], said)
    try:
        again.join(START_LIMIT)
    finally:
        stop(again)
    text = said.read_text()
    if again.exitcode != 0 or (step and not re.search(rf"resumed .*step_{step:07d}\b", text)):
        wrong.append(f"started anew: status {again.exitcode}, {text[-1500:]}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.lost_ranks", description=__doc__)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], metavar="CASE", default=[])
    failed = 0
    for name in parser.parse_args().cases or CASES:
        begin = time.monotonic()
        with tempfile.TemporaryDirectory() as directory:
            try:
                with tmpfs(Path(directory) / "out") if CASES[name].tmpfs else nullcontext():
                    wrong = harm_and_look(Path(directory), name)
            except PermissionError as e:
                print(f"{name}: skipped, no tmpfs: {e}")
                continue
        print(f"{name}: {'; '.join(wrong) or 'as it should'} ({time.monotonic() - begin:.0f} s)", flush=True)
        failed += bool(wrong)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
