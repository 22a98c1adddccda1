"""A directory has one owner at a time, who is named; one that was killed is succeeded."""

import errno
import json
import multiprocessing
import os
import socket
import time
from pathlib import Path

import pytest

import launch.__main__ as program
from launch.runtime import run_lock
from launch.runtime.run_lock import NAME, DirectoryInUseError, Owner, lock_directory
from tests import toy
from tests.children import call, launch, print_to

_fork = multiprocessing.get_context("fork")


class Alone:
    """One process."""

    is_main = True

    def raise_on_all(self, error):
        if error is not None:
            raise error


def hold(directory: Path, ready, released) -> None:
    with lock_directory(directory, Alone()):
        ready.set()
        released.wait()


@pytest.fixture
def holder(tmp_path):
    """A process that holds tmp_path, and the event at which it lets go."""
    ready, released = _fork.Event(), _fork.Event()
    process = _fork.Process(target=hold, args=(tmp_path, ready, released))
    process.start()
    assert ready.wait(60)
    yield process, released
    process.kill()
    process.join()


def take(directory: Path) -> None:
    with lock_directory(directory, Alone()):
        assert json.loads((directory / NAME).read_text())["pid"] == os.getpid()


def test_a_second_owner_is_refused_and_told_of_the_first(tmp_path, holder, capsys):
    process, released = holder
    owner = f"process {process.pid} on {socket.gethostname()}"
    with pytest.raises(DirectoryInUseError, match=rf"{tmp_path} is in use by {owner} since 2\d\d\d-"):
        take(tmp_path)
    released.set()
    process.join()
    take(tmp_path)
    assert not (tmp_path / NAME).exists() and capsys.readouterr().out == ""


def test_one_that_was_killed_is_succeeded_and_that_is_said(tmp_path, holder, capsys):
    process, _ = holder
    process.kill()
    process.join()
    take(tmp_path)
    assert f"{tmp_path} was left by process {process.pid} on " in capsys.readouterr().out
    take(tmp_path)
    assert "was left" not in capsys.readouterr().out


def test_a_process_does_not_hold_a_directory_twice(tmp_path):
    with lock_directory(tmp_path, Alone()), pytest.raises(DirectoryInUseError, match=f"process {os.getpid()} "):
        take(tmp_path / ".." / tmp_path.name)
    take(tmp_path)


def test_a_lock_that_its_owner_is_just_removing_counts_for_nothing(tmp_path, monkeypatch):
    """The file opened is then no longer the one that others will find."""
    opened, real = [], os.open

    def and_removed(path, *args):
        handle = real(path, *args)
        if not opened:
            os.unlink(path)
        opened.append(handle)
        return handle

    monkeypatch.setattr(os, "open", and_removed)
    with lock_directory(tmp_path, Alone()):
        assert len(opened) == 2 and os.path.samestat(os.fstat(opened[1]), (tmp_path / NAME).stat())


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": 3}', "\0" * 64])
def test_what_a_kill_has_left_of_a_lock_keeps_nobody_out(tmp_path, content):
    (tmp_path / NAME).write_text(content)
    take(tmp_path)


def test_a_lock_is_no_way_to_another_file(tmp_path):
    (tmp_path / "victim").write_text("kept")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / NAME).symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match=rf"cannot write {tmp_path}/run/\.lock"):
        take(tmp_path / "run")
    assert (tmp_path / "victim").read_text() == "kept"


def test_a_directory_made_for_nothing_goes_again(tmp_path):
    take(tmp_path / "a")
    (tmp_path / "b").mkdir()
    take(tmp_path / "b")
    with lock_directory(tmp_path / "c", Alone()):
        (tmp_path / "c/file").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "c"]


class TestWithoutLocks:
    """On a file system that has none, the file's content decides."""

    @pytest.fixture(autouse=True)
    def no_locks(self, monkeypatch):
        def refuse(*args):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(run_lock.fcntl, "lockf", refuse)

    def test_who_makes_the_file_holds_the_directory(self, tmp_path):
        take(tmp_path)
        assert not (tmp_path / NAME).exists()

    @pytest.mark.parametrize(
        ("change", "free"),
        [
            ({}, False),
            ({"host": "another"}, False),
            ({"started": "boot/1"}, True),  # another process had this number
            ({"pid": 1 << 30}, True),
            ({"pid": 1 << 30, "host": "another"}, False),
        ],
    )
    def test_only_an_owner_that_has_certainly_ended_is_succeeded(self, tmp_path, capsys, change, free):
        owner = Owner.this_process().model_copy(update=change)
        (tmp_path / NAME).write_text(owner.model_dump_json())
        if free:
            take(tmp_path)
            assert f"was left by {owner}" in capsys.readouterr().out
        else:
            with pytest.raises(
                DirectoryInUseError, match=f"in use by {owner} .*if that has ended, remove {tmp_path / NAME}"
            ):
                take(tmp_path)

    def test_an_owner_about_to_write_his_name_is_one(self, tmp_path):
        (tmp_path / NAME).touch()
        with pytest.raises(DirectoryInUseError, match="in use by another process"):
            take(tmp_path)


@pytest.mark.parametrize(
    ("environment", "hint"),
    [
        ({"SLURM_NTASKS": "2"}, True),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "1"}, True),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8"}, False),
        ({"SLURM_NTASKS": "2", "RANK": "0"}, False),
        ({}, False),
    ],
)
def test_tasks_of_one_srun_are_told_what_they_are(tmp_path, monkeypatch, environment, hint):
    for name in ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with lock_directory(tmp_path, Alone()), pytest.raises(DirectoryInUseError) as refused:
        take(tmp_path)
    assert ("SLURM started" in str(refused.value)) == hint == ("launcher" in str(refused.value))


def test_what_cannot_be_locked_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=rf"cannot write {tmp_path}/file/run: Not a directory"):
        take(tmp_path / "file/run")
    (tmp_path / NAME).mkdir()
    with pytest.raises(OSError, match=rf"cannot write {tmp_path}/\.lock: Is a directory"):
        take(tmp_path)


def _run_slowly(argv: list[str], log: str) -> None:
    """Run a program whose main process takes a second to say an error, in which the others have long met it."""
    rank = os.environ["RANK"]
    print_to(f"{log}.{rank}")
    if rank == "0":
        message = program._message
        program._message = lambda error: time.sleep(1) or message(error)
    program.run(argv)


@pytest.mark.parametrize("slow", [False, True])
def test_every_process_of_a_refused_run_ends_and_the_main_one_says_why(tmp_path, holder, slow):
    toy.write_latents(tmp_path / "latents")
    config = toy.write_run(
        tmp_path / "run.yaml",
        toy.LIGHTNINGDIT,
        data={"data_path": str(tmp_path / "latents")},
        train={"output_dir": str(tmp_path.parent), "exp_name": tmp_path.name},
    )
    argv, log, started = ["train", "lightningdit", str(config)], tmp_path / "log", time.monotonic()
    statuses = call(_run_slowly, argv, str(log), world_size=2) if slow else launch(*argv, world_size=2, log=log)
    assert statuses == [69, 69] and time.monotonic() - started < 60
    said = [(tmp_path / f"log.{rank}").read_text() for rank in (0, 1)]
    assert f"error: {tmp_path} is in use by process {holder[0].pid}" in said[0] and "error" not in said[1]
    assert not (tmp_path / "checkpoints").exists() and holder[0].exitcode is None
