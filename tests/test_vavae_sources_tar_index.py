"""Indexes of tars: made once, by several processes at a time, kept where that is possible, and refused when wrong."""

import errno
import json
import logging
import multiprocessing
import os
import re
import shutil
import tarfile
from pathlib import Path

import pytest
import torch

from common.files import FileError
from tests.tars import content, pack, sample, shards
from vavae.sources import open_source, tar_index

fork = multiprocessing.get_context("fork")


def test_a_tar_is_gone_through_once(tmp_path, monkeypatch):
    shards(tmp_path)
    scanned, real = [], tarfile.open
    monkeypatch.setattr(tarfile, "open", lambda *args, **options: scanned.append(args) or real(*args, **options))
    first = open_source(tmp_path)
    assert len(scanned) == 3
    again = open_source(tmp_path)
    assert len(scanned) == 3 and torch.equal(first.labels, again.labels)
    assert [first.read(i) for i in range(12)] == [again.read(i) for i in range(12)]
    (tmp_path / "s-001.tar.index.json").unlink()
    open_source(tmp_path)
    assert len(scanned) == 4


def edited(path: Path, change) -> None:
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def of_another(path: Path, members: list) -> None:
    """Put the index of another tar in the place of one."""
    other = pack(path.parent / "y.tar", members)
    open_source(other)
    shutil.copy(f"{other}.index.json", path)
    other.unlink()


INDEXES = {
    "of another tar": (lambda path: of_another(path, [*sample("8", 8), *sample("9", 9)]), "the index of another tar"),
    "of another of the same size": (lambda path: of_another(path, sample("2", 0)), "the index of another tar"),
    "edited": (lambda path: edited(path, lambda r: r.update(offsets="1024")), "is damaged, or was edited"),
    "without a column": (lambda path: edited(path, lambda r: (r.pop("sizes"), r.pop("checksum"))), "sizes: is missing"),
    "beyond the tar": (
        lambda path: edited(path, lambda r: (r.update(offsets="999999"), r.pop("checksum"))), "do not fit",
    ),
    "of no number": (lambda path: edited(path, lambda r: (r.update(labels="x"), r.pop("checksum"))), "do not fit"),
    "of another format": (
        lambda path: edited(path, lambda r: (r.update(format=2), r.pop("checksum"))), "format 2, written by another",
    ),
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:50]), "is damaged"),
    "empty": (lambda path: path.write_bytes(b""), "is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("name", INDEXES)
def test_an_index_that_is_not_right_is_named(tmp_path, name):
    tar = pack(tmp_path / "x.tar", sample("1", 0))
    open_source(tar)
    change, message = INDEXES[name]
    change(tmp_path / "x.tar.index.json")
    with pytest.raises(FileError, match=rf"x\.tar\.index\.json.*{message}.*; remove it to have it made anew") as error:
        open_source(tar)
    assert "\n" not in str(error.value)
    (tmp_path / "x.tar.index.json").unlink()
    assert len(open_source(tar)) == 1


def test_a_tar_that_was_appended_to_is_indexed_anew(tmp_path, caplog):
    tar = pack(tmp_path / "x.tar", sample("1", 0))
    assert len(open_source(tar)) == 1
    pack(tar, [*sample("1", 0), *sample("2", 1)])
    caplog.clear()
    with caplog.at_level("INFO"):
        assert open_source(tar).labels.tolist() == [0, 1]
    assert "1 of them anew because the tar was modified" in caplog.text
    caplog.clear()
    assert len(open_source(tar)) == 2 and "anew" not in caplog.text


def test_a_folder_that_cannot_be_written_has_its_indexes_in_the_cache(tmp_path, monkeypatch, caplog):
    def refuse(path, content):
        if any(str(path).startswith(str(folder)) for folder in refused):
            raise tar_index.WriteError(f"cannot write {path}: Read-only file system")
        return real(path, content)

    real, refused = tar_index.write_checksummed, [tmp_path / "data"]
    monkeypatch.setattr(tar_index, "write_checksummed", refuse)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tars = shards(tmp_path / "data")
    for _ in range(2):
        assert len(open_source(tmp_path / "data")) == 12
    kept = list((tmp_path / "cache").rglob("*.*"))
    assert len(kept) == 3 and {path.parent for path in kept} == {tmp_path / "cache/lightningdit/tar_index"}
    assert sorted((tmp_path / "data").iterdir()) == tars
    # Without any place for them the data is read all the same, and that is said once.
    refused.append(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    caplog.clear()
    with caplog.at_level(logging.INFO, "vavae"):
        assert open_source(tmp_path / "data").read(3) == content(tars[0], "03.jpg")
    assert [r.levelname for r in caplog.records] == ["INFO", "WARNING", "INFO"]
    assert "indexes are not kept" in caplog.messages[1] and "Read-only file system" in caplog.messages[1]


BIG = 100_000  # bytes of an image: of three in a tar the second lies in no end of it


def big_tar(path: Path, middle: str, modified_ns: int) -> Path:
    """Three images, of which the second has the name and label `middle`; size and ends are the same for any digit."""
    pack(path, [*sample("1", 1, size=BIG), *sample(middle, middle, size=BIG), *sample("3", 3, size=BIG)])
    os.utime(path, ns=(modified_ns, modified_ns))
    return path


@pytest.fixture
def scans(monkeypatch):
    """The tars that are gone through."""
    scanned, real = [], tar_index.scan_tar
    monkeypatch.setattr(tar_index, "scan_tar", lambda tar: scanned.append(tar) or real(tar))
    return scanned


@pytest.fixture
def refuse(tmp_path, monkeypatch):
    """Folders that cannot be written."""

    def write(path, content):
        if path.parent in refused:
            raise tar_index.WriteError(f"cannot write {path}: Read-only file system")
        real(path, content)

    real, refused = tar_index.write_checksummed, []
    monkeypatch.setattr(tar_index, "write_checksummed", write)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return refused


@pytest.mark.parametrize("beside", [True, False])
def test_a_tar_edited_in_its_middle_is_gone_through_anew(tmp_path, refuse, scans, caplog, beside):
    tar = tmp_path / "data/x.tar"
    if not beside:
        refuse.append(tar.parent)
    big_tar(tar, "2", 1)
    big_tar(tmp_path / "data/y.tar", "2", 1)
    assert open_source(tar.parent).labels.tolist() == [1, 2, 3, 1, 2, 3] and len(scans) == 2
    before = tar_index._identity(tar)[0]
    big_tar(tar, "7", 2)
    assert tar_index._identity(tar)[0] == before
    caplog.clear()
    with caplog.at_level(logging.INFO, "vavae"):
        source = open_source(tar.parent)
    assert source.labels.tolist() == [1, 7, 3, 1, 2, 3] and source.read(1) == content(tar, "7.jpg")
    assert scans[2:] == [tar]
    assert re.search(
        r"made the index of 1 of 2 tars in .* s, 1 of them anew because the tar was modified$", caplog.messages[0]
    )
    assert open_source(tar.parent).labels.tolist() == [1, 7, 3, 1, 2, 3] and len(scans) == 3
    kept = tar.parent if beside else tmp_path / "cache"
    assert len(list(kept.rglob("*.json"))) == 2 == len(list(tmp_path.rglob("*.json")))
    assert not list(tmp_path.rglob(".*"))


def test_a_stale_index_that_cannot_be_replaced_gives_way_to_the_one_in_the_cache(tmp_path, refuse, scans):
    tar = big_tar(tmp_path / "data/x.tar", "2", 1)
    open_source(tar)
    refuse.append(tar.parent)
    big_tar(tar, "7", 2)
    beside = (tar.parent / "x.tar.index.json").read_bytes()
    for _ in range(2):
        assert open_source(tar).labels.tolist() == [1, 7, 3] and len(scans) == 2
    assert (tar.parent / "x.tar.index.json").read_bytes() == beside
    assert len(list((tmp_path / "cache").rglob("*.json"))) == 1
    # Both out of date: the one in the cache is replaced.
    big_tar(tar, "8", 3)
    for _ in range(2):
        assert open_source(tar).labels.tolist() == [1, 8, 3] and len(scans) == 3
    # As it was at first, so that the one beside it fits again.
    big_tar(tar, "2", 1)
    assert open_source(tar).labels.tolist() == [1, 2, 3] and len(scans) == 3


def test_a_name_that_the_system_does_not_give_away_leaves_the_index_as_it_is(tmp_path, monkeypatch, scans):
    """As in a folder where only its owner may replace a file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tar = big_tar(tmp_path / "data/x.tar", "2", 1)
    open_source(tar)
    big_tar(tar, "7", 2)
    real = os.replace

    def replace(source, path):
        if Path(path) == tar.parent / "x.tar.index.json":
            raise PermissionError(errno.EPERM, "Operation not permitted")
        real(source, path)

    monkeypatch.setattr(os, "replace", replace)
    for _ in range(2):
        assert open_source(tar).labels.tolist() == [1, 7, 3] and len(scans) == 2
    assert sorted(path.name for path in tar.parent.iterdir()) == ["x.tar", "x.tar.index.json"]


def test_tars_that_another_process_has_made_meanwhile_are_left_out(tmp_path, monkeypatch):
    tars, made, real = shards(tmp_path), [], tar_index._make

    def make(tar):
        made.append(tar)
        for other in set(tars) - {tar}:
            real(other)
        return real(tar)

    monkeypatch.setattr(tar_index, "_make", make)
    assert open_source(tmp_path).labels.tolist() == list(range(12)) and len(made) == 1


def test_each_process_takes_the_tars_in_an_order_of_its_own(tmp_path, monkeypatch):
    orders, real = [], tar_index._make
    monkeypatch.setattr(tar_index, "_make", lambda tar: orders[-1].append(tar.name) or real(tar))
    for process in ("a.1", "a.2", "b.1"):
        orders.append([])
        monkeypatch.setattr(tar_index, "_process_name", lambda process=process: process)
        shards(tmp_path / process, count=12, each=1)
        open_source(tmp_path / process)
    assert len({tuple(order) for order in orders}) == 3 and len({tuple(sorted(order)) for order in orders}) == 1


def open_at_once(path, barrier, results):
    made, real = [], tar_index._make
    tar_index._make = lambda tar: made.append(tar) or real(tar)
    barrier.wait()
    results.put((open_source(path).labels.tolist(), len(made)))


@pytest.mark.parametrize("stale", [False, True])
def test_processes_that_begin_at_once_agree(tmp_path, stale):
    tars = shards(tmp_path, count=40, each=20)
    if stale:
        open_source(tmp_path)
        for tar in tars:
            os.utime(tar)
    barrier, results = fork.Barrier(3), fork.Queue()
    processes = [fork.Process(target=open_at_once, args=(tmp_path, barrier, results)) for _ in range(3)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert [labels for labels, _ in found] == 3 * [list(range(800))]
    assert 40 <= sum(made for _, made in found) < 120
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {f"s-{i:03d}.tar{end}" for i in range(40) for end in ("", ".index.json")}
