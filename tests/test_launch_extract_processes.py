"""Extraction by several processes, killed and finished by others: the files of one that nothing interrupted."""

from pathlib import Path

import pytest

import launch.extract  # noqa: F401 — children are struck in it
from launch.extract import extract
from launch.runtime import exit_status
from tests import children, toy
from tests.children import Moment
from tests.test_launch_round_trip import run_of, write_tokenizer

COUNT = 26  # in shards of 6 and batches of 2: borders between processes lie inside shards
#: A process that is late to its own end is ended for another one's: by the watchdog, or by what it waits in, whose
#: error is a fault where no program turns it into a status.
KILLED_OR_ENDED = {-9, exit_status.LOST_PEER, exit_status.FAULT}


def extract_all(root: Path, output: str, save_seconds: float = 300.0) -> None:
    extract(run_of(root), root / output, batch_size=2, shard_size=6, least_psnr=0.0, save_seconds=save_seconds)


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Images, a tokenizer, and `whole`: a set of one process."""
    root = tmp_path_factory.mktemp("processes")
    toy.write_images(root / "images", count=COUNT, size=8)
    write_tokenizer(root, steps=0)
    assert children.call(extract_all, root, "whole", world_size=1) == [0]
    return root


@pytest.mark.parametrize("save_seconds", [300.0, 0.0])
def test_three_processes_killed_and_finished_by_two_leave_the_files_of_one(root, tmp_path, save_seconds):
    output = str(tmp_path / "set")
    at = Moment("launch.extract", "encode", 4)
    statuses = children.call(extract_all, root, output, save_seconds, world_size=3, at=at)
    assert -9 in statuses and set(statuses) <= KILLED_OR_ENDED
    left = {Path(name).suffix for name in content(tmp_path / "set")}
    assert ".part" in left and "manifest.json" not in content(tmp_path / "set")
    assert children.call(extract_all, root, output, save_seconds, world_size=2) == [0, 0]
    assert content(tmp_path / "set") == content(root / "whole")


def test_processes_killed_while_they_complete_a_set_lose_nothing(root, tmp_path):
    """First as they join shards, then as the manifest is written; one process ends it without encoding."""
    output = str(tmp_path / "set")
    join = Moment("lightningdit.latents_writer:LatentsWriter", "_join", 1)
    statuses = children.call(extract_all, root, output, world_size=3, at=join)
    assert -9 in statuses[:2] and set(statuses) <= KILLED_OR_ENDED  # two shards have parts; the third waits in vain
    manifest = Moment("lightningdit.latents_writer", "write_statistics", 1, rank=0)
    assert children.call(extract_all, root, output, world_size=1, at=manifest) == [-9]
    assert {Path(name).suffix for name in content(tmp_path / "set")} >= {".safetensors"}
    again = Moment("launch.extract", "encode", 1)
    assert children.call(extract_all, root, output, world_size=1, at=again) == [0]
    assert content(tmp_path / "set") == content(root / "whole")
