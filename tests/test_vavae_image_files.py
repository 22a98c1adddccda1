"""Image files of every kind that people have: read rightly or refused by name, and nothing is run or waited for."""

import io
import os
import socket
import struct

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageOps

from vavae.image_files import FORMATS, UnreadableImage, open_image

RAMP = np.tile(np.linspace(0, 1, 64), (3, 1))  # [3, 64], black to white
COLOURS = np.random.default_rng(0).integers(0, 256, (5, 7, 4), dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def tiff(
    rows: bytes, width: int, height: int, *, bits: int, white_is_zero=False, sample_format=1, order="<", samples=1
) -> bytes:
    """An uncompressed TIFF of one strip, grey or of three colours, by its specification."""
    photometric = 2 if samples == 3 else int(not white_is_zero)
    tags = [
        (256, 4, width),
        (257, 4, height),
        (258, 3, bits),
        (259, 3, 1),
        (262, 3, photometric),
        (273, 4, 200),
        (277, 3, samples),
        (278, 4, height),
        (279, 4, len(rows)),
        (339, 3, sample_format),
    ]
    entries = b""
    for tag, kind, value in tags:
        entries += struct.pack(f"{order}HHI", tag, kind, 1)
        entries += struct.pack(f"{order}I", value) if kind == 4 else struct.pack(f"{order}HH", value, 0)
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8)
    content = head + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)
    return content.ljust(200, b"\0") + rows


def levels(white: int, dtype: str) -> bytes:
    return np.rint(RAMP * white).astype(dtype).tobytes()


def twelve_bits(values: np.ndarray) -> bytes:
    """Two numbers in three bytes."""
    first, second = values[..., 0::2], values[..., 1::2]
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], -1).astype(np.uint8).tobytes()


def netpbm(kind: str, white: int, pixels: bytes) -> bytes:
    return f"{kind} 64 3 {white}\n".encode() + pixels


GREY = {
    "16-bit PNG": encoded(Image.fromarray(np.rint(RAMP * 65535).astype(np.uint16)), "PNG"),
    "16-bit TIFF": tiff(levels(65535, "<u2"), 64, 3, bits=16),
    "16-bit TIFF, big-endian": tiff(levels(65535, ">u2"), 64, 3, bits=16, order=">"),
    "16-bit TIFF, white is zero": tiff(
        np.rint(65535 - RAMP * 65535).astype("<u2").tobytes(), 64, 3, bits=16, white_is_zero=True
    ),
    "12-bit TIFF": tiff(twelve_bits(np.rint(RAMP * 4095).astype(np.uint16)), 64, 3, bits=12),
    "8-bit TIFF, white is zero": tiff(
        np.rint(255 - RAMP * 255).astype(np.uint8).tobytes(), 64, 3, bits=8, white_is_zero=True
    ),
    "16-bit PGM": netpbm("P5", 65535, levels(65535, ">u2")),
    "10-bit PGM": netpbm("P5", 1023, levels(1023, ">u2")),
    "10-bit PGM in text": netpbm("P2", 1023, " ".join(map(str, np.rint(RAMP * 1023).astype(int).flat)).encode()),
    "8-bit BMP": encoded(Image.fromarray(np.rint(RAMP * 255).astype(np.uint8)), "BMP"),
}


@pytest.mark.parametrize("name", GREY)
def test_grey_of_any_depth_is_scaled_by_its_range(tmp_path, name):
    (tmp_path / "a.png").write_bytes(GREY[name])
    pixels = np.asarray(open_image(tmp_path / "a.png"))
    assert pixels.shape == (3, 64, 3) and (pixels == pixels[..., :1]).all()
    assert np.abs(pixels[..., 0] - RAMP * 255).max() <= 0.51  # the nearest level


def test_sixteen_bits_round_to_the_nearest(tmp_path):
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.png"))[..., 0], np.rint(values / 257))


FLAT = COLOURS[..., :3]
CONVERTED = {
    "RGBA": (Image.fromarray(COLOURS), "PNG", FLAT),
    "LA": (Image.fromarray(COLOURS[..., :2].copy(), "LA"), "PNG", COLOURS[..., :1].repeat(3, -1)),
    "CMYK without black": (Image.fromarray(COLOURS * np.array([1, 1, 1, 0], np.uint8), "CMYK"), "TIFF", 255 - FLAT),
    "bilevel": (Image.fromarray(COLOURS[..., 0] > 127), "PNG", 255 * (COLOURS[..., :1] > 127).repeat(3, -1)),
    "WebP with transparency": (Image.fromarray(COLOURS | np.array([0, 0, 0, 255], np.uint8)), "WEBP", FLAT),
    "PPM": (Image.fromarray(FLAT), "PPM", FLAT),
}


@pytest.mark.parametrize("name", CONVERTED)
def test_colours_are_kept_and_transparency_is_dropped(tmp_path, name):
    image, kind, want = CONVERTED[name]
    (tmp_path / "a.png").write_bytes(encoded(image, kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.png")), want)


def test_a_palette_is_looked_up_whatever_is_transparent(tmp_path):
    numbers = np.arange(35, dtype=np.uint8).reshape(5, 7)
    image = Image.fromarray(numbers, "P")
    image.putpalette(COLOURS.reshape(-1, 4)[:, :3].tobytes())
    image.save(tmp_path / "a.png", transparency=3)
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.png")), FLAT)


WITHOUT_RANGE = {
    "PFM": (b"Pf 64 3 -1.0\n" + levels(1, "<f4"), "floats"),
    "32-bit TIFF": (tiff(levels(2**32 - 1, "<u4"), 64, 3, bits=32), "32-bit integers"),
}
SIGNED, REAL, UNDEFINED, COMPLEX_WHOLE, COMPLEX = 2, 3, 4, 5, 6  # of TIFF's tag SampleFormat
NOT_KNOWN = r"begins with b'(II\*|MM).*none of"  # to Pillow, which says no more
WITHOUT_RANGE |= {
    f"TIFF of {bits}-bit {dtype}, sample format {form}{', big-endian' * (dtype[0] == '>')}, {samples} sample": (
        tiff(levels(white, dtype) * samples, 64, 3, bits=bits, sample_format=form, order=dtype[0], samples=samples),
        why,
    )
    for form, bits, dtype, white, samples, why in [
        (SIGNED, 8, "<i1", 127, 1, "signed integers"),
        (SIGNED, 8, ">i1", 127, 1, "signed integers"),
        (SIGNED, 16, "<i2", 32767, 1, "signed integers"),
        (SIGNED, 16, ">i2", 32767, 1, "signed integers"),
        (SIGNED, 32, "<i4", 2**31 - 1, 1, "signed integers"),
        (SIGNED, 32, ">i4", 2**31 - 1, 1, "signed integers"),
        (REAL, 32, "<f4", 1, 1, "floats"),
        (REAL, 32, ">f4", 1, 1, "floats"),
        (REAL, 16, "<f2", 1, 1, NOT_KNOWN),
        (REAL, 64, "<f8", 1, 1, NOT_KNOWN),
        (SIGNED, 64, "<i8", 1, 1, NOT_KNOWN),
        (SIGNED, 8, "<i1", 127, 3, NOT_KNOWN),
        (SIGNED, 16, ">i2", 32767, 3, NOT_KNOWN),
        (REAL, 32, "<f4", 1, 3, NOT_KNOWN),
        (UNDEFINED, 8, "<u1", 255, 1, NOT_KNOWN),
        (COMPLEX_WHOLE, 32, "<i4", 1, 1, NOT_KNOWN),
        (COMPLEX, 64, "<c8", 1, 1, NOT_KNOWN),
    ]
}
OTHER_CONTENT = {
    "GIF": (encoded(Image.fromarray(FLAT), "GIF"), r"begins with b'GIF8.*none of BMP, JPEG, PNG, PPM, TIFF, WEBP"),
    "AVIF": (encoded(Image.fromarray(FLAT), "AVIF"), "none of BMP"),
    "text": (b"not an image at all", "begins with b'not an image"),
    "nothing": (b"", "a.png is empty"),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "Git LFS pointer"),
    "web page": (b"<!DOCTYPE html><html>Too many requests</html>", "is a web page"),
}


@pytest.mark.parametrize("name", WITHOUT_RANGE | OTHER_CONTENT)
def test_what_cannot_be_shown_rightly_is_refused_by_name(tmp_path, name):
    content, reason = (WITHOUT_RANGE | OTHER_CONTENT)[name]
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UnreadableImage, match=rf"(?s)a\.png.*{reason}|{reason}"):
        open_image(tmp_path / "a.png")


@pytest.mark.parametrize("kind", sorted(set(FORMATS.values())))
def test_content_decides_the_format_whatever_the_name(tmp_path, kind):
    (tmp_path / "a.gif").write_bytes(encoded(Image.fromarray(FLAT), kind))
    assert np.abs(np.asarray(open_image(tmp_path / "a.gif")).astype(int) - FLAT).mean() < 60


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


def test_an_eps_under_another_name_starts_no_program(tmp_path, monkeypatch):
    started = []

    def ghostscript(*args, **options):
        started.append(args)
        return Image.new("RGB", (8, 8)).im

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", ghostscript)
    (tmp_path / "a.png").write_bytes(EPS)
    with pytest.raises(UnreadableImage, match=r"a\.png.*%!PS"):
        open_image(tmp_path / "a.png")
    assert not started
    Image.open(tmp_path / "a.png").load()
    assert started  # by Pillow when it is free to choose


def make_pipe(path):
    os.mkfifo(path)


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(path))


SPECIAL = {
    "named pipe": make_pipe,
    "socket": make_socket,
    "directory": os.mkdir,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "circle of links": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)  # the name of a socket must be short
    SPECIAL[name]((tmp_path / "a.png").relative_to(tmp_path))
    with pytest.raises(UnreadableImage, match=r"a\.png"):
        open_image("a.png")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, on damaged TIFF
@pytest.mark.parametrize("kind", sorted(set(FORMATS.values())))
def test_damage_is_an_error_that_names_the_file_or_another_picture(tmp_path, kind):
    rng, path = np.random.default_rng(1), tmp_path / "a.png"
    whole = encoded(Image.fromarray(rng.integers(0, 256, (17, 23, 3), dtype=np.uint8)), kind)
    refused = 0
    for trial in range(150):
        content = bytearray(whole)
        if trial % 3:  # headers decide most
            place = int(rng.integers(0, 8 * min(len(content), 300 if trial % 3 == 1 else len(content))))
            content[place // 8] ^= 1 << place % 8
        else:
            content = content[: int(rng.integers(0, len(content)))]
        path.write_bytes(content)
        try:
            assert open_image(path).mode == "RGB"
        except UnreadableImage as error:
            assert "a.png" in str(error)
            refused += 1
    assert refused > 40  # every truncation but few


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("number", range(1, 9))
def test_a_photograph_is_turned_once(tmp_path, kind, number):
    """As Pillow turns it; TIFF files also where orientation is not to be followed, as Pillow does that by itself."""
    exif = Image.Exif()
    exif[0x0112] = number
    ramp = np.add.outer(2 * np.arange(24), 3 * np.arange(40)).astype(np.uint8)
    Image.fromarray(ramp).convert("RGB").save(tmp_path / "x", kind, exif=exif, quality=95)
    with Image.open(tmp_path / "x") as image:
        upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        stored = upright if kind == "TIFF" else np.asarray(image.convert("RGB"))
    assert np.array_equal(np.asarray(open_image(tmp_path / "x", rotate=True)), upright)
    assert np.array_equal(np.asarray(open_image(tmp_path / "x")), stored)
    assert upright.shape[:2] == ((24, 40) if number < 5 else (40, 24))
