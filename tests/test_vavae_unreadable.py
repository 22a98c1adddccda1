"""Shares of unreadable and empty files: too many is an error, which stays one for every caller."""

import multiprocessing

import pytest
from PIL import Image

from vavae.config import DataConfig
from vavae.data import ImageDataset
from vavae.image_files import UnreadableImage
from vavae.unreadable import UnreadableFiles

BROKEN = UnreadableImage("cannot read image x.png: broken")


@pytest.mark.parametrize(
    ("num_files", "share", "empty", "refused"),
    [(1, 0.05, 9, True), (19, 0.05, 1, False), (18, 0.05, 1, True), (5, 0.0, 0, False), (5, 0.0, 1, True)],
)
def test_empty_files_count_at_once(num_files, share, empty, refused):
    if not refused:
        assert UnreadableFiles(num_files, share, "set", empty=empty).indices == []
        return
    message = (
        rf"^{empty} of {num_files + empty} images of set are empty, more than data\.max_unreadable {share:g} allows$"
    )
    with pytest.raises(UnreadableImage, match=message):
        UnreadableFiles(num_files, share, "set", empty=empty)


def test_without_a_readable_file_left_the_search_ends():
    files = UnreadableFiles(3, 1.0, "set")
    files.mark_unreadable(0, BROKEN)
    files.mark_unreadable(1, BROKEN)
    assert [files.next_readable(index) for index in range(3)] == [2, 2, 2]
    with pytest.raises(UnreadableImage, match=r"none of the 3 images of set can be read: .*x\.png"):
        files.mark_unreadable(2, BROKEN)
    for index in range(3):
        with pytest.raises(UnreadableImage, match=r"none of the 3 images of set can be read: .*x\.png"):
            files.next_readable(index)


def mark_all(files):
    for index in range(3):
        try:
            files.mark_unreadable(index, BROKEN)
        except UnreadableImage:
            assert index == 2


def test_the_search_ends_where_another_process_found_the_last_one():
    files = UnreadableFiles(3, 1.0, "set")
    process = multiprocessing.get_context("fork").Process(target=mark_all, args=(files,))
    process.start()
    process.join()
    assert process.exitcode == 0
    for _ in range(2):
        with pytest.raises(UnreadableImage, match=r"^none of the 3 images of set can be read$"):
            files.next_readable(1)


def test_too_many_stays_said_to_every_caller():
    files = UnreadableFiles(10, 0.1, "set")
    files.mark_unreadable(0, BROKEN)
    message = (
        r"^2 of the 2 images read so far of set are unreadable, more than data\.max_unreadable 0\.1 allows; .*x\.png"
    )
    for call in (
        lambda: files.mark_unreadable(1, BROKEN),
        lambda: files.mark_unreadable(0, BROKEN),
        lambda: files.mark_unreadable(5, UnreadableImage("another")),
        lambda: files.next_readable(5),
    ):
        with pytest.raises(UnreadableImage, match=message):
            call()


def test_empty_files_of_a_folder_count_in_the_share(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "a/0.png")
    for number in range(1, 10):
        (tmp_path / f"a/{number}.png").touch()
    section = {"data_path": str(tmp_path), "image_size": 16, "decoder": "pil", "on_unreadable": "skip"}
    with pytest.raises(UnreadableImage, match=r"9 of 10 images of .* are empty, more than data\.max_unreadable 0\.05"):
        ImageDataset(DataConfig(**section), seed=0)
    assert len(ImageDataset(DataConfig(**section, max_unreadable=0.9), seed=0)) == 1
