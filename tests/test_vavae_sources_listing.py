"""Listings of folders: images are found, and all else is counted by kind."""

import os

import pytest

from common.files import FileError
from vavae.sources.listing import ImageListing


def touch(path, content=b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def test_a_listing_finds_images_and_counts_all_else_by_kind(tmp_path):
    for name in (
        "a/1.png",
        "a/deep/2.JPEG",
        "b/3.tiff",
        "a/.git/4.png",
        "a/._1.png",
        "__MACOSX/a/5.png",
        "a/Thumbs.db",
        "a/@eaDir/6.png",
        "a/notes.txt",
        "b/LICENSE",
        "beside.png",
    ):
        touch(tmp_path / name)
    touch(tmp_path / "b/empty.png", b"")
    touch(tmp_path.parent / f"{tmp_path.name}-elsewhere/7.png")
    elsewhere = tmp_path.parent / f"{tmp_path.name}-elsewhere"
    (tmp_path / "b/linked.png").symlink_to(elsewhere / "7.png")
    (tmp_path / "c").symlink_to(elsewhere)
    (tmp_path / "b/more").symlink_to(elsewhere)
    (tmp_path / "b/gone.png").symlink_to("nowhere.png")
    os.mkfifo(tmp_path / "b/pipe.png")
    (tmp_path / "b/none").mkdir()
    listing = ImageListing(tmp_path)
    assert listing.classes() == ("a", "b", "c")
    assert sorted(listing.images("a")) == ["a/1.png", "a/deep/2.JPEG"]
    assert sorted(listing.images("b")) == ["b/3.tiff", "b/linked.png"] and listing.linked == 1
    assert listing.images("c") == ["c/7.png"]
    assert {kind: sorted(paths) for kind, paths in listing.left_out.items()} == {
        "hidden": ["__MACOSX", "a/._1.png", "a/.git", "a/@eaDir", "a/Thumbs.db"],
        "beside the class folders": ["beside.png"],
        ".txt": ["a/notes.txt"],
        "without an extension": ["b/LICENSE"],
        "empty file": ["b/empty.png"],
        "link to a folder": ["b/more"],
        "link to nothing": ["b/gone.png"],
        "pipe, socket or device": ["b/pipe.png"],
        "empty folder": ["b/none"],
    }
    assert listing.empty == ["b/empty.png"]
    text = listing.describe_left_out()
    assert text.startswith("; left out: 5 × hidden (__MACOSX, a/._1.png, …), 1 × .txt (a/notes.txt)")
    assert text.endswith("1 of other kinds")
    with pytest.raises(FileError, match=r"1 image file is empty below .*: b/empty\.png"):
        listing.refuse_empty()


def test_a_listing_of_images_alone_has_nothing_to_say(tmp_path):
    touch(tmp_path / "a/1.png")
    listing = ImageListing(tmp_path)
    assert listing.images() == ["a/1.png"] and listing.describe_left_out() == ""
    assert listing.empty == []
    listing.refuse_empty()


@pytest.mark.parametrize("name", [b"cl\xff", b"two\nlines", b"\x1b[2J", b"\xc2\x9b2J", b"\xe2\x80\xa8"])
def test_a_class_whose_name_is_no_text_is_refused(tmp_path, name):
    os.mkdir(os.fsencode(tmp_path) + b"/" + name)
    with pytest.raises(ValueError, match=r"has a class folder called '.*\\.*': rename it"):
        ImageListing(tmp_path).classes()


def test_names_in_other_scripts_are_classes_and_files_may_be_called_anything(tmp_path):
    for name in ("猫", "été", "two words", "no\u00a0break"):
        touch(tmp_path / name / "1.png")
    touch(tmp_path / os.fsdecode(b"two words/\xff.png"))
    listing = ImageListing(tmp_path)
    assert listing.classes() == ("no\u00a0break", "two words", "été", "猫") and len(listing.images("two words")) == 2


def test_folders_may_lie_deep(tmp_path):
    path = tmp_path
    for _ in range(150):
        path = path / "deep"
    touch(path / "1.png")
    assert len(ImageListing(tmp_path).images()) == 1
