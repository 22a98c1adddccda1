"""`python -m launch train vavae|lightningdit CONFIG [key=value …] [--dry-run] [--gpus N] [--memory GIB]`."""

import argparse
import gc
from functools import partial
from pathlib import Path

import torch

from launch.arguments import add_run_file, load_run
from launch.config import ConfigError, Run
from launch.runtime import exit_status, last_exit, launcher
from launch.runtime.processes import Processes
from launch.runtime.run_lock import lock_directory
from launch.training.build import make_trainer, name_run
from launch.training.checks import check_run
from launch.training.dry_run import card_bytes, plan_run, planned_processes
from launch.training.remarks import unread
from launch.training.rollback import Rollback


def main(argv: list[str]) -> int:
    """Train, or with --dry-run say what training would take; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m launch train", description=__doc__)
    parser.add_argument("kind", choices=["vavae", "lightningdit"])
    add_run_file(parser, "YAML file, ours or a published one", "train.max_steps=20")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument("--gpus", type=int, help="processes the plan is for (default: as launched, else GPUs here)")
    parser.add_argument("--memory", type=float, help="GiB of each GPU: the plan says what fits, as nvidia-smi counts")
    args = parser.parse_intermixed_args(argv)
    run = load_run(args.config, args.overrides, args.kind)
    if not args.dry_run and (args.gpus, args.memory) != (None, None):
        raise ConfigError("--gpus and --memory are for a plan: add --dry-run, or let a launcher start the processes")
    if args.dry_run:
        processes, note = planned_processes(args.gpus)
        on_gpus = (args.gpus, args.memory) != (None, None) or torch.cuda.is_available()
        card = card_bytes(args.memory)
        plan = plan_run(run, args.kind, processes, card=card, processes_note=note, on_gpus=on_gpus)
        print("\n".join(plan.lines()))
        return 0
    for note in unread(run) if launcher.rank() == 0 else ():
        print(f"note: {note}")
    _, stopped_by = run_training(run, args.kind)
    return exit_status.of_signal(stopped_by)


def run_training(run: Run, kind: str) -> tuple[Path, int | None]:
    """Train as `run` says → the run's directory, and the signal that ended it early or None."""
    check_run(run)
    # Imports DeepSpeed: seconds that a mistake or a dry run need not wait.
    from launch.training.engine import start_processes

    processes = start_processes(heartbeat_timeout=run.train.heartbeat_timeout)
    run = name_run(run, kind, processes)
    assert run.train.exp_name is not None, "name_run gives one"
    directory = Path(run.train.output_dir) / run.train.exp_name
    with lock_directory(directory, processes), last_exit.recorded(directory, processes.rank) as ending:
        ending.stopped_by = _train(run, kind, processes, ending)
        return directory, ending.stopped_by


def _train(run: Run, kind: str, processes: Processes, ending: last_exit.Run) -> int | None:
    """Train → the signal that ended it early or None; by a trainer of its own after each rollback."""
    rollback = None
    while True:
        trainer = make_trainer(run, kind, processes, rollback)
        ending.step = partial(getattr, trainer, "step")
        try:
            return trainer.run()
        except Rollback as e:
            rollback = e.with_traceback(None)  # which would keep the trainer
        ending.step = partial(int, trainer.step)
        trainer.close()
        del trainer
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
