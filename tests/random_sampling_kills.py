"""`python -m tests.random_sampling_kills [KILLS] [--formats npz png webp latents]`: SIGKILLs of a sampling, at random.

For each format, samples are made once by one process that nobody disturbs, and once by runs of one to three processes,
each of which loses a process drawn at random after some more of its parts, or while they are joined. The others have to
be gone within a minute. What the last run leaves has to be the same files, byte for byte. Latents are then decoded
under kills, too. 12 kills for each (the default) take some minutes on two idle cores.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import yaml

from launch.sampling.units import UNIT
from tests.children import alive
from tests.starter import start, stop
from tests.tiny_weights import document, write_weights

SEED, TIMEOUT = 16, 300.0
UNITS = 24
FORMATS = ("npz", "png", "webp", "latents")


def ranks(starter: int) -> list[int]:
    """The processes that a starter has started."""
    with suppress(OSError):
        return list(map(int, Path(f"/proc/{starter}/task/{starter}/children").read_text().split()))
    return []


def parts(output: Path) -> int:
    return len(list((output / "parts").glob("[0-9]*.npz")))


def run(command: list[str], processes: int, output: Path, said: Path, kill_after: int | None) -> bool:
    """Run a program, and kill one process when there are so many parts more → whether a kill landed.

    Raises RuntimeError where processes remain after a kill, or a run that is not killed fails.
    """
    child, before, killed = start(processes, command, said), parts(output), []
    end = time.monotonic() + TIMEOUT
    try:
        while child.is_alive() and time.monotonic() < end:
            if kill_after is not None and not killed and parts(output) >= min(before + kill_after, UNITS):
                time.sleep(random.uniform(0, 0.05))
                if victims := ranks(child.pid):
                    with suppress(ProcessLookupError):
                        os.kill(random.choice(victims), signal.SIGKILL)
                        killed, end = victims, time.monotonic() + 60
            time.sleep(0.002)
        if left := [pid for pid in killed if alive(pid)]:
            raise RuntimeError(f"60 s after a kill still there: {left}")
        child.join(1)
        if not killed and child.exitcode != 0:
            raise RuntimeError(f"status {child.exitcode}: {said.read_text()[-2000:]}")
        return bool(killed) and child.exitcode != 0
    finally:
        stop(child)


def content(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def disturbed(name: str, command: list[str], root: Path, kills: int) -> list[str]:
    """Run a program whole, and under kills → sentences on what is wrong."""
    whole, output, said = root / name / "whole", root / name / "killed", root / "said"
    run([*command, "--output", str(whole)], 1, whole, said, None)
    landed = tries = 0
    while landed < kills and tries < 3 * kills:
        tries += 1
        last = landed == kills - 1  # as they are joined
        more = UNITS if last else random.randint(0, max(1, 2 * UNITS // kills))
        landed += run([*command, "--output", str(output)], random.choice((1, 2, 3)), output, said, more)
        if (output / "samples.json").exists():
            break
    run([*command, "--output", str(output)], random.choice((1, 2, 3)), output, said, None)
    one, other = content(whole), content(output)
    different = sorted(file for file in one | other if one.get(file) != other.get(file))
    print(f"{name}: {landed} kills landed, {len(one)} files", flush=True)
    wrong = [f"{name}: {', '.join(different[:5])} of {len(different)} files differ"] if different else []
    return wrong + ([f"{name}: only {landed} of {kills} kills landed"] if landed < kills // 2 else [])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.random_sampling_kills", description=__doc__)
    parser.add_argument("kills", nargs="?", type=int, default=12)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    arguments = parser.parse_args()
    random.seed(SEED)
    wrong = []
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        write_weights(root)
        keys = {"fid_num": UNITS * UNIT - 5, "per_proc_batch_size": UNIT, "num_sampling_steps": 12}
        (root / "run.yaml").write_text(yaml.safe_dump(document(root, **keys)))
        for format in arguments.formats:
            command = ["sample", str(root / "run.yaml"), "--format", format]
            wrong += disturbed(format, command, root, arguments.kills)
        if "latents" in arguments.formats:
            latents = ["--latents", str(root / "latents" / "whole"), "--batch-size", str(UNIT)]
            wrong += disturbed("decode", ["decode", str(root / "run.yaml"), *latents], root, arguments.kills)
    for sentence in wrong or ["all files are those of runs that nobody disturbed, byte for byte"]:
        print(sentence)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
