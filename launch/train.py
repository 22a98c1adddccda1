"""`python -m launch train vavae|lightningdit CONFIG [key=value …] [--dry-run] [--gpus N]`."""

import argparse
from pathlib import Path

import torch

from launch.arguments import add_run_file, load_run
from launch.config import ConfigError, Run
from launch.runtime import exit_status, last_exit, launcher
from launch.runtime.run_lock import lock_directory
from launch.training.build import make_trainer, name_run
from launch.training.checks import check_run
from launch.training.dry_run import plan_run


def main(argv: list[str]) -> int:
    """Train, or with --dry-run say what training would take; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m launch train", description=__doc__)
    parser.add_argument("kind", choices=["vavae", "lightningdit"])
    add_run_file(parser, "YAML file, ours or a published one", "train.max_steps=20")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument("--gpus", type=int, help="processes the plan is for (default: as launched, else GPUs here)")
    args = parser.parse_intermixed_args(argv)
    run = load_run(args.config, args.overrides, args.kind)
    if args.gpus is not None and args.gpus < 1:
        raise ConfigError(f"--gpus must be at least 1, got {args.gpus}")
    if args.dry_run:
        print("\n".join(plan_run(run, args.kind, args.gpus or _default_processes()).lines()))
        return 0
    _, stopped_by = run_training(run, args.kind)
    return exit_status.of_signal(stopped_by)


def run_training(run: Run, kind: str) -> tuple[Path, int | None]:
    """Train as `run` says → the run's directory, and the signal that ended it early or None."""
    check_run(run)
    # Imports DeepSpeed: seconds that a mistake or a dry run need not wait.
    from launch.training.engine import start_processes

    processes = start_processes(heartbeat_timeout=run.train.heartbeat_timeout)
    run = name_run(run, kind, processes)
    directory = Path(run.train.output_dir) / run.train.exp_name
    with lock_directory(directory, processes), last_exit.recorded(directory, processes.rank) as ending:
        trainer = make_trainer(run, kind, processes)
        ending.step = lambda: trainer.step
        ending.stopped_by = trainer.run()
        return trainer.config.directory, ending.stopped_by


def _default_processes() -> int:
    environment = launcher.launch_environment()
    return environment.world_size if environment else max(torch.cuda.device_count(), 1)
