"""Tars of samples: made by Python's tarfile, and compared with what it reads back from them."""

import gzip
import io
import logging
import multiprocessing
import os
import pickle
import random
import tarfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from common.files import FileError
from tests.tars import content, pack, sample, shards
from vavae.image_files import UnreadableImage
from vavae.sources import open_source
from vavae.sources.open_files import OpenFiles
from vavae.sources.tar_scan import scan_tar

fork = multiprocessing.get_context("fork")
LONG_NAME = f"{90 * 'x'}/{40 * 'y'}"


def lines(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_are_grouped_by_their_key(tmp_path, caplog, format):
    names = ["b/2.JPEG", "a.d/1.png", f"{LONG_NAME}.webp", "./c.Tiff", "x.jpg"]
    labels = ["owl\n", "cat", " dog ", "cat", "2"]
    tar = pack(
        tmp_path / "x.tar",
        [
            ("b", {"type": tarfile.DIRTYPE}),
            *[(name, name.encode() * 99) for name in names[:3]],
            ("b/2.seg.png", b"other"),
            ("b/2.json", b"{}"),
            *[(f"{name.rpartition('.')[0]}.CLS", label.encode()) for name, label in zip(names, labels, strict=True)],
            *[(name, name.encode() * 99) for name in names[3:]],
            ("._b/2.jpg", b"hidden"),
            ("__MACOSX/3.jpg", b"hidden"),
            ("README", b"text"),
            ("lonely.txt", b"text"),
            ("link.jpg", {"type": tarfile.SYMTYPE, "linkname": "x.jpg"}),
            ("hard.jpg", {"type": tarfile.LNKTYPE, "linkname": "x.jpg"}),
            ("pipe.jpg", {"type": tarfile.FIFOTYPE}),
        ],
        format,
    )
    with caplog.at_level(logging.INFO, "vavae"):
        source = open_source(tar)
    assert source.classes == ("2", "cat", "dog", "owl") and source.labels.tolist() == [3, 1, 2, 1, 0]
    assert source.labels.dtype == torch.int64 and source.description == str(tar)
    assert [source.read(index) for index in range(5)] == [content(tar, name) for name in names]
    shown = ["b/2.JPEG", "a.d/1.png", f"{LONG_NAME}.webp", "c.Tiff", "x.jpg"]
    assert [source.name(index) for index in range(5)] == [f"{tar}: {name}" for name in shown]
    assert source.entry(1) == f"x.tar: a.d/1.png {99 * 9}"
    made, found = lines(caplog)
    assert made.startswith(f"{tar}: made the index of 1 of 1 tars in ")
    assert found == (
        f"{tar}: 5 images in 4 classes (2, cat, dog, …); left out: 2 × hidden (x.tar: ._b/2.jpg, x.tar: __MACOSX/3.jpg)"
        ", 2 × link (x.tar: link.jpg, x.tar: hard.jpg), 1 × pipe, socket or device (x.tar: pipe.jpg)"
        ", 1 × sample without an image (x.tar: lonely), 1 × without an extension (x.tar: README)"
    )


def test_patterns_and_folders_are_their_tars_in_order(tmp_path, caplog):
    tars = shards(tmp_path)
    (tmp_path / "README.md").write_text("about")
    (tmp_path / ".git").mkdir()
    with caplog.at_level(logging.INFO, "vavae"):
        whole = open_source(tmp_path)
        backwards = open_source(f"{tmp_path}/s-{{002..000}}.tar", num_classes=12)
    assert whole.labels.tolist() == list(range(12)) and whole.classes is None
    assert backwards.labels.tolist() == [8, 9, 10, 11, 4, 5, 6, 7, 0, 1, 2, 3]
    assert whole.name(7) == f"{tars[1]}: 13.jpg" == backwards.name(7)
    assert backwards.read(0) == content(tars[2], "20.jpg") == whole.read(8)
    assert [whole.entry(index) for index in (0, 11)] == ["s-000.tar: 00.jpg 500", "s-002.tar: 23.jpg 800"]
    made, found, again = lines(caplog)
    assert "made the index of 3 of 3 tars" in made
    assert found.endswith(": 12 images with labels 0 to 11, in 3 tars; left out: 1 × beside the tars (README.md)")
    assert again.endswith(": 12 images with labels 0 to 11, in 3 tars")


def test_labels_may_not_be_wanted_and_a_class_file_orders_them(tmp_path):
    tar = pack(tmp_path / "x.tar", [*sample("1", "cat"), *sample("2"), *sample("3", "owl")])
    source = open_source(tar, labelled=False)
    assert source.classes is None and source.labels.tolist() == [0, 0, 0]
    with pytest.raises(FileError, match=r"x\.tar: 2\.jpg has no label: its sample has no member with the ending \.cls"):
        open_source(tar)
    (tmp_path / "classes.txt").write_text("owl\ncat\n")
    named = pack(tmp_path / "y.tar", [*sample("1", "cat"), *sample("3", "owl")])
    source = open_source(named, class_file=tmp_path / "classes.txt")
    assert source.classes == ("owl", "cat") and source.labels.tolist() == [1, 0]
    (tmp_path / "classes.txt").write_text("cart\n")
    with pytest.raises(ValueError, match=r"y\.tar: 1\.jpg: class 'cat' is not in .* \(did you mean 'cart'\?\)"):
        open_source(named, class_file=tmp_path / "classes.txt")
    with pytest.raises(ValueError, match=r"data\.labels_file is l\.txt, but .*y\.tar has its own labels"):
        open_source(named, labels_file="l.txt")


def test_empty_images_are_refused_or_left_out(tmp_path, caplog):
    tar = pack(tmp_path / "x.tar", [*sample("1", 3), *sample("2", 4, size=0), *sample("3", 5)])
    with pytest.raises(UnreadableImage, match=r"1 image is empty in .*x\.tar: x\.tar: 2\.jpg"):
        open_source(tar)
    with caplog.at_level(logging.INFO, "vavae"):
        source = open_source(tar, on_unreadable="skip")
    assert source.labels.tolist() == [3, 5] and source.read(1) == content(tar, "3.jpg") and source.empty == 1
    assert open_source(pack(tmp_path / "y.tar", sample("1", 3))).empty == 0
    said = "2 images with labels 3 to 5; left out: 1 × empty file (x.tar: 2.jpg)"
    assert any(line.endswith(said) for line in lines(caplog))


# Tars that are not right


def whole_tar(path: Path) -> bytes:
    return pack(path, [*sample("1", 0), *sample("2", 1, size=3000)]).read_bytes()


def header_broken(path: Path) -> bytes:
    """Without its second header, at which tarfile alone would stop as if that were the end."""
    data = bytearray(whole_tar(path))
    data[512 + 1024 : 512 + 1024 + 512] = b"\x01" * 512
    return bytes(data)


def sparse(path: Path) -> bytes:
    """As GNU tar writes it in PAX format."""
    headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "1.jpg", "GNU.sparse.realsize": "9"}
    content = b"1\n0\n9\n".ljust(512, b"\0") + b"123456789"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("GNUSparseFile.1/1.jpg")
        member.size, member.pax_headers = len(content), headers
        tar.addfile(member, io.BytesIO(content))
    return path.read_bytes()


def packed(*members):
    return lambda path: pack(path, members).read_bytes()


BROKEN = {
    "nothing": (lambda path: b"", "is empty, no tar"),
    "text": (lambda path: b"no tar at all " * 99, "is no tar, or damaged at its begin"),
    "web page": (lambda path: b"<html>", "is a web page"),
    "pointer": (lambda path: b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    "gzip": (lambda path: gzip.compress(whole_tar(path)), "is compressed by gzip: unpack it first"),
    "zstd": (lambda path: b"\x28\xb5\x2f\xfd" + bytes(99), "is compressed by zstd"),
    "inside a member": (
        lambda path: whole_tar(path)[: 512 * 8],
        r"is cut short: 2\.jpg reaches to byte 6,072 of 4,096",
    ),
    "inside a header": (lambda path: whole_tar(path)[: 512 * 5 + 100], "is cut short: its end is missing"),
    "between members": (lambda path: whole_tar(path)[: 512 * 5], "is cut short: its end is missing"),
    "header": (header_broken, "is damaged: no header of a member at byte 1,536"),
    "two in one": (lambda path: whole_tar(path) * 2, "goes on behind its end at byte"),
    "no images": (
        packed(("1.txt", b"x"), ("1.cls", b"0")),
        r"holds no images .*1 × sample without an image \(x\.tar: 1\)",
    ),
    "no members": (packed(), "holds no images"),
    "two images": (packed(*sample("1", 0), ("1.png", b"x")), r"1\.png is a second image of its sample, beside 1\.jpg"),
    "one twice": (packed(*sample("1", 0), *sample("2", 0), ("1.JPG", b"x")), r"x\.tar: 1\.JPG is there twice"),
    "two labels": (packed(*sample("1", 0), ("1.cls", b"1")), r"1\.cls is there twice"),
    "binary label": (packed(*sample("1"), ("1.cls", b"\x03\0")), r"1\.cls is no label: it holds b'\\x03\\x00'"),
    "empty label": (packed(*sample("1"), ("1.cls", b"\n")), r"1\.cls is no label"),
    "long label": (packed(*sample("1"), ("1.cls", b"x" * 1001)), r"1\.cls is no label"),
    "negative label": (packed(*sample("1", -1)), r"x\.tar: 1\.jpg: label '-1' is neither a whole number from 0 nor"),
    "sparse": (sparse, r"1\.jpg is stored as a sparse file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_tar_that_is_not_right_is_named(tmp_path, name):
    make, message = BROKEN[name]
    path = tmp_path / "x.tar"
    path.write_bytes(make(path))
    with pytest.raises(ValueError, match=message) as error:
        open_source(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_damage_is_an_error_that_names_the_tar_or_another_content(tmp_path, format):
    rng, path = random.Random(1), tmp_path / "x.tar"
    whole = pack(path, [*sample("1", 0), *sample(120 * "é", 1)], format).read_bytes()
    refused = 0
    for trial in range(300):
        damaged = bytearray(whole)
        place = 512 * rng.randrange(len(whole) // 512)
        damaged[place + rng.choice([rng.randrange(512), 124, 156, 345, 482])] = rng.choice(b"\x80\xffS-xLg0")
        damaged[place + 148 : place + 156] = 8 * b" "
        damaged[place + 148 : place + 156] = b"%06o\0 " % (sum(damaged[place : place + 512]) % 8**6)
        path.write_bytes(damaged if trial % 3 else damaged[: rng.randrange(len(whole))])
        try:
            scan_tar(path)
        except FileError as error:
            assert str(path) in str(error)
            refused += 1
    assert 60 < refused < 300


def test_missing_tars_of_a_pattern_are_counted(tmp_path):
    shards(tmp_path)
    with pytest.raises(FileError, match=r"2 of 5 tars of .* do not exist, the first is .*/s-003\.tar$"):
        open_source(f"{tmp_path}/s-{{000..004}}.tar")
    with pytest.raises(FileError, match=r"/s-9\.tar does not exist$"):
        open_source(f"{tmp_path}/s-9.tar")
    with pytest.raises(ValueError, match=r"names .*/s-000\.tar twice"):
        open_source(f"{tmp_path}/s-{{000,000}}.tar")


# Reading


def test_reads_by_threads_forked_processes_and_copies_agree(tmp_path):
    tars = shards(tmp_path, count=6, each=10)
    want = [content(tar, f"{shard}{i}.jpg") for shard, tar in enumerate(tars) for i in range(10)]
    source = open_source(tmp_path)
    source._files.limit = 2  # so that files close while others are read
    order = [(7 * i) % 60 for i in range(1200)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.read, order)) == [want[i] for i in order]
    results = fork.Queue()
    process = fork.Process(target=lambda: results.put([source.read(i) for i in range(60)]), daemon=True)
    with source._files._opened[1]:  # another thread holds the lock while the process is forked
        process.start()
    assert results.get(timeout=20) == want
    process.join()
    copy = pickle.loads(pickle.dumps(source))
    assert [copy.read(i) for i in range(60)] == want and copy.entry(59) == source.entry(59)


def test_few_files_stay_open_and_all_close(tmp_path):
    def opened() -> int:
        return sum(str(tmp_path) in os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd"))

    tars = shards(tmp_path, count=6)
    source = open_source(tmp_path)
    assert opened() == 0
    files = OpenFiles(limit=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        held = files._handle(tars[0])
        for tar in tars:
            files.read(tar, 0, 10)
        assert opened() == 3  # the one in use is closed later
        assert os.pread(held.number, 6, 0) == b"00.jpg"
        del held
        assert opened() == 2
        del files
        assert opened() == 0
    assert not [warning for warning in caught if warning.category is ResourceWarning]  # closed, not lost
    source.read(11)
    assert opened() == 1


UNREADABLE = {
    "cut short": (lambda tar: os.truncate(tar, 2000), r"x\.tar: 2\.jpg is cut short: 0 of 700 bytes"),
    "cut inside": (lambda tar: os.truncate(tar, 512 * 6 + 50), r"x\.tar: 2\.jpg is cut short: 50 of 700 bytes"),
    "gone": (lambda tar: tar.unlink(), r"x\.tar does not exist"),
    "a pipe": (lambda tar: (tar.unlink(), os.mkfifo(tar)), r"x\.tar is a named pipe"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_image_that_cannot_be_read_is_named(tmp_path, name):
    tar = pack(tmp_path / "x.tar", [*sample("1", 0), *sample("2", 1)])
    source = open_source(tar)
    change, message = UNREADABLE[name]
    change(tar)
    with pytest.raises(UnreadableImage, match=rf"cannot read image: .*{message}"):
        source.read(1)
    for index in (-1, 2):
        with pytest.raises(IndexError, match=rf"image {index} of 2"):
            source.read(index)


def test_a_placeholder_in_a_tar_is_refused_when_it_is_read(tmp_path):
    source = open_source(pack(tmp_path / "x.tar", [("1.jpg", b"<html>"), ("1.cls", b"0")]))
    with pytest.raises(UnreadableImage, match=r"x\.tar: 1\.jpg is a web page"):
        source.read(0)
