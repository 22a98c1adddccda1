"""Files are replaced whole or not at all, and read only where they are what they should be."""

import errno
import json
import os
import stat
from pathlib import Path

import pytest

from common import files, records
from common.files import FileError, WriteError
from common.records import Record


def test_a_file_has_the_permissions_that_the_umask_leaves(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_text(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_names_the_file_and_leaves_the_old_one(tmp_path, monkeypatch, call):
    path = tmp_path / "a.json"
    files.write_json(path, {"old": 1})

    def fails(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, call, fails)
    with pytest.raises(WriteError, match=r"a\.json: No space left"):
        files.write_json(path, {"new": 1})
    assert json.loads(path.read_text()) == {"old": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_an_error_of_the_writer_passes_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        files.write_json(path, {"a": object()})
    with pytest.raises(FileNotFoundError, match="other"), files.atomic_write(path):
        (tmp_path / "other").read_text()
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_file_counts_once_its_bytes_are_on_the_disk(tmp_path, monkeypatch):
    """The order that survives a power cut: bytes, then name, then the directory that holds the name."""
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(files.os, name, lambda *a, name=name, real=real: (calls.append(name), real(*a))[1])
    files.write_text(tmp_path / "a", "x")
    assert calls == ["fsync", "replace", "fsync"]


def test_no_folder_to_write_in_is_said(tmp_path):
    with pytest.raises(WriteError, match=r"cannot write .*/none/a: No such file"):
        files.write_text(tmp_path / "none" / "a", "x")
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="file/below"):
        files.make_directory(tmp_path / "file" / "below")


def test_what_cannot_be_written_is_said_before(tmp_path, monkeypatch):
    files.require_writable(tmp_path / "new" / "a")
    assert list((tmp_path / "new").iterdir()) == []
    files.write_text(tmp_path / "new" / "a", "x")
    files.require_writable(tmp_path / "new" / "a")
    os.mkfifo(tmp_path / "pipe")
    for path, why in (
        (tmp_path, "it is a directory"),
        (tmp_path / "pipe", "it is a named pipe"),
        ("/dev/null", "it is a device"),
        (tmp_path / "new/a/b", "File exists|Not a directory"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        with pytest.raises(WriteError, match=f"cannot write {path}: ({why})|cannot write .*new/a: {why}"):
            files.require_writable(path)
    monkeypatch.setattr(files.os, "access", lambda path, mode: False)  # to root everything is allowed
    with pytest.raises(WriteError, match=f"cannot write .*/b: no permission to write in {tmp_path}"):
        files.require_writable(tmp_path / "b")


def test_only_regular_files_are_opened_and_nothing_waits(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to(tmp_path / "none")
    for path, why in {
        "pipe": "a named pipe",
        "link": "a named pipe",
        ".": "a directory",
        "none": "does not exist",
        "dangling": "does not exist",
    }.items():
        with pytest.raises(FileError, match=why):
            files.open_regular(tmp_path / path)
    with pytest.raises(FileError, match="/dev/zero is a device"):
        files.open_regular("/dev/zero")


@pytest.mark.parametrize("path", ["a\0b", "\ud800"])
def test_what_cannot_be_a_path_is_no_file(path):
    with pytest.raises(FileError, match="is no path of a file"):
        files.open_regular(path)


@pytest.mark.parametrize(
    "content, why",
    [
        (b"{", "no JSON"),
        (b"", "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"1" * 10_000, "no JSON"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><p>", "web page"),
        (b"\xef\xbb\xbf<html>", "web page"),
        (b"<?xml version='1.0'?>", "or XML"),
        (b'{"a": NaN}', "no JSON .NaN is no finite"),
        (b"[-Infinity]", "no JSON .-Infinity is no"),
        (b"1e999", "no JSON"),
        (b"[" + 5000 * b"1" + b"]", r"no JSON \(a number in it is too long\)"),
    ],
)
def test_what_is_no_json_is_named(tmp_path, content, why):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(FileError, match=rf"a\.json.*{why}"):
        files.read_json(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("write", [files.write_json, records.write_checksummed])
def test_no_json_is_written_that_others_cannot_read(tmp_path, write, value):
    with pytest.raises(ValueError, match=rf"cannot write {tmp_path}/a\.json: .*not JSON compliant"):
        write(tmp_path / "a.json", {"a": [1.5, {"b": value}]})
    assert not list(tmp_path.iterdir())


def test_a_large_file_is_not_read_as_json(tmp_path):
    path = tmp_path / "a.json"
    with path.open("wb") as f:
        f.truncate(files.JSON_LIMIT + 1)
    with pytest.raises(FileError, match="at most"):
        files.read_json(path)


class Example(Record):
    step: int
    parts: dict[str, tuple[int, ...]]


@pytest.mark.parametrize(
    "content, where",
    [
        ([], "content"),
        ({}, "step"),
        ({"step": "4", "parts": {}}, "step"),
        ({"step": 4.5, "parts": {}}, "step"),
        ({"step": True, "parts": {}}, "step"),
        ({"step": 4, "parts": {"a": [1, "b"]}}, r"parts\.a\.1"),
        ({"step": 4, "parts": {"a": [1, None]}}, r"parts\.a\.1"),
    ],
)
def test_a_record_is_checked_and_the_key_named(tmp_path, content, where):
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(FileError, match=rf"a\.json is damaged: .*{where}"):
        records.read_record(tmp_path / "a.json", Example)


def test_a_record_with_a_checksum_is_as_it_was_written(tmp_path):
    path = tmp_path / "a.json"
    records.write_checksummed(path, {"step": 4, "parts": {"a": [1, 2]}, "note": 0.1})
    assert records.read_record(path, Example).note == 0.1
    edited = json.loads(path.read_text()) | {"note": 0.2}
    files.write_json(path, edited)
    with pytest.raises(FileError, match=r"a\.json is damaged, or was edited"):
        records.read_record(path, Example)
    del edited["checksum"]
    files.write_json(path, edited)
    assert records.read_record(path, Example).note == 0.2


def test_a_record_keeps_what_it_does_not_know(tmp_path):
    files.write_json(tmp_path / "a.json", {"step": 4, "parts": {"a": [1, 2]}, "later": [3]})
    found = records.read_record(tmp_path / "a.json", Example)
    assert (found.step, found.parts, found.later) == (4, {"a": (1, 2)}, [3])


@pytest.mark.parametrize("block", [files._BLOCK, 2])
def test_a_file_is_described_by_size_and_hash(tmp_path, monkeypatch, block):
    monkeypatch.setattr(files, "_BLOCK", block)
    path = Path(tmp_path / "a")
    path.write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-4's example
    assert files.file_entry(path) == {"bytes": 3, "sha256": known}


def test_faults_of_a_record_are_said_in_plain_words(tmp_path):
    for content, words in (
        ([], "its content: "),
        ({"step": "4", "parts": {}}, "step: a whole number is wanted"),
        ({"step": 4}, "parts: is missing"),
    ):
        files.write_json(tmp_path / "a.json", content)
        with pytest.raises(FileError, match=f"a.json is damaged: {words}") as e:
            records.read_record(tmp_path / "a.json", Example)
        assert "Input should" not in str(e.value) and "Example" not in str(e.value)


# --- whether a file is there


def test_a_name_is_there_whatever_it_leads_to(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "absent")
    names = ("file", "dangling", "", "absent", "file/below")
    assert [files.path_exists(tmp_path / name) for name in names] == [True, True, True, False, False]


@pytest.mark.parametrize("number", [errno.EACCES, errno.ESTALE, errno.EIO, errno.ELOOP])
def test_what_cannot_be_looked_for_is_not_absent(monkeypatch, number):
    def fails(path):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, "lstat", fails)
    with pytest.raises(FileError, match=f"cannot look for /data/manifest.json: {os.strerror(number)}"):
        files.path_exists("/data/manifest.json")


# --- what is replaced, and what is not


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda path: path.mkdir(), "it is a directory"),
        (os.mkfifo, "it is a named pipe"),
        (lambda path: path.symlink_to("/dev/null"), "it is a device"),
        (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
    ],
    ids=["directory", "pipe", "device", "loop"],
)
def test_what_is_no_file_is_not_replaced(tmp_path, made, said):
    made(tmp_path / "x")
    before = os.lstat(tmp_path / "x")
    with pytest.raises(WriteError, match=f"cannot write {tmp_path}/x: {said}"):
        files.write_text(tmp_path / "x", "y")
    after = os.lstat(tmp_path / "x")
    assert os.path.samestat(after, before) and after.st_mtime_ns == before.st_mtime_ns
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_one_and_what_it_leads_to_is_replaced(tmp_path, there):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder/file")
    if there:
        (tmp_path / "folder/file").write_text("old")
    files.write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and os.listdir(tmp_path / "folder") == ["file"]
    assert (tmp_path / "folder/file").read_text() == "new"


def test_a_finished_file_takes_the_name_of_another(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text(name)
    files.replace_file(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "a" and not (tmp_path / "a").exists()
    with pytest.raises(WriteError, match="absent/x: "):
        files.replace_file(tmp_path / "c", tmp_path / "absent/x")
    assert (tmp_path / "c").read_text() == "c"


@pytest.mark.parametrize("links", [True, False])
def test_a_new_name_is_never_that_of_another_file(tmp_path, monkeypatch, links):
    """Also on a file system without hard links."""

    def refuses(source, path):
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(files.os, "link", refuses)
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    with pytest.raises(FileExistsError):
        files.link_without_overwrite(tmp_path / "a", tmp_path / "b")
    files.link_without_overwrite(tmp_path / "a", tmp_path / "c")
    assert (tmp_path / "b").read_text() == "b" and (tmp_path / "c").read_text() == "a"
    with pytest.raises(WriteError, match="absent/x: "):
        files.link_without_overwrite(tmp_path / "b", tmp_path / "absent/x")
