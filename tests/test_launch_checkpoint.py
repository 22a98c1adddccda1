"""Checkpoints are whole or refused; the newest is the one of the highest step."""

import errno
import os

import pytest
import torch

from common.files import FileError
from launch.training import checkpoint
from launch.training.checkpoint import Checkpoint, CheckpointError
from tests import toy


def state_at(step: int) -> dict:
    return toy.checkpoint_state(step, "toy", note="x")


def networks(value: float = 1.0) -> dict:
    tensors = {"a.weight": torch.full((3, 2), value), "a.bias": torch.arange(3.0)}
    return {"model": {key: {name: t.clone() for name, t in tensors.items()} for key in checkpoint.KEYS}}


def test_what_is_saved_comes_back(tmp_path):
    path = checkpoint.save(tmp_path, state_at(20), networks(0.1))
    found = checkpoint.newest(tmp_path)
    assert found.path == path == tmp_path / "step_0000020"
    assert found.state == state_at(20)
    assert torch.equal(found.tensors("model", "ema")["a.weight"], torch.full((3, 2), 0.1))


def test_newest_goes_by_step_not_by_time_or_size(tmp_path):
    checkpoint.save(tmp_path, state_at(100), networks())
    checkpoint.save(tmp_path, state_at(9), networks())
    os.utime(tmp_path / "step_0000100", (1, 1))
    assert checkpoint.newest(tmp_path).step == 100


@pytest.mark.parametrize("hidden", ["step_0000100/manifest.json", "."])
def test_a_checkpoint_that_the_system_does_not_show_is_not_passed_over(tmp_path, monkeypatch, hidden):
    """A stale handle of a network file system: going on from an older step, or from none, would lose this one."""
    checkpoint.save(tmp_path, state_at(9), networks())
    checkpoint.save(tmp_path, state_at(100), networks())
    real = os.lstat

    def fails(path, **options):
        if os.fspath(path) == str(tmp_path / hidden):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(path, **options)

    monkeypatch.setattr(os, "lstat", fails)
    with pytest.raises(FileError, match=f"cannot look for {tmp_path / hidden}: Stale"):
        checkpoint.newest(tmp_path)


def test_no_checkpoint_is_none(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.newest(tmp_path / "absent") is None


@pytest.mark.parametrize("call", ["write_tensors", "write_json", "sync_directory"])
def test_a_kill_while_saving_leaves_the_previous_checkpoint(tmp_path, monkeypatch, call):
    """The save dies at its first, second, … use of each writing function; the older checkpoint stays the newest."""
    checkpoint.save(tmp_path, state_at(1), networks())
    real = getattr(checkpoint, call)
    for survive in range(3):
        count = iter(range(survive))

        def dies(*args, count=count):
            if next(count, None) is None:
                raise KeyboardInterrupt
            return real(*args)

        monkeypatch.setattr(checkpoint, call, dies)
        try:
            checkpoint.save(tmp_path, state_at(2), networks())
        except KeyboardInterrupt:
            found = checkpoint.newest(tmp_path)
            assert found.step == (1 if call != "sync_directory" else 2)  # that comes last, after the new name
            assert found.state and found.tensors("model", "ema")
    monkeypatch.setattr(checkpoint, call, real)
    checkpoint.save(tmp_path, state_at(2), networks(2.0))
    assert checkpoint.newest(tmp_path).tensors("model")["a.weight"][0, 0] == 2.0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_0000001", "step_0000002"]


@pytest.mark.parametrize("name", ["model.ema.safetensors", "state.json"])
def test_a_flipped_bit_is_named(tmp_path, name):
    path = checkpoint.save(tmp_path, state_at(3), networks()) / name
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name}.*SHA-256"):
        found = Checkpoint(tmp_path / "step_0000003")
        assert found.state and found.tensors("model", "ema")


def test_a_truncated_and_a_missing_file_are_named(tmp_path):
    path = checkpoint.save(tmp_path, state_at(3), networks())
    file = path / "model.exp_avg.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"exp_avg\.safetensors has .* bytes where the manifest says"):
        Checkpoint(path).tensors("model", "exp_avg")
    file.unlink()
    with pytest.raises(CheckpointError, match="missing though the manifest lists it"):
        Checkpoint(path).tensors("model", "exp_avg")
    with pytest.raises(CheckpointError, match=r"has no other\.model\.safetensors"):
        Checkpoint(path).tensors("other")


def test_without_a_manifest_it_is_no_checkpoint(tmp_path):
    path = checkpoint.save(tmp_path, state_at(3), networks())
    (path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"no manifest\.json"):
        _ = Checkpoint(path).state
    (path / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        _ = Checkpoint(path).state


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"step": 4}, r"step 4 where the optimizers have counted 3"),
        ({"step": -3}, r"step: .*got -3"),
        (
            {"counters": {"model": {"applied": 1.0, "skipped": 1.0, "skipped_in_a_row": 0.0}}},
            r"step 3 where the optimizers have counted 2",
        ),
    ],
)
def test_a_step_that_its_counters_contradict_is_refused(tmp_path, change, says):
    path = checkpoint.save(tmp_path, state_at(3), networks())
    toy.rewrite_state(path, state_at(3) | change)
    with pytest.raises(CheckpointError, match=rf"state\.json is damaged: .*{says}"):
        _ = Checkpoint(path).state


def test_a_step_under_the_name_of_another_is_refused(tmp_path):
    path = checkpoint.save(tmp_path, state_at(3), networks()).rename(tmp_path / "step_0000004")
    with pytest.raises(CheckpointError, match=r"step_0000004/manifest\.json says step 3, which is not that of its"):
        _ = Checkpoint(path).state
    assert Checkpoint(path.rename(tmp_path / "kept")).state["step"] == 3, "a copy by another name is one"


def test_prune_keeps_the_highest_steps(tmp_path):
    for step in (5, 20, 10):
        checkpoint.save(tmp_path, state_at(step), networks())
    checkpoint.prune(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_0000010", "step_0000020"]


def test_what_a_kill_left_is_tidied_and_a_users_files_are_not(tmp_path):
    """A checkpoint about to be replaced is put back; a name that is not of a save's own is somebody's."""
    path = checkpoint.save(tmp_path, state_at(2), networks())
    os.replace(path, tmp_path / ".step_0000002.old")
    (tmp_path / ".step_0000004.tmp").mkdir()
    (tmp_path / ".step_0000005.removed").touch()
    for name in (".step_0000002.bak", ".step_notes"):
        (tmp_path / name).mkdir()
    checkpoint.clean_up(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".step_0000002.bak", ".step_notes", "step_0000002"]
    assert checkpoint.newest(tmp_path).state == state_at(2)


def test_a_checkpoint_moved_to_another_disk_is_pruned_by_its_link(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path / "run", state_at(step), networks())
    os.replace(tmp_path / "run/step_0000001", tmp_path / "elsewhere")
    (tmp_path / "run/step_0000001").symlink_to(tmp_path / "elsewhere")
    checkpoint.prune(tmp_path / "run", 1)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["step_0000002"]
    assert (tmp_path / "elsewhere/manifest.json").exists()


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("model", float("nan"), "not finite"),
        ("ema", float("inf"), "not finite"),
        ("exp_avg", float("nan"), "not finite"),
        ("exp_avg_sq", float("inf"), "not finite"),
        ("exp_avg_sq", -1.0, "negative"),
    ],
)
def test_values_that_no_training_leaves_are_named(tmp_path, key, value, what):
    tensors = networks()
    tensors["model"][key]["a.bias"][1] = value
    found = Checkpoint(checkpoint.save(tmp_path, state_at(3), tensors))
    with pytest.raises(CheckpointError, match=rf"model\.{key}\.safetensors has .*{what}"):
        list(found.states("model", {"a.weight": torch.Size([3, 2]), "a.bias": torch.Size([3])}))
    if key in ("model", "ema"):
        with pytest.raises(CheckpointError, match=rf"model\.{key}\.safetensors has .*{what}"):
            found.weights("model", key)
