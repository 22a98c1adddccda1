"""`python -m tests.random_kills [KILLS] [--processes 3]`: SIGKILLs of random processes of a run under supervise.sh.

Each kill hits a process drawn at random, at a step drawn at random; every third one waits until a checkpoint is being
written (there is a `.step_*.tmp`). The rest of the run's processes have to be gone within a minute, each time with one
message, and supervise.sh starts the run again. In the end weights, average, optimizer states and logged losses have to
be those of a run that nobody disturbed, bit for bit. 30 kills (the default) take about five minutes on two idle cores.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from launch.runtime import process_table
from launch.training import checkpoint
from tests import toy
from tests.children import alive
from tests.starter import start, stop

ROOT = Path(__file__).parents[1]
SUPERVISE = ROOT / "launch/scripts/supervise.sh"
STEPS = 6  # steps in which one kill falls
SEED = 15
TIMEOUT = 600.0  # seconds for a start to get to its kill: on a busy machine the imports alone take a minute
KEYS = ("step", "epoch", "images", "loss", "mse", "cos_loss", "grad_norm", "lr", "skipped")


@dataclass
class Outcome:
    """What a series of kills came to: how many landed, in a save too; `wrong`: sentences, empty where all was right."""

    kills: int = 0
    in_a_save: int = 0
    slowest: float = 0.0  # seconds until all other processes were gone
    wrong: list[str] = field(default_factory=list)


def write_run(directory: Path, last_step: int) -> Path:
    """A run whose checkpoints take some tenths of a second."""
    data = {"data_path": str(toy.write_latents(directory / "latents"))}
    train = {"output_dir": str(directory), "max_steps": last_step, "ckpt_every": 3, "keep_checkpoints": 3}
    train["global_batch_size"] = 12  # a multiple of 2, 3 and 4 processes
    model = {"hidden_size": 128, "depth": 4}
    return toy.write_run(directory / "run.yaml", toy.LIGHTNINGDIT, data=data, train=train, model=model)


def program(config: Path, name: str) -> list[str]:
    return ["train", "lightningdit", str(config), f"train.exp_name={name}"]


def starter(config: Path, processes: int, name: str) -> list[str]:
    return [sys.executable, "-m", "tests.starter", str(processes), *program(config, name)]


def ranks(directory: Path) -> list[int]:
    """The processes of the run that holds this directory, by rank; empty where none does."""
    try:
        main = json.loads((directory / ".lock").read_text())["pid"]
    except (OSError, ValueError, KeyError):
        return []
    parent = process_table.parent(main)
    if not alive(main) or " tests." not in process_table.command(parent):
        return []
    try:
        return sorted(map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split()))
    except OSError:
        return []


def last_step(directory: Path) -> int:
    """The step of the last whole row of the log, 0 without any."""
    try:
        lines = (directory / "metrics.jsonl").read_text().splitlines()
        return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)
    except (OSError, ValueError):
        return 0


def being_written(directory: Path) -> bool:
    """Whether a checkpoint is being written by the process that holds the run, not left by one before it."""
    try:
        begun = (directory / ".lock").stat().st_mtime_ns
        return any(each.stat().st_mtime_ns > begun for each in (directory / "checkpoints").glob(".step_*.tmp"))
    except FileNotFoundError:
        return False


def kill_one(run: Path, ranks: list[int], *, in_a_save: bool) -> bool | None:
    """Kill one process → whether a checkpoint was being written; None, and none killed, where it had to be and was not.

    The main process, which writes it, stands still meanwhile.
    """
    os.kill(ranks[0], signal.SIGSTOP)
    try:
        while alive(ranks[0]) and not process_table.is_stopped(ranks[0]):
            time.sleep(0.001)
        saving = being_written(run)
        if in_a_save and not saving:
            return None
        os.kill(random.choice(ranks), signal.SIGKILL)
        return saving
    finally:
        with suppress(ProcessLookupError):
            os.kill(ranks[0], signal.SIGCONT)


def kill_when_due(
    run: Path, step: int, processes: int, *, in_a_save: bool, supervisor: subprocess.Popen, outcome: Outcome
) -> None:
    """Kill one process once the run is at `step`, and see that the others end."""
    end, victims = time.monotonic() + TIMEOUT, []
    while time.monotonic() < end:
        if supervisor.poll() is not None:
            raise RuntimeError(f"the run ended with status {supervisor.returncode} before step {step}")
        due = last_step(run) >= step and len(victims := ranks(run)) == processes
        if due and (not in_a_save or being_written(run)):
            time.sleep(0.0 if in_a_save else random.uniform(0, 0.1))
            if (saving := kill_one(run, victims, in_a_save=in_a_save)) is not None:
                break
        time.sleep(0.0 if due else 0.002)
    else:
        raise RuntimeError(f"no kill at step {step} within {TIMEOUT:g} s")
    begin = time.monotonic()
    outcome.kills += 1
    outcome.in_a_save += saving
    while any(alive(pid) for pid in victims) and time.monotonic() < begin + 60:
        time.sleep(0.01)
    outcome.slowest = max(outcome.slowest, time.monotonic() - begin)
    if left := [pid for pid in victims if alive(pid)]:
        outcome.wrong.append(f"after 60 s still there: {left}")


def differences(one: Path, other: Path, last: int) -> list[str]:
    """Sentences on what is not the same, bit for bit, in two finished runs."""
    found = []
    networks = [checkpoint.newest(each / "checkpoints") for each in (one, other)]
    if [network.step for network in networks] != [last, last]:
        found.append(f"newest checkpoints are of steps {[network.step for network in networks]}, not {last}")
    for name in ("model", "ema", "exp_avg", "exp_avg_sq"):
        files = [(network.path / f"model.{name}.safetensors").read_bytes() for network in networks]
        if files[0] != files[1]:
            found.append(f"{name} differs")
    rows = [[json.loads(line) for line in (each / "metrics.jsonl").read_text().splitlines()] for each in (one, other)]
    losses = [[{key: row[key] for key in KEYS} for row in each if "loss" in row] for each in rows]
    if [row["step"] for row in losses[0]] != list(range(1, last + 1)):
        found.append("the undisturbed run's log does not have each step once")
    if losses[0] != losses[1]:
        found.append("logged losses differ")
    return found


def kill_at_random(directory: Path, kills: int, processes: int = 3) -> Outcome:
    """Train once undisturbed and once under kills, below `directory`."""
    random.seed(SEED)
    outcome, last = Outcome(), STEPS * (kills + 1) + 3
    config = write_run(directory, last)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PAUSE": "0"}
    # A kill in the save of the last step before the next due one makes no progress: several starts may.
    environment["MAX_STARTS"] = "5"
    whole = start(processes, program(config, "whole"), directory / "said")
    try:
        whole.join(TIMEOUT)
    finally:
        stop(whole)
    if whole.exitcode != 0:
        raise RuntimeError(f"status {whole.exitcode}: {(directory / 'said').read_text()[-2000:]}")
    with open(directory / "said", "wb") as said:
        command = ["bash", str(SUPERVISE), *starter(config, processes, "killed")]
        supervisor = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=said)
        try:
            for kill in range(kills):
                step = 1 + STEPS * kill + random.randrange(STEPS)
                in_a_save = kill % 3 == 0
                kill_when_due(
                    directory / "killed", step, processes, in_a_save=in_a_save, supervisor=supervisor, outcome=outcome
                )
            status = supervisor.wait(timeout=TIMEOUT)
        finally:
            supervisor.terminate()  # and the run with it, after a checkpoint
            try:
                supervisor.wait(timeout=60)
            except subprocess.TimeoutExpired:
                supervisor.kill()
    if status != 0:
        outcome.wrong.append(f"supervise.sh ended with status {status}")
    text = (directory / "said").read_text()
    messages = text.count("was killed or ended without a word")
    if messages != kills or text.count("error:") != kills or "Traceback" in text:
        outcome.wrong.append(f"{messages} messages, {text.count('error:')} errors for {kills} kills: {text[-3000:]}")
    outcome.wrong += differences(directory / "whole", directory / "killed", last)
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.random_kills", description=__doc__)
    parser.add_argument("kills", nargs="?", type=int, default=30)
    parser.add_argument("--processes", type=int, default=3, choices=(2, 3, 4))
    arguments = parser.parse_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        outcome = kill_at_random(Path(directory), arguments.kills, arguments.processes)
    print(
        f"{outcome.kills} kills of {arguments.processes} processes, {outcome.in_a_save} while a checkpoint was "
        f"written; all processes gone within {outcome.slowest:.1f} s; {time.monotonic() - begin:.0f} s in all"
    )
    for sentence in outcome.wrong or ["weights, average, optimizer states and losses are those of an undisturbed run"]:
        print(sentence)
    enough = outcome.in_a_save >= arguments.kills // 6
    if not enough:
        print(f"too few kills while a checkpoint was written: {outcome.in_a_save} of {arguments.kills}")
    return int(bool(outcome.wrong) or not enough)


if __name__ == "__main__":
    sys.exit(main())
