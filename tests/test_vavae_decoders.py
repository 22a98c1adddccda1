"""Decoders against Pillow: real photographs, the files that collections hold, and what is none of them."""

import io
import re
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps

from tests.golden import G
from tests.photographs import MemoryFiles, encoded, jpegs, photographs
from vavae.config import DataConfig
from vavae.decoders import jpeg_decoder as jpeg_decoder_module
from vavae.decoders.choice import NAMES, choose_decoder, lacking
from vavae.decoders.decoder import Crop
from vavae.decoders.make import make_decoder
from vavae.decoders.plan import plan_crop
from vavae.decoders.probe import decode_an_image
from vavae.decoders.torchvision_decoder import halve
from vavae.image_files import UnreadableImage
from vavae.images import center_crop, psnr, resize_short_side

FAST = [name for name in NAMES if name != "pil"]
#: 64 random bits each: the corners, and places in between.
DRAWS = [0, 2**64 - 1, 2**63 + 12345, 987654321]


def decoder(name: str, crop: str = "center", size: int = 64, *, rotate: bool = True, threads: int = 0, device="cpu"):
    return make_decoder(name, Crop(crop, size, rotate), threads=threads, device=device)


def pixels_of(name: str, files, crop: str = "center", **options) -> torch.Tensor:
    """uint8 [B, 3, S, S] on the CPU."""
    files = MemoryFiles(files)
    draws = [DRAWS[index % len(DRAWS)] for index in range(len(files))]
    squares = decoder(name, crop, **options).squares(files, range(len(files)), draws)
    return torch.stack([square.pixels.cpu() for square in squares])


# Pixels


def check_photographs(name: str, crop: str, size: int, device: str = "cpu") -> None:
    """A decoder's squares of real photographs against Pillow's."""
    files = jpegs()
    found = psnr(pixels_of(name, files, crop, size=size, device=device), pixels_of("pil", files, crop, size=size))
    print(f"{name} {crop} {size} {device}: mean {found.clamp(max=99).mean():.1f} dB, worst {found.min():.1f} dB")
    assert found.clamp(max=99).mean() >= 40 and found.min() >= 35


@pytest.mark.parametrize("size", [256, 100])
@pytest.mark.parametrize("crop", ["random", "center"])
@pytest.mark.parametrize("name", FAST)
def test_photographs_are_those_of_pillow(name, crop, size):
    check_photographs(name, crop, size)


@pytest.mark.parametrize("number", range(6))
def test_pillow_gives_the_recorded_crops(number):
    golden = G("04_vae_image_io")
    image = Image.fromarray(golden[f"crop/{number}/img"].numpy())
    (found,) = pixels_of("pil", [encoded(image, "PNG")], size=32)
    assert torch.equal(found.permute(1, 2, 0), golden[f"crop/{number}/out32"])


def test_halving_is_pillows_for_every_size():
    rng = np.random.default_rng(0)
    for side in [*range(2, 130), 375, 501, 1411]:
        pixels = rng.integers(0, 256, (side, side + 7, 3), dtype=np.uint8)
        want = Image.fromarray(pixels).resize(((side + 7) // 2, side // 2), Image.Resampling.BOX)
        found = halve(torch.from_numpy(pixels).permute(2, 0, 1)).permute(1, 2, 0)
        assert np.array_equal(found.numpy(), np.asarray(want)), side


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("crop", ["random", "center"])
def test_a_plan_cuts_the_square_of_the_upright_image(crop, orientation):
    """On pixels whose scaling is exact: no image is scaled at all."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (16, 31, 3), dtype=np.uint8))
    for stored in (image, image.transpose(Image.Transpose.TRANSPOSE)):
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded(stored, "PNG", exif=exif))))
        for draw in DRAWS:
            plan = plan_crop(stored.height, stored.width, 16, crop, draw, orientation)
            cut = np.asarray(stored)[plan.top : plan.top + 16, plan.left : plan.left + 16]
            found = plan.upright(torch.from_numpy(np.array(cut)).permute(2, 0, 1)).permute(1, 2, 0)
            there = plan_crop(upright.height, upright.width, 16, crop, draw)
            want = np.asarray(upright)[there.top : there.top + 16, there.left : there.left + 16]
            assert np.array_equal(found.numpy(), want) and plan.scaled == (stored.height, stored.width)


# What a collection of photographs holds


def rotated(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(photographs()[1], quality=95, exif=exif)


def with_profile() -> bytes:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    return encoded(photographs()[2], quality=95, icc_profile=profile)


def ycck() -> bytes:
    """Four channels whose Adobe marker says that they are luminance, colour differences and black."""
    content = bytearray(encoded(photographs()[1].convert("CMYK"), quality=95))
    content[content.index(b"Adobe") + 11] = 2
    return bytes(content)


def rgb_without_a_marker() -> bytes:
    """Only the names of its components, R, G and B, say what they are."""
    content = encoded(photographs()[1], quality=95, keep_rgb=True)
    start = content.find(b"\xff\xee")
    if start < 0:
        return content
    return content[:start] + content[start + 2 + int.from_bytes(content[start + 2 : start + 4], "big") :]


def sixteen_bits() -> bytes:
    grey = np.asarray(photographs()[0].convert("L")).astype(np.uint16) * 257
    return encoded(Image.fromarray(grey), "PNG")


def palette() -> bytes:
    image = photographs()[0].quantize(64)
    return encoded(image, "PNG", transparency=bytes([0] * 20))


#: Kind → (file, whether a decoder of JPEG files reads it itself).
FILES = {
    "png-palette-transparent.png": (palette, False),
    "png-16-bits.png": (sixteen_bits, False),
    "png-grey.png": (lambda: encoded(photographs()[0].convert("L"), "PNG"), False),
    "png-grey-alpha.png": (lambda: encoded(photographs()[0].convert("LA"), "PNG"), False),
    "png-rgba.png": (lambda: encoded(photographs()[0].convert("RGBA"), "PNG"), False),
    "jpeg-cmyk.jpg": (lambda: encoded(photographs()[1].convert("CMYK"), quality=95), False),
    "jpeg-ycck.jpg": (ycck, False),
    "jpeg-rgb.jpg": (lambda: encoded(photographs()[1], quality=95, keep_rgb=True), False),
    "jpeg-rgb-unmarked.jpg": (rgb_without_a_marker, False),
    "jpeg-grey.jpg": (lambda: encoded(photographs()[0].convert("L"), quality=95), True),
    "jpeg-progressive.jpg": (lambda: encoded(photographs()[3], quality=95, progressive=True), True),
    "jpeg-444.jpg": (lambda: encoded(photographs()[3], quality=95, subsampling=0), True),
    "jpeg-422.jpg": (lambda: encoded(photographs()[3], quality=95, subsampling=1), True),
    "jpeg-restarts.jpg": (lambda: encoded(photographs()[3], quality=95, restart_marker_rows=2), True),
    "jpeg-profile.jpg": (with_profile, True),
    "jpeg-behind-its-end.jpg": (lambda: encoded(photographs()[2], quality=95) + b"more", False),
    **{f"jpeg-held-{number}.jpg": (lambda number=number: rotated(number), True) for number in range(1, 9)},
    "webp.webp": (lambda: encoded(photographs()[2], "WEBP", quality=95), False),
    "webp-alpha.webp": (lambda: encoded(photographs()[2].convert("RGBA"), "WEBP", lossless=True, method=0), False),
    "bmp.bmp": (lambda: encoded(photographs()[2], "BMP"), False),
    "tiff.tif": (lambda: encoded(photographs()[2], "TIFF", compression="tiff_lzw"), False),
    "one-pixel-wide.jpg": (lambda: encoded(photographs()[2].resize((1, 700)), quality=95), False),
    "one-pixel-high.jpg": (lambda: encoded(photographs()[2].resize((20, 1)), quality=95), True),
    "no-jpeg-by-name.jpg": (lambda: encoded(photographs()[2], "PNG"), False),
    "40-megapixels.jpg": (lambda: encoded(photographs()[5].resize((7680, 5240)), quality=75), True),
}


@cache
def odd_files() -> dict[str, bytes]:
    return {kind: make() for kind, (make, _) in FILES.items()}


def expected(content: bytes, size: int, crop: str, rotate: bool, draw: int) -> np.ndarray:
    """Pillow's own turning, the conversion to RGB (16 bits by hand), and the crops that are held to the recorded."""
    image = Image.open(io.BytesIO(content))
    if rotate:
        image = ImageOps.exif_transpose(image)
    if image.mode == "I;16":
        image = Image.fromarray((np.asarray(image).astype(np.uint32) * 255 / 65535).round().astype(np.uint8))
    image = image.convert("RGB")
    if crop == "center":
        return np.asarray(center_crop(image, size))
    scaled = np.asarray(resize_short_side(image, size))
    top, left = (draw >> 32) % (scaled.shape[0] - size + 1), (draw & 0xFFFFFFFF) % (scaled.shape[1] - size + 1)
    return scaled[top : top + size, left : left + size]


def check_odd_files(name: str, crop: str, rotate: bool, device: str = "cpu") -> None:
    """Size, orientation and colours of a decoder's squares against Pillow's, and who decoded them."""
    files = odd_files()
    squares = decoder(name, crop, rotate=rotate, device=device).squares(
        MemoryFiles(files), range(len(files)), [DRAWS[2]] * len(files)
    )
    for (kind, content), (pixels, by_pillow) in zip(files.items(), squares, strict=True):
        want = torch.from_numpy(np.array(expected(content, 64, crop, rotate, DRAWS[2]))).permute(2, 0, 1)
        assert pixels.shape == (3, 64, 64) and pixels.dtype == torch.uint8, kind
        assert by_pillow == (name != "pil" and not FILES[kind][1]), kind
        if by_pillow or name == "pil":
            assert torch.equal(pixels.cpu(), want), kind
        else:
            assert psnr(pixels.cpu()[None], want[None]) > 40, kind


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("crop", ["random", "center"])
@pytest.mark.parametrize("name", NAMES)
def test_every_file_has_pillows_size_orientation_and_colours(name, crop, rotate):
    check_odd_files(name, crop, rotate)


def test_orientation_counts_only_where_it_is_followed():
    held = [odd_files()[f"jpeg-held-{number}.jpg"] for number in (1, 6)]
    turned, stored = (pixels_of("pil", held, rotate=rotate) for rotate in (True, False))
    assert torch.equal(stored[0], stored[1]) and torch.equal(turned[0], stored[0])
    assert psnr(turned[1:], stored[:1].rot90(-1, (2, 3))) > 40  # clockwise


# What cannot be decoded


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_cannot_be_read_says_why_and_leaves_the_others(name):
    whole = {f"{index}.jpg": content for index, content in enumerate(jpegs()[:4])}
    torn = whole["1.jpg"][:-2000]
    scrambled = bytearray(whole["2.jpg"])
    scrambled[200:500] = bytes(300)  # its tables
    broken = {**whole, "torn.jpg": torn, "empty.jpg": b"", "text.png": b"no image", "scrambled.jpg": bytes(scrambled)}
    draws = [5] * len(broken)
    alone = decoder(name).squares(MemoryFiles(whole), range(4), draws[:4])
    found = decoder(name).squares(MemoryFiles(broken), range(len(broken)), draws)
    for (pixels, by_pillow), (want, _) in zip(found[:4], alone, strict=True):
        assert torch.equal(pixels, want) and not by_pillow
    for kind, (error, _) in zip(list(broken)[4:7], found[4:7], strict=True):
        assert isinstance(error, UnreadableImage) and kind in str(error)
    reference = decoder("pil").squares(MemoryFiles(broken), [7], [5])[0].pixels
    assert isinstance(found[7].pixels, UnreadableImage) == isinstance(reference, UnreadableImage)


@pytest.mark.parametrize("name", FAST)
def test_a_group_holds_so_many_pixels_and_gives_the_same(name, monkeypatch):
    files = jpegs()[:6]
    want, decoded = pixels_of(name, files, threads=2), []
    made = decoder(name)
    monkeypatch.setattr(jpeg_decoder_module, "GROUP_PIXELS", 600 * 600)
    decode = made._decode
    monkeypatch.setattr(made, "_decode", lambda group: decoded.append(len(group)) or decode(group))
    squares = made.squares(MemoryFiles(files), range(6), [DRAWS[i % 4] for i in range(6)])
    assert torch.equal(torch.stack([s.pixels for s in squares]), want)
    assert sum(decoded) == 6 and len(decoded) > 3


# Which one


@pytest.mark.parametrize(
    ("fields", "device", "absent", "want"),
    [
        ({}, "cpu", (), ("torchvision", "without a GPU")),
        ({}, "cuda", (), ("dali", "on the GPU")),
        ({}, "cuda", ("dali",), ("torchvision", "dali: dali is not here")),
        ({}, "cuda", ("dali", "torchvision"), ("pil", "dali is not here; torchvision: torchvision is not here")),
        ({"crop": "published_eval"}, "cuda", (), ("pil", "published_eval")),
        ({"cached": True}, "cuda", (), ("pil", "data.cache")),
        ({"asked": "pil"}, "cuda", (), ("pil", "asked for")),
        ({"asked": "dali"}, "cpu", (), ("dali", "asked for")),
    ],
)
def test_auto_takes_the_fastest_that_serves_and_says_why(monkeypatch, fields, device, absent, want):
    monkeypatch.setattr(
        "vavae.decoders.choice.lacking", lambda name, _: f"{name} is not here" if name in absent else ""
    )
    name, reason = choose_decoder(**{"asked": "auto", "device": device} | fields)
    assert name == want[0] and want[1] in reason


def test_a_decoder_that_is_asked_for_and_absent_is_an_error(monkeypatch):
    monkeypatch.setattr("vavae.decoders.choice._dali_is_installed", lambda: False)
    with pytest.raises(ValueError, match=r"data.decoder is dali, but nvidia-dali-cuda130 is not installed: pip"):
        choose_decoder("dali", "cpu")
    assert lacking("pil") == lacking("torchvision") == ""


@pytest.mark.parametrize("name", FAST)
def test_for_a_gpu_a_decoder_is_tried_first(monkeypatch, name):
    """This process has none: what is installed does not decode, and what it says is handed on."""
    assert re.match(r"it does not decode on cuda:7: \w+: \w", why := lacking(name, "cuda:7")) and "\n" not in why
    with pytest.raises(ValueError, match=rf"data\.decoder is {name}, but it does not decode on cuda:7"):
        choose_decoder(name, "cuda:7")
    assert choose_decoder("auto", "cuda:7")[0] == "pil"
    decode_an_image(name, "cpu")
    monkeypatch.setattr(type(decoder(name)), "_decode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        decode_an_image(name, "cpu")


@pytest.mark.parametrize("name", FAST)
def test_a_device_without_memory_is_no_fault_of_a_file(monkeypatch, name):
    made = decoder(name)

    def full(_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(made, "_decode", full)
    with pytest.raises(torch.OutOfMemoryError):
        made.squares(MemoryFiles(jpegs()[:2]), range(2), [0, 0])


@pytest.mark.parametrize("name", FAST)
def test_a_file_that_a_decoder_failed_on_is_not_tried_again(monkeypatch, caplog, name):
    files = MemoryFiles(jpegs()[:3])
    made, tried = decoder(name), []
    decode = made._decode

    def fails(group):
        tried.append([jpeg.index for jpeg in group])
        if 1 in tried[-1]:
            raise RuntimeError("not such a file")
        return decode(group)

    monkeypatch.setattr(made, "_decode", fails)
    for _ in range(2):
        assert [square.by_pillow for square in made.squares(files, range(3), [0] * 3)] == [False, True, False]
    assert tried == [[0, 1, 2], [0], [1], [2], [0, 2]]
    assert len([message for message in caplog.messages if "not such a file" in message]) == 1


@pytest.mark.parametrize("name", FAST)
def test_what_pillow_alone_does_is_not_asked_of_others(name):
    for fields, want in (({"crop": "published_eval"}, "published_eval"), ({"cache": True}, "cache")):
        with pytest.raises(ValueError, match=f"decoder is {name}, but .*{want}"):
            DataConfig(decoder=name, **fields)


def test_the_published_pixels_unless_a_file_says_otherwise():
    assert DataConfig().as_published().decoder == "pil" and not DataConfig().as_published().exif_rotation
    said = DataConfig(decoder="auto", exif_rotation=True).as_published()
    assert said.decoder == "auto" and said.exif_rotation
