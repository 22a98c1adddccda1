"""The newest whole checkpoint is taken: whatever is damaged is said, set aside by training, and never lost."""

import errno
import os
import random
import re
import shutil
from pathlib import Path

import pytest
import torch

from common.files import UnreachableError
from launch.config_files import ConfigError
from launch.training import checkpoint
from launch.training.checkpoint import Checkpoint, CheckpointError
from launch.training.checkpoint_search import AllDamagedError, candidates, find_checkpoint
from launch.training.config import TrainConfig
from launch.training.engine import start_processes
from launch.training.restore import agree_on_start
from tests import toy

SHAPES = {"a.weight": torch.Size([3, 2]), "a.bias": torch.Size([3])}
FILES = ("manifest.json", "state.json", *(f"model.{key}.safetensors" for key in checkpoint.KEYS))


@pytest.fixture
def run(tmp_path) -> Path:
    """The checkpoints of steps 10, 20 and 30."""
    generator = torch.Generator().manual_seed(0)
    for step in (10, 20, 30):
        tensors = {name: torch.rand(shape, generator=generator) for name, shape in SHAPES.items()}
        state = toy.checkpoint_state(step, "toy")
        checkpoint.save(tmp_path / "checkpoints", state, {"model": dict.fromkeys(checkpoint.KEYS, tensors)})
    return tmp_path / "checkpoints"


def start(run: Path, **train) -> Checkpoint | None:
    return agree_on_start(run, TrainConfig(**train), start_processes())


def flip(path: Path) -> None:
    content, place = bytearray(path.read_bytes()), random.randrange(path.stat().st_size)
    content[place] ^= 1 << random.randrange(8)
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: random.randrange(path.stat().st_size)])


def replace_by_a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = {"flipped": flip, "cut": cut, "removed": Path.unlink, "a directory": replace_by_a_directory}


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def warnings(caplog, logger: str) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == logger and r.levelname == "WARNING"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_file_of_the_newest_damaged_in_turn(run, caplog, damage):
    """Training goes on from the one before, and says why; the damaged one is kept as it is."""
    random.seed(0)
    for number, file in enumerate(FILES, 1):
        shutil.copytree(run / "step_0000030", run.parent / "whole")
        DAMAGES[damage](run / "step_0000030" / file)
        hurt = names(run / "step_0000030")
        caplog.clear()
        found = start(run, keep_checkpoints=1 if file == FILES[-1] else None)
        aside = "step_0000030.damaged" + (f".{number}" if number > 1 else "")
        assert found.path.name == "step_0000020" and found.state["step"] == 20
        (said,) = warnings(caplog, "launch.training.restore")
        assert said.startswith(f"{run}/step_0000030 is DAMAGED and set aside as {aside}: {run}/step_0000030")
        assert file in said and names(run / aside) == hurt
        os.rename(run.parent / "whole", run / "step_0000030")
    # The last start kept one, the newest whole; what was set aside is never removed, nor does it ever count.
    assert [each.path.name for each in checkpoint.by_step(run)] == ["step_0000030", "step_0000020"]
    checkpoint.clean_up(run)
    checkpoint.prune(run, 1)
    assert len(names(run)) == 1 + len(FILES)


def test_what_was_half_deleted_or_never_complete_is_set_aside(run, caplog):
    for file in FILES:
        (run / "step_0000030" / file).unlink()
    (run / "step_0000040").mkdir()
    shutil.copy(run / "step_0000020/state.json", run / "step_0000040")
    (run / "step_0000050").touch()
    assert start(run).step == 20
    expected = [f"step_00000{number}" for number in ("10", "20", "30.damaged", "40.damaged", "50.damaged")]
    assert names(run) == expected and len(warnings(caplog, "launch.training.restore")) == 3


def test_a_bit_that_no_file_system_reads_is_damage(run, monkeypatch):
    real = os.open

    def fails(path, *options):
        if str(path).endswith("step_0000030/model.exp_avg.safetensors"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, *options)

    monkeypatch.setattr(os, "open", fails)
    assert start(run).step == 20 and "step_0000030.damaged" in names(run)


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EMFILE, errno.EACCES])
def test_what_the_system_does_not_tell_is_no_damage(run, monkeypatch, number):
    """The file may be whole: nothing is renamed, and no step is lost."""
    real = os.open

    def fails(path, *options):
        if str(path).endswith("step_0000030/manifest.json"):
            raise OSError(number, os.strerror(number))
        return real(path, *options)

    with monkeypatch.context() as broken:
        broken.setattr(os, "open", fails)
        with pytest.raises(UnreachableError, match=r"cannot read \S+step_0000030/manifest\.json"):
            start(run)
    assert names(run) == ["step_0000010", "step_0000020", "step_0000030"]


def damage_all(run: Path) -> dict[str, str]:
    """Step → what has to be said of it."""
    flip(run / "step_0000030/model.ema.safetensors")
    (run / "step_0000020/manifest.json").unlink()
    cut(run / "step_0000010/state.json")
    return {
        "30": r"step_0000030/model\.ema\.safetensors has SHA-256 \w+ where",
        "20": r"step_0000020 has no manifest\.json",
        "10": r"step_0000010/state\.json has \d+ bytes where",
    }


@pytest.mark.parametrize("settings", [{}, {"keep_checkpoints": 1}])
def test_where_all_are_damaged_each_has_its_reason_and_nothing_is_touched(run, settings):
    reasons = damage_all(run)
    with pytest.raises(AllDamagedError, match=f"no checkpoint in {run} is whole: ") as caught:
        start(run, **settings)
    assert all(re.search(reason, str(caught.value)) for reason in reasons.values()) and "\n" not in str(caught.value)
    assert names(run) == ["step_0000010", "step_0000020", "step_0000030"]
    with pytest.raises(AllDamagedError, match=r"; .*; "):
        find_checkpoint(run.parent)


def test_strict_ends_with_the_newest_ones_reason(run):
    (run / "step_0000030/model.exp_avg_sq.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"step_0000030/model\.exp_avg_sq\S+ is missing .*train\.resume is strict"
    ):
        start(run, resume="strict", keep_checkpoints=1)
    assert names(run) == ["step_0000010", "step_0000020", "step_0000030"]
    shutil.rmtree(run / "step_0000030")
    assert start(run, resume="strict").step == 20


def test_the_last_whole_one_outlives_any_number_of_damaged_ones(run):
    for step in (20, 30):
        flip(run / f"step_00000{step}/model.model.safetensors")
    assert start(run, keep_checkpoints=2).step == 10
    assert names(run) == ["step_0000010", "step_0000020.damaged", "step_0000030.damaged"]


@pytest.mark.parametrize("file", ["model.ema.safetensors", "state.json"])
def test_programs_that_only_read_take_the_one_before_and_rename_nothing(run, caplog, file):
    flip(run / "step_0000030" / file)
    assert find_checkpoint(run.parent).step == find_checkpoint(run).step == 20
    (said, again) = warnings(caplog, "launch.training.checkpoint_search")
    assert said == again and file in said and said.endswith(f"{run}/step_0000020 is taken instead")
    assert names(run) == ["step_0000010", "step_0000020", "step_0000030"]
    with pytest.raises(CheckpointError, match=re.escape(file)):
        named = find_checkpoint(run / "step_0000030")
        assert named.state and named.weights("model", "ema")


def test_programs_that_only_read_need_no_moments(run, caplog):
    flip(run / "step_0000030/model.exp_avg.safetensors")
    assert find_checkpoint(run).step == 30 and not caplog.records
    (run / "step_0000030/model.exp_avg.safetensors").unlink()
    assert find_checkpoint(run).step == 20


def test_a_run_begins_from_the_newest_whole_one_of_another_and_leaves_it_as_it_is(run, tmp_path, caplog):
    flip(run / "step_0000030/model.exp_avg.safetensors")
    found = start(tmp_path / "further/checkpoints", ckpt=str(run.parent))
    assert found.step == 20 and "step_0000030" in names(run)
    assert any("DAMAGED and passed over" in each for each in warnings(caplog, "launch.training.restore"))
    for settings in ({"ckpt": str(run / "step_0000030")}, {"ckpt": str(run.parent), "resume": "strict"}):
        with pytest.raises(CheckpointError, match=r"step_0000030/model\.exp_avg\.safetensors has SHA-256"):
            start(tmp_path / "further/checkpoints", **settings)
    with pytest.raises(CheckpointError, match=r"step_0000030/model\.exp_avg\.safetensors has SHA-256"):
        start(run, ckpt=str(run / "step_0000030"))
    assert "step_0000030" in names(run)
    with pytest.raises(ConfigError, match="does not exist"):
        candidates(tmp_path / "absent")


def test_each_file_is_hashed_once_unless_it_changes(run, monkeypatch):
    """By the main process; the others get what it found, and hash what has another size or time where they see it."""
    hashed = []
    real = checkpoint.sha256
    monkeypatch.setattr(checkpoint, "sha256", lambda path: hashed.append(path.name) or real(path))
    found = start(run)
    assert found.state and [key for key, _ in found.states("model", SHAPES)] == list(checkpoint.KEYS)
    assert sorted(hashed) == sorted(set(FILES) - {"manifest.json"})
    file = found.path / "model.ema.safetensors"
    stamp = file.stat()
    flip(file)
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    with pytest.raises(CheckpointError, match=r"ema\.safetensors has SHA-256"):
        found.tensors("model", "ema")
