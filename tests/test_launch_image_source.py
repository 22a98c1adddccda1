"""Images to measure, from folders and npz files: the same in the same order, and what is none of them refused."""

import io
import json
import os
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from launch.evaluation.encoded_images import EncodedImages, is_lossy
from launch.evaluation.image_source import open_images
from launch.evaluation.labels import read_labels
from launch.evaluation.npz_file import NpzImages, npz_names, read_npz, read_text_of
from launch.evaluation.reference import open_reference
from launch.sampling.image_folder import ImageFolder
from tests.measured import images, save_folder
from vavae.images import center_crop


def test_folders_and_npz_files_give_the_same_images(tmp_path):
    pixels = images(0, 7)
    np.savez(tmp_path / "plain.npz", pixels.numpy())
    np.savez_compressed(tmp_path / "small.npz", arr_0=pixels.numpy(), mu=np.zeros(3))
    sources = [
        open_images(save_folder(tmp_path / "folder", pixels)),
        open_images(tmp_path / "plain.npz"),
        open_images(tmp_path / "small.npz"),
    ]
    (tmp_path / "sampled").mkdir()
    np.savez(tmp_path / "sampled" / "samples.npz", pixels.numpy())
    save_folder(tmp_path / "sampled", pixels[:1])  # the picture that `sample` draws is none of the samples
    sources.append(open_images(tmp_path / "sampled"))
    for source in sources:
        assert len(source) == 7
        for _ in range(2):  # as often as needed
            batches = list(source.batches(3))
            assert [len(b) for b in batches] == [3, 3, 1]
            assert torch.equal(torch.cat(batches), pixels)
        share = list(source.batches(2, 3, 6))
        assert [len(b) for b in share] == [2, 1] and torch.equal(torch.cat(share), pixels[3:6])


def test_folders_are_sorted_searched_deeply_and_cropped(tmp_path):
    pixels = images(1, 4, size=20, width=27)
    save_folder(tmp_path / "b", pixels[2:])
    save_folder(tmp_path / "a" / "deep", pixels[:2])
    (tmp_path / "a" / "notes.json").write_text("{}")
    assert torch.equal(next(EncodedImages(tmp_path).batches(9)), pixels)
    cropped = next(EncodedImages(tmp_path, 16).batches(9))
    want = np.array(center_crop(Image.fromarray(pixels[3].numpy()), 16))
    assert np.array_equal(cropped[3].numpy(), want)
    assert next(EncodedImages(tmp_path, 16, "published_eval").batches(9)).shape == (4, 16, 16, 3)


@pytest.mark.parametrize("size", [None, 16])
def test_images_in_folders_of_classes_come_by_index_as_those_of_one_folder(tmp_path, size):
    pixels, labels = images(3, 12, size=16), np.array([2, 0, 11, 1, 0, 2, 2, 1, 0, 11, 1, 0])
    for name in ("flat", "classes"):
        folder = ImageFolder(tmp_path / name, "png", labels, 12, by_class=name == "classes")
        folder.begin()
        folder.write(0, pixels.numpy())
        (tmp_path / name / "samples.json").write_text(json.dumps({"by_class": folder.by_class}))
        read = list(open_images(tmp_path / name, size).batches(5))
        assert torch.equal(torch.cat(read), pixels)
        assert torch.equal(next(open_images(tmp_path / name / "images", size).batches(2, 7, 9)), pixels[7:9])
    # What is described elsewhere has to be told.
    (tmp_path / "classes" / "samples.json").unlink()
    assert not torch.equal(next(open_images(tmp_path / "classes").batches(12)), pixels)
    told = open_images(tmp_path / "classes", by_index=True)
    assert torch.equal(next(told.batches(12)), pixels)
    (tmp_path / "classes" / "images" / "02" / "00000004.png").write_bytes(folder.path(0).read_bytes())
    with pytest.raises(ValueError, match=r"00000004\.png: there are two images of index 4"):
        open_images(tmp_path / "classes", by_index=True)
    folder.path(3).rename(folder.path(3).with_name("cat.png"))
    with pytest.raises(ValueError, match=r"cat\.png is not named by its index"):
        open_images(tmp_path / "classes", by_index=True)


def test_sources_refuse(tmp_path):
    pixels = images(2, 3)
    save_folder(tmp_path / "mixed", pixels)
    Image.fromarray(images(2, 1, size=18)[0].numpy()).save(tmp_path / "mixed" / "zzz.png")
    with pytest.raises(ValueError, match=r"zzz.png is 18×18, earlier ones are 16×16"):
        list(open_images(tmp_path / "mixed").batches(2))
    (tmp_path / "mixed" / "zzz.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"cannot read image .*zzz.png"):
        list(open_images(tmp_path / "mixed").batches(9))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images below"):
        open_images(tmp_path / "empty")
    with pytest.raises(ValueError, match="does not exist"):
        open_images(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="crop 'middle' is not known"):
        EncodedImages(tmp_path / "mixed", 16, "middle")
    np.savez(tmp_path / "floats.npz", pixels.float().numpy())
    with pytest.raises(ValueError, match=r"must be uint8 \[N, H, W, 3\].* it is float32"):
        NpzImages(tmp_path / "floats.npz")
    np.savez(tmp_path / "other.npz", images=pixels.numpy())
    with pytest.raises(ValueError, match="no array 'arr_0', only images"):
        open_images(tmp_path / "other.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(ValueError, match="is not an npz"):
        open_images(tmp_path / "text.npz")
    (tmp_path / "text.json").write_text("hello")
    with pytest.raises(ValueError, match=r"no source of images; accepted are"):
        open_images(tmp_path / "text.json")


def npz_of(path, header: bytes, body: bytes = b"", **info):
    """An npz whose one array is given byte by byte."""
    with zipfile.ZipFile(path, "w", **info) as archive:
        archive.writestr("arr_0.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + body)


def header_of(dtype="|u1", shape="(2, 4, 4, 3)", order=False) -> bytes:
    return f"{{'descr': '{dtype}', 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()


@pytest.mark.parametrize(
    ("header", "body", "message"),
    [
        (header_of(shape="(0, 4, 4, 3)"), b"", "wanted is an image at least"),
        (header_of(shape="(-1, 4, 4, 3)"), b"", "wanted is an image at least"),
        (header_of(shape="(1, 5000, 5000, 3)"), b"", "at most 16,777,216 pixels"),
        (header_of(shape="(9223372036854775807, 1, 1, 3)"), b"x", "ends after image 0"),
        (header_of(order=True), bytes(96), "C order"),
        (header_of(dtype="|O"), b"", "must be uint8"),
        (header_of(), bytes(95), "ends after image 1 of 2"),
        (b"{'descr': __import__('os')}", b"", "arr_0 is no array"),
        (b"[" * 9000, b"", "arr_0 is no array"),
        (b"{" + b" " * 20_000 + b"}", b"", "arr_0 is no array"),
    ],
)
def test_an_npz_that_says_what_it_does_not_hold_is_named(tmp_path, header, body, message):
    npz_of(tmp_path / "a.npz", header, body)
    with pytest.raises(ValueError, match=rf"^[^\n]*a\.npz[^\n]*({message})[^\n]*$"):
        for _ in NpzImages(tmp_path / "a.npz").batches(1):
            pass


def test_damage_to_an_npz_is_an_error_that_names_it(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", arr_0=images(3, 4).numpy(), mu=np.zeros(12), sigma=np.eye(12))
    whole, rng, path = (tmp_path / "a.npz").read_bytes(), np.random.default_rng(0), tmp_path / "b.npz"
    places = [*range(len(whole) - 400, len(whole)), *range(200)]  # directory and headers decide most
    for _ in range(400):
        content = bytearray(whole)
        anywhere = int(rng.integers(len(whole)))
        content[int(rng.choice(places)) if rng.random() < 0.9 else anywhere] ^= 1 << int(rng.integers(8))
        path.write_bytes(content if rng.random() < 0.9 else content[:anywhere])
        try:
            list(open_images(path).batches(3))
            open_reference(path)
        except ValueError as error:
            assert "b.npz" in str(error)


def test_statistics_larger_than_any_are_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, shape in (("mu", (2**20,)), ("sigma", (2**20, 2**20))):
            header = io.BytesIO()
            np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": shape})
            archive.writestr(f"{name}.npy", header.getvalue() + bytes(8 * 2**20))
    with pytest.raises(ValueError, match=r"a\.npz: sigma must be numbers of at most 1,073,741,824 bytes"):
        open_reference(tmp_path / "a.npz")


def test_labels_of_an_npz_that_are_text_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", images(0, 2).numpy(), np.array(["cat", "dog"]))
    with pytest.raises(ValueError, match=r"a\.npz: arr_1 must be numbers, it is text \[2\]"):
        read_labels(open_images(tmp_path / "a.npz"), {})


def test_statistics_in_columns_are_read_as_they_are(tmp_path):
    mean, covariance = np.arange(3.0), np.arange(9.0).reshape(3, 3)
    np.savez(tmp_path / "a.npz", mu=mean.astype(np.float32), sigma=np.asfortranarray(covariance))
    got = [read_npz(tmp_path / "a.npz", name) for name in ("mu", "sigma")]
    assert np.array_equal(got[0], mean) and np.array_equal(got[1], covariance) and got[0].dtype == np.float64


def test_what_would_be_waited_for_is_refused(tmp_path):
    os.mkfifo(tmp_path / "a.npz")
    with pytest.raises(ValueError, match=r"a\.npz is a named pipe"):
        open_images(tmp_path / "a.npz")
    with pytest.raises(ValueError, match=r"a\.npz is a named pipe"):
        npz_names(tmp_path / "a.npz")
    save_folder(tmp_path / "folder", images(0, 2))
    (tmp_path / "folder/empty.png").touch()
    with pytest.raises(ValueError, match=r"1 image file is empty below .*folder: empty\.png"):
        open_images(tmp_path / "folder")


def test_a_folder_says_how_many_images_it_has_and_what_was_left_out(tmp_path, caplog):
    folder = save_folder(tmp_path / "folder", images(0, 3))
    (folder / "a.gif").write_bytes(b"GIF89a")
    with caplog.at_level("INFO"):
        open_images(folder)
    assert caplog.messages == [f"{folder}: 3 images; left out: 1 × .gif (a.gif)"]


def test_an_npz_is_not_cropped(tmp_path):
    np.savez(tmp_path / "a.npz", images(0, 3, size=20, width=27).numpy())
    with pytest.raises(
        ValueError, match=r"a\.npz holds images of 27×20; an image size of 16 crops those of folders only: leave"
    ):
        open_images(tmp_path / "a.npz", 16)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()


def test_files_that_were_stored_with_loss_or_in_another_size_are_counted(tmp_path):
    picture, large = (Image.fromarray(images(3, 1, size=size)[0].numpy()) for size in (16, 20))
    (tmp_path / "a.png").write_bytes(saved(picture, "PNG"))
    (tmp_path / "b.png").write_bytes(saved(large, "JPEG"))  # what a file is, its content says
    (tmp_path / "c.webp").write_bytes(saved(picture, "WEBP", quality=80))
    (tmp_path / "d.webp").write_bytes(saved(picture, "WEBP", lossless=True))
    source = EncodedImages(tmp_path, 16)
    assert len(list(source.batches(1))) == 4
    assert source.seen(0, 4) == {"lossy": 2, "resized": 1}
    list(source.batches(1))
    assert source.seen(0, 4) == {"lossy": 2, "resized": 1}  # each once
    assert source.seen(0, 1) == {"lossy": 0, "resized": 0} and source.seen(2, 4) == {"lossy": 1, "resized": 0}


@pytest.mark.parametrize("lossless", [True, False])
@pytest.mark.parametrize("frames", [1, 2])
def test_lossy_webp_is_told_from_lossless_also_where_it_is_extended(lossless, frames):
    pictures = [Image.fromarray(images(seed, 1)[0].numpy()) for seed in range(frames)]
    content = saved(pictures[0], "WEBP", save_all=True, append_images=pictures[1:], lossless=lossless, exif=b"x" * 9)
    assert content[12:16] == b"VP8X" and is_lossy(content) is not lossless


def test_a_text_of_an_npz_is_read_without_running_anything(tmp_path):
    np.savez(tmp_path / "a.npz", facts=np.array("N = 3, größer"), other=np.zeros(3))
    np.savez(tmp_path / "b.npz", facts=np.array([{"a": 1}], dtype=object))
    assert read_text_of(tmp_path / "a.npz", "facts") == "N = 3, größer"
    assert read_text_of(tmp_path / "a.npz", "none") is None
    for name, of in (("a", "other"), ("b", "facts")):
        with pytest.raises(ValueError, match=rf"{name}\.npz: {of} must be a text"):
            read_text_of(tmp_path / f"{name}.npz", of)


def test_pixels_that_are_floats_are_refused(tmp_path):
    Image.fromarray(np.zeros((16, 16), dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"a\.tif: its pixels are floats"):
        list(open_images(tmp_path).batches(1))
