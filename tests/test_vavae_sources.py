"""Folders and lists of images, the order of classes, names with braces: against orders written out by hand."""

import logging
import os
import pickle
import re

import pytest
import torch

from common.files import FileError
from vavae.image_files import UnreadableImage
from vavae.sources import open_source, source_exists
from vavae.sources.braces import expand_braces
from vavae.sources.source import describe_left_out

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"


def write(path, content=b"image"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.fixture
def folder(tmp_path):
    """Two classes, sub-folders inside one of them; 5 images, each with its name as content."""
    for name in ("b/x.png", "b/deep/y.PNG", "a/2.bmp", "a/10.png", "a/clear.webp"):
        write(tmp_path / "images" / name, name)
    write(tmp_path / "images/a/notes.txt")
    return tmp_path / "images"


def said(caplog, path, **options):
    """A source, and its one line in the log."""
    caplog.clear()
    with caplog.at_level(logging.INFO, "vavae"):
        source = open_source(path, **options)
    (record,) = caplog.records
    assert record.levelno == logging.INFO and record.name.startswith("vavae.")
    return source, record.getMessage()


# Folders


def test_a_folder_has_sorted_classes_and_paths(folder, caplog):
    source, line = said(caplog, folder)
    names = ["a/10.png", "a/2.bmp", "a/clear.webp", "b/deep/y.PNG", "b/x.png"]
    assert source.classes == ("a", "b") and source.description == str(folder) and len(source) == 5
    assert source.labels.dtype == torch.int64 and source.labels.tolist() == [0, 0, 0, 1, 1]
    assert [source.read(index).decode() for index in range(5)] == names
    assert [source.name(index) for index in range(5)] == [str(folder / name) for name in names]
    assert [source.entry(index) for index in range(5)] == [f"{name} {len(name)}" for name in names]
    assert line == f"{folder}: 5 images in 2 classes (a, b); left out: 1 × .txt (a/notes.txt)"
    again = pickle.loads(pickle.dumps(source))
    assert again.read(4) == b"b/x.png" and torch.equal(again.labels, source.labels)


def test_a_folder_without_labels_is_all_its_images_by_the_parts_of_their_paths(tmp_path, caplog):
    for name in ("a.x/1.png", "a/z.png", "a/b/1.png", "top.jpg", "a-/1.png", "a/.hidden.png", "a/t.txt"):
        write(tmp_path / name)
    source, line = said(caplog, tmp_path, labelled=False, class_file="nowhere", num_classes=3)
    names = ["a/b/1.png", "a/z.png", "a-/1.png", "a.x/1.png", "top.jpg"]
    assert [os.path.relpath(source.name(index), tmp_path) for index in range(5)] == names
    assert source.classes is None and source.labels.tolist() == [0] * 5
    assert line == f"{tmp_path}: 5 images; left out: 1 × .txt (a/t.txt), 1 × hidden (a/.hidden.png)"
    with pytest.raises(ValueError, match=r"no images below .*/empty \(of \.bmp, "):
        (tmp_path / "empty").mkdir()
        open_source(tmp_path / "empty", labelled=False)


def test_a_name_that_is_no_utf8_comes_back_from_its_entry(tmp_path):
    write(tmp_path / "a" / os.fsdecode(b"\xff.png"))
    assert os.fsencode(open_source(tmp_path).entry(0)) == b"a/\xff.png 5"


@pytest.mark.parametrize(
    ("paths", "want"),
    [
        (["x/a/1.png", "y/a/1.png"], r"\(x, y\); .*lie deeper \(x/a/1.png\): .* one level too high\?"),
        ([f"{c}/1.png" for c in range(12)], r"classes are sorted as text, so label 2 is class '10'$"),
        (["1/1.png", "2/1.png", "10x/1.png"], r"3 classes \(1, 10x, 2\)$"),
    ],
)
def test_folders_that_are_perhaps_not_what_was_meant_are_said(tmp_path, caplog, paths, want):
    for path in paths:
        write(tmp_path / path)
    assert re.search(want, said(caplog, tmp_path)[1])


def test_tars_beside_class_folders_are_left_out(folder, caplog):
    write(folder / "old.tar")
    source, line = said(caplog, folder)
    assert len(source) == 5 and "1 × beside the class folders (old.tar)" in line


def test_images_beside_tars_are_a_folder_of_images(tmp_path, caplog):
    for name in ("1.png", "2.JPG", "old.tar"):
        write(tmp_path / name)
    source, line = said(caplog, tmp_path, labelled=False)
    assert [source.entry(index) for index in range(2)] == ["1.png 5", "2.JPG 5"]
    assert line == f"{tmp_path}: 2 images; left out: 1 × .tar (old.tar)"
    with pytest.raises(ValueError, match=r"has no sub-folders.*beside the class folders \(1\.png, 2\.JPG, …\)"):
        open_source(tmp_path)
    labels = write(tmp_path.parent / f"{tmp_path.name}.txt", "n01440764\nn01440764\n")
    source, line = said(caplog, tmp_path, labels_file=labels)
    assert len(source) == 2 and "left out: 1 × .tar (old.tar)" in line


def test_of_many_kinds_that_are_left_out_the_most_are_said():
    kinds = {f".{kind}": (kind, [f"{i}.{kind}" for i in range(kind)][:2]) for kind in range(11)}
    assert describe_left_out(kinds) == (
        "; left out: 10 × .10 (0.10, 1.10, …), 9 × .9 (0.9, 1.9, …), 8 × .8 (0.8, 1.8, …), 7 × .7 (0.7, 1.7, …), "
        "6 × .6 (0.6, 1.6, …), 5 × .5 (0.5, 1.5, …), 4 × .4 (0.4, 1.4, …), 3 × .3 (0.3, 1.3, …), 3 of other kinds"
    )
    assert describe_left_out({".a": (2, ["1.a", "2.a"])}) == "; left out: 2 × .a (1.a, 2.a)"
    assert describe_left_out({".a": (0, [])}) == ""


def test_images_behind_links_are_said(folder, caplog):
    (folder / "b/again.png").symlink_to(folder / "b/x.png")
    assert said(caplog, folder)[1].startswith(f"{folder}: 6 images in 2 classes (a, b), 1 of them links; left out")


def test_empty_images_are_refused_or_left_out(folder, caplog):
    write(folder / "a/2.bmp", b"")
    for labelled in (True, False):
        with pytest.raises(UnreadableImage, match=r"1 image file is empty below .*: a/2\.bmp"):
            open_source(folder, labelled=labelled)
        source, line = said(caplog, folder, on_unreadable="skip", labelled=labelled)
        assert len(source) == 4 and source.empty == 1 and "1 × empty file (a/2.bmp)" in line
    write(folder / "list.txt", "b/x.png\t0\n")
    assert open_source(folder / "list.txt").empty == 0


UNREADABLE = {
    "missing": (lambda path: path.unlink(), "does not exist"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "a pointer": (lambda path: path.write_bytes(POINTER), "is a Git LFS pointer"),
    "a web page": (lambda path: path.write_bytes(b"<html>"), "is a web page"),
    "a pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "is a named pipe"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "is a directory"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_image_that_cannot_be_read_is_named(folder, name):
    source = open_source(folder)
    change, reason = UNREADABLE[name]
    change(folder / "b/x.png")
    with pytest.raises(UnreadableImage, match=rf"cannot read image: .*b/x\.png {reason}"):
        source.read(4)
    assert source.read(0) == b"a/10.png"


def test_a_file_that_ends_while_it_is_read_is_cut_short(folder, monkeypatch):
    source, real = open_source(folder), os.fstat
    grown = list(real(0))
    monkeypatch.setattr(os, "fstat", lambda number: os.stat_result([real(number)[0], *grown[1:6], 99, *grown[7:]]))
    with pytest.raises(UnreadableImage, match=r"x\.png is cut short: 7 of 99 bytes"):
        source.read(4)


# Class files


def test_a_class_file_is_the_order_of_labels(folder, tmp_path, caplog):
    file = write(tmp_path / "classes.txt", "\ufeffb\r\nnone\r\na\r\n\r\n")
    source, line = said(caplog, folder, class_file=file, num_classes=3)
    assert source.classes == ("b", "none", "a") and source.labels.tolist() == [2, 2, 2, 0, 0]
    assert "5 images in 3 classes (b, none, a); without images: 1 of the classes (none); left out" in line


CLASS_FILES = {
    "cat\ndog\n\ncat\n": r"data\.class_file .*, line 3: is empty",
    "cat\ndog\ncat": r"line 3: names class 'cat' as line 1 does",
    "\n\n": r"data\.class_file .* names no classes",
    "cat\nd\tog\n": r"line 2: holds control characters",
    "a\nbe\n": r"/b: class 'b' is not in data\.class_file .*classes\.txt \(did you mean 'be'\?\)",
    b"a\nb\n\xff\n": r"data\.class_file: .*, line 3: is not UTF-8 text",
    "<html>": r"data\.class_file: .* is a web page",
}


@pytest.mark.parametrize("content", CLASS_FILES)
def test_wrong_class_files_are_named(folder, tmp_path, content):
    with pytest.raises(ValueError, match=CLASS_FILES[content]) as error:
        open_source(folder, class_file=write(tmp_path / "classes.txt", content))
    assert "\n" not in str(error.value)


# Lists

LIST = "\ufeff# name\tlabel\r\n\r\nb/x.png\t2\r\na/10.png\t007\r\nb/x.png\t0\r\n"


def test_a_list_has_its_own_order_and_numbers_for_labels(folder, caplog):
    path = write(folder / "list.txt", LIST)
    source, line = said(caplog, path, num_classes=8)
    assert source.classes is None and source.labels.tolist() == [2, 7, 0]
    assert [source.read(index) for index in range(3)] == [b"b/x.png", b"a/10.png", b"b/x.png"]
    assert source.name(0) == str(folder / "b/x.png") and source.entry(1) == "a/10.png 8"
    assert line == f"{path}: 3 images with labels 0 to 7"


def test_a_list_with_names_has_sorted_classes_and_takes_absolute_paths(folder, tmp_path, caplog):
    path = write(tmp_path / "list.TSV", f"{folder}/b/x.png\tdog\nimages/a/2.bmp\tbig cat \nnowhere.png\t3\n")
    source, line = said(caplog, path)
    assert source.classes == ("3", "big cat", "dog") and source.labels.tolist() == [2, 1, 0]
    assert source.read(1) == b"a/2.bmp" and line == f"{path}: 3 images in 3 classes (3, big cat, dog)"
    with pytest.raises(UnreadableImage, match=r"nowhere\.png does not exist"):
        source.read(2)
    assert source.entry(2) == "nowhere.png -1"  # an extraction that skips it goes on
    alone = write(tmp_path / "alone.txt", "images/a/2.bmp\nimages/b/x.png\tdog\n")
    assert open_source(alone, labelled=False).labels.tolist() == [0, 0]


def test_a_class_file_names_the_numbers_of_labels(folder, tmp_path, caplog):
    path = write(folder / "list.txt", "b/x.png\t1\na/2.bmp\t0\n")
    file = write(tmp_path / "classes.txt", "cat\ndog\nowl\n")
    source, line = said(caplog, path, class_file=file, num_classes=3)
    assert source.classes == ("cat", "dog", "owl") and source.labels.tolist() == [1, 0]
    assert "in 3 classes (cat, dog, owl); without images: 1 of the classes (owl)" in line
    # Numbers are looked up like names where the file holds numbers alone.
    source = open_source(path, class_file=write(file, "5\n1\n0\n"))
    assert source.classes == ("5", "1", "0") and source.labels.tolist() == [1, 2]


LISTS = {
    "b/x.png 3\n": r"list\.txt, line 1: has no tab: 'b/x\.png 3'; wanted is a path, a tab and a label",
    "b/x.png\t1\n#\n \t2\n": r"line 3: has no path before the tab",
    "b/x.png\t1\n\t2\n": r"line 2: has no path before the tab",
    "b/x.png\t1\nb\x1b.png\t2\n": r"line 2: holds control characters",
    "b/x.png\t1\t2\n": r"line 1: holds control characters, or more than one tab",
    "b/x.png\t1\nb/x.png\t-1\n": r"line 2: label '-1' is neither a whole number from 0 nor a name",
    "b/x.png\tcat\nb/x.png\t1.0\n": r"line 2: label '1\.0' is neither",
    "b/x.png\t1\n\nb/x.png\t\n": r"line 3: label '' is neither",
    "b/x.png\t10000000\n": r"line 1: label 10000000 is too large; allowed is up to 9,999,999",
    "b/x.png\t" + 5000 * "9": r"line 1: label 9{20} is too large",
    "# all\n\n": r"list\.txt lists no images",
    b"b/x.png\t1\nb/\xff.png\t1": r"list\.txt, line 2: is not UTF-8 text",
    "#\nwrong/x.png\t1\n": r"list\.txt, line 2: .*/images/wrong/x\.png does not exist .*relative to the list's folder",
    "deep\t1\n": r"line 1: .*/deep is a directory",
    POINTER: r"list\.txt is a Git LFS pointer",
}


@pytest.mark.parametrize("content", LISTS)
def test_wrong_lists_are_named_with_their_line(folder, content):
    (folder / "deep").mkdir()
    with pytest.raises(FileError, match=LISTS[content]) as error:
        open_source(write(folder / "list.txt", content))
    assert "\n" not in str(error.value)


# What was asked for


def test_another_number_of_classes_is_refused(folder, tmp_path):
    numbers = write(folder / "list.txt", "b/x.png\t0\nb/x.png\t12\n")
    names = write(folder / "names.txt", "b/x.png\tcat\n")
    classes = write(tmp_path / "classes.txt", "a\nb\nc\n")
    for count in (10, 12):
        with pytest.raises(ValueError, match=rf"data\.num_classes is {count}, but .*list\.txt has labels up to 12$"):
            open_source(numbers, num_classes=count)
    assert len(open_source(numbers, num_classes=13)) == 2
    with pytest.raises(ValueError, match=r"data\.num_classes is 2, but .*names\.txt has 1 classes: cat"):
        open_source(names, num_classes=2)
    (folder / "names.txt").unlink()
    with pytest.raises(ValueError, match=r"data\.num_classes is 3, but .* has 2 class folders: a, b"):
        open_source(folder, num_classes=3)
    with pytest.raises(ValueError, match=r"data\.num_classes is 2, but data\.class_file .* has 3 classes: a, b, c"):
        open_source(folder, num_classes=2, class_file=classes)
    with pytest.raises(ValueError, match=r"line 2: label 12 is beyond data\.class_file .*, which names 3 classes"):
        open_source(numbers, class_file=classes)
    write(classes, "".join(f"class {label}\n" for label in range(12)))
    with pytest.raises(ValueError, match=r"label 12 is beyond data\.class_file .*, which names 12 classes from 0"):
        open_source(numbers, class_file=classes)


def test_wrong_choices_and_paths_are_named(folder, tmp_path):
    for path, options, message in (
        (tmp_path / "nowhere", {}, r"nowhere does not exist; accepted are a folder "),
        (tmp_path / "nowhere.txt", {}, r"nowhere\.txt does not exist"),
        (write(tmp_path / "x.parquet"), {}, r"x\.parquet is no source of images; accepted are a folder "),
        (write(tmp_path / "x.tar.gz"), {}, r"x\.tar\.gz is a compressed tar: unpack it"),
        (folder, {"class_file": tmp_path / "c.txt"}, r"data\.class_file: .*c\.txt does not exist"),
        (folder, {"labels_file": tmp_path / "l.txt"}, r"data\.labels_file is .*l\.txt, but .*images has its own"),
        (folder, {"split": "test"}, r"split is 'test'; allowed are train and val"),
        (folder, {"on_unreadable": "ignore"}, r"on_unreadable is 'ignore'; allowed are error and skip"),
        (folder / "b/deep", {}, r"has no sub-folders.*left out: 1 × beside the class folders \(y\.PNG\)"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            open_source(path, **options)
        assert "\n" not in str(error.value)
    write(folder / "c/1.gif")
    with pytest.raises(ValueError, match=r"/c holds no images .*1 × \.gif \(c/1\.gif\)"):
        open_source(folder)


def test_existence_is_that_of_the_folder_the_file_or_the_first_tar(folder, tmp_path):
    write(tmp_path / "s-00.tar")
    for path, there in (
        (folder, True),
        (tmp_path / "s-{00..99}.tar", True),
        (tmp_path / "s-{01..99}.tar", False),
        (tmp_path / "s-00.tar", True),
        (tmp_path / "list.txt", False),
    ):
        assert source_exists(path) is there
    with pytest.raises(ValueError, match="neither a range"):
        source_exists("s-{0}.tar")


# Braces


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("x.tar", ["x.tar"]),
        ("s-{08..11}.tar", ["s-08.tar", "s-09.tar", "s-10.tar", "s-11.tar"]),
        ("{8..10}", ["8", "9", "10"]),
        ("{9..007}", ["009", "008", "007"]),
        ("{0..10..5}", ["0", "5", "10"]),
        ("{a,b}/{1..2}.tar", ["a/1.tar", "a/2.tar", "b/1.tar", "b/2.tar"]),
        ("{a,}x", ["ax", "x"]),
    ],
)
def test_braces_expand_as_in_a_shell(pattern, names):
    assert expand_braces(pattern) == names


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{1}.tar", "neither a range"),
        ("{}.tar", "neither a range"),
        ("{0..5.tar", "has no partner"),
        ("{a,{b,c}}.tar", "braces hold others"),
        ("{0..9..0}", "step of 0"),
        ("{0..999999999999}", "more than 1,000,000"),
        ("{0..1000}{0..1000}", "more than 1,000,000"),
    ],
)
def test_other_braces_are_refused_by_name(pattern, message):
    with pytest.raises(ValueError, match=message) as error:
        expand_braces(pattern)
    assert pattern in str(error.value)
