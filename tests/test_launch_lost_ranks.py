"""The short form of the programs that harm a run: `python -m tests.random_kills`, `python -m tests.lost_ranks`."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=880)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-4000:]}"
    return done.stdout


def test_a_run_under_kills_ends_as_one_that_nobody_disturbed():
    said = run("tests.random_kills", "1", "--processes", "2")
    assert "1 kills of 2 processes, 1 while a checkpoint was written" in said
    assert "losses are those of an undisturbed run" in said


def test_a_full_disk_and_a_silent_process_end_all():
    said = run("tests.lost_ranks", "silent", "full_at_checkpoint")
    assert "silent: as it should" in said
    if "full_at_checkpoint: skipped" in said:
        pytest.skip(said)
    assert "full_at_checkpoint: as it should" in said
