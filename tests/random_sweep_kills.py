"""`python -m tests.random_sweep_kills [KILLS]`: a sweep whose processes are killed, resumed by other numbers of them.

A sweep of twelve settings of a tiny network runs undisturbed on one process. Another is started by 1, 2 or 3 processes,
drawn at random, and one of them gets a SIGKILL once up to two more settings are finished, at a time drawn at random;
the others have to be gone within a minute. So anew until KILLS (default 12) have landed, then it is left to end. The
files of both have to be the same, byte for byte. About fifteen seconds a kill on two idle cores.
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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.children import free_port
from tests.sweeps import contents, write_sweep

ROOT = Path(__file__).parents[1]
SEED = 16
AXES = ("sample.cfg_scale=1.5,2,3,4", "sample.cfg_interval_start=0,0.1,0.2", "sample.num_sampling_steps=40")
TIMEOUT = 600.0  # seconds for a start to end


@contextmanager
def started(argv: list[str], count: int, log: Path) -> Iterator[list[subprocess.Popen]]:
    """The program on `count` processes; none of them is left running."""
    common = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "WORLD_SIZE": str(count)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = []
    with open(log, "ab") as said:
        try:
            for rank in range(count):
                places = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                command = [sys.executable, "-m", "launch", "sweep", *argv]
                processes.append(subprocess.Popen(command, cwd=ROOT, env=common | places, stdout=said, stderr=said))
            yield processes
        finally:
            for process in processes:
                process.kill()
                process.wait()


def run_through(argv: list[str], count: int, log: Path) -> list[int]:
    """The exit statuses of a start that nobody disturbs."""
    with started(argv, count, log) as processes:
        return [process.wait(timeout=TIMEOUT) for process in processes]


def kill_one(argv: list[str], count: int, output: Path, log: Path) -> str:
    """Kill one process, drawn at random, once the sweep is at work → what it came to, as a word."""
    due = finished(output) + random.randrange(3)
    with started(argv, count, log) as processes:
        end = time.monotonic() + TIMEOUT
        while not (holder(output) == processes[0].pid and finished(output) >= due):
            if any(process.poll() is not None for process in processes):
                break
            if time.monotonic() > end:
                raise RuntimeError(f"no sweep begins within {TIMEOUT:g} s: {log.read_text()[-2000:]}")
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.5))
        victim = random.choice(processes)
        if victim.poll() is not None:
            return "late"
        os.kill(victim.pid, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            time.sleep(0.02)
        return "others stay" if any(process.poll() is None for process in processes) else "killed"


def holder(output: Path) -> int | None:
    """The process that holds, or held, the sweep's directory."""
    try:
        return json.loads((output / ".lock").read_text())["pid"]
    except (OSError, ValueError, KeyError):
        return None


def finished(output: Path) -> int:
    return len(list((output / "settings").glob("*.json")))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.random_sweep_kills", description=__doc__)
    parser.add_argument("kills", nargs="?", type=int, default=12)
    wanted = parser.parse_args().kills
    random.seed(SEED)
    begin, wrong, landed, counts = time.monotonic(), [], 0, []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        argv, log = [*write_sweep(root), *AXES], root / "said"
        whole, output = root / "whole", root / "killed"
        codes = run_through([*argv, "--output", str(whole)], 1, log)
        while landed < wanted:
            if (output / "results.json").exists():  # all is done: from the start again, with what is left of the kills
                wrong += differences(whole, output)
                output = output.with_name(f"{output.name}+")
            count = random.choice((1, 2, 3))
            outcome = kill_one([*argv, "--output", str(output)], count, output, log)
            landed += outcome != "late"
            counts.append(finished(output))
            wrong += [f"{count} processes: {outcome}"] if outcome == "others stay" else []
        codes += run_through([*argv, "--output", str(output)], random.choice((1, 2, 3)), log)
        wrong += differences(whole, output)
        if any(codes):
            wrong.append(f"a start that was not disturbed ended with {codes}: {log.read_text()[-3000:]}")
    print(f"{landed} kills; settings there after each: {counts}; {time.monotonic() - begin:.0f} s in all")
    for sentence in wrong or ["the files of all sweeps are those of an undisturbed one, byte for byte"]:
        print(sentence)
    return int(bool(wrong))


def differences(whole: Path, other: Path) -> list[str]:
    """Sentences on the files that are not the same in two finished sweeps, or only in one."""
    one, two = contents(whole), contents(other)
    return [f"{name} differs" for name in sorted(one.keys() | two.keys()) if one.get(name) != two.get(name)]


if __name__ == "__main__":
    sys.exit(main())
