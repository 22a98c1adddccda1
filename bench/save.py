"""Measure how long a save keeps training waiting: one written in the background beside one written inline.

    python -m bench.save [--rounds N] [--depth D] [--width W] [--directory DIR]

A LightningDiT of 100 million parameters trains on the host, by the trainer's own steps, with weights, average and
moments in float32 (16 bytes a parameter). In each round it saves inline, then in the background, both by `Trainer.save`
after a step, and waits until that is written. A first round does not count: memory that a process takes for the first
time is slow. It ends with 1 where the median pause is more than a tenth of the
median inline save. Threads are torch's own number (OMP_NUM_THREADS).
"""

import argparse
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch

from bench.measure.host import host
from bench.measure.program import whole_number
from bench.workloads.latents import write_latents
from launch.config import LightningDiTRun
from launch.training.build import make_trainer
from launch.training.engine import start_processes
from launch.training.saving import Saver
from launch.training.trainer import Trainer

LIMIT = 0.1  # of the inline save
SHAPE = (4, 8, 8)  # of the latents: a step is short beside a save


@dataclass
class Times:
    """Seconds: of saves inline, of pauses and of writing in the background."""

    inline: list[float] = field(default_factory=list)
    pause: list[float] = field(default_factory=list)
    write: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        return median(self.pause) / median(self.inline)


def run_of(directory: Path, depth: int, width: int) -> LightningDiTRun:
    """A run whose checkpoints are below `directory`, of which one is kept."""
    write_latents(directory / "latents", SHAPE, 64, 1000)
    sections = {
        "preset": "default",
        "data": {"data_path": str(directory / "latents"), "image_size": SHAPE[-1] * 4, "num_workers": 0},
        "vae": {"model_name": "random", "downsample_ratio": 4},
        "model": {
            "hidden_size": width,
            "depth": depth,
            "num_heads": width // 64,
            "patch_size": 2,
            "in_chans": SHAPE[0],
            "use_swiglu": True,
            "use_rope": True,
            "use_rmsnorm": True,
        },
        "train": {
            "max_steps": 10**6,
            "global_batch_size": 1,
            "output_dir": str(directory),
            "exp_name": "run",
            "precision": "float32",
            "keep_checkpoints": 1,
            "tensorboard": False,
        },
        "kernels": "reference",
    }
    return LightningDiTRun.model_validate(sections)


def timed(function, *args, **options) -> float:
    begin = time.perf_counter()
    function(*args, **options)
    return time.perf_counter() - begin


def measure(trainer: Trainer, inline: Saver, rounds: int) -> Times:
    """Both ways by turns, from the same engines; a first round, in which memory is new to the process, is left out."""
    times, background = Times(), trainer.saver
    with closing(trainer.stream()) as stream:
        for number in range(rounds + 1):
            if number == 1:
                times = Times()
            trainer.train_step(stream)
            trainer.saver = inline
            times.inline.append(timed(trainer.save, wait=False))
            trainer.train_step(stream)
            trainer.saver = background
            times.pause.append(timed(trainer.save, wait=False))
            trainer.saver.wait()
            times.write.append(trainer.saver.poll()[0].write_seconds)
            which = f"round {number}" if number else "warm-up"
            print(
                f"{which}: inline {times.inline[-1]:7.2f} s   pause {times.pause[-1]:7.3f} s   "
                f"written in {times.write[-1]:6.1f} s",
                flush=True,
            )
    return times


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.save", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=whole_number(1), default=3, help="default 3")
    parser.add_argument("--depth", type=whole_number(1), default=9, help="blocks of the network (default 9)")
    parser.add_argument("--width", type=whole_number(64), default=768, help="its hidden size (default 768)")
    parser.add_argument("--directory", type=Path, help="where files are made and removed (default: a temporary one)")
    options = parser.parse_args(argv)
    if options.width % 64:
        parser.error(f"--width {options.width} is no multiple of 64")
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        return compare(Path(directory), options)


def compare(directory: Path, options: argparse.Namespace) -> int:
    processes = start_processes()
    run = run_of(directory, options.depth, options.width)
    trainer = make_trainer(run, "lightningdit", processes)
    other = run.train.model_copy(update={"background_save": False})
    inline = Saver(directory / "inline", trainer.engines, processes, other)
    sizes = [p.numel() for p in trainer.engines["model"].module.parameters() if p.requires_grad]
    facts = host()
    print(
        f"{facts['cpu']}, {facts['cores']} cores, load {facts['load']}; {torch.get_num_threads()} threads; "
        f"{sum(sizes) / 1e6:.1f} M parameters, {16 * sum(sizes) / 1e9:.2f} GB a checkpoint"
    )
    times = measure(trainer, inline, options.rounds)
    trainer.close()
    print(f"median of {options.rounds}: inline {median(times.inline):.2f} s, pause {median(times.pause):.3f} s")
    within = times.ratio <= LIMIT
    print(f"pause / inline: {100 * times.ratio:.1f} % ({'at most' if within else 'MORE THAN'} {100 * LIMIT:.0f} %)")
    return int(not within)


if __name__ == "__main__":
    sys.exit(main())
