"""`python -m tests.endings [COUNT]`: two-process runs, one after the other, each of which ends with its status alone.

Threads of gloo and DeepSpeed abort a process now and then that is taken down around them ("terminate called without an
active exception"), after all its work: only many runs show whether that can still be. Every fourth run is stopped by a
signal. 200 runs take about a quarter of an hour on two cores; the tests make a few.
"""

import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

from launch.runtime import exit_status
from tests import toy
from tests.children import Moment, launch

STOPPED = Moment("launch.training.engine:Engine", "step", 1, signal.SIGTERM, rank=1)


def endings(directory: Path, count: int) -> Counter:
    """How often `count` runs ended as they should ("as it should"), or else the statuses and what was said last."""
    data = {"data_path": str(toy.write_latents(directory / "latents"))}
    config = toy.write_run(directory / "run.yaml", toy.LIGHTNINGDIT, data=data, train={"output_dir": str(directory)})
    found = Counter()
    for number in range(count):
        moment = STOPPED if number % 4 == 3 else None
        log = directory / f"log{number}"
        command = ("train", "lightningdit", str(config), "train.max_steps=2", f"train.exp_name=run{number}")
        statuses = launch(*command, world_size=2, at=moment, log=log)
        said = "".join(Path(f"{log}.{rank}").read_text() for rank in (0, 1))
        right = [exit_status.DONE if moment is None else exit_status.STOPPED] * 2
        fine = statuses == right and not any(word in said for word in ("terminate called", "Traceback", "error"))
        found["as it should" if fine else f"{statuses}: {said[-200:]}"] += 1
    return found


def main(argv: list[str]) -> int:
    with tempfile.TemporaryDirectory() as directory:
        found = endings(Path(directory), int(argv[0]) if argv else 200)
    for ending, count in found.most_common():
        print(f"{count:5} {ending}")
    return int(set(found) != {"as it should"})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
