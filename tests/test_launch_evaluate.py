"""The evaluation program and what it is made of, on images small enough to measure by hand."""

import hashlib
import io
import json
import os
import zipfile

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from scipy import linalg, ndimage

import kernels
from common.tensors import write_tensors
from launch import evaluate, evaluation, features
from launch.evaluation import Reconstructions, evaluate_reconstructions, evaluate_samples, open_reference
from launch.image_source import FolderImages, NpzImages, npz_names, open_images
from vavae.config import AutoencoderConfig, FoundationConfig
from vavae.foundation import FoundationModel
from vavae.images import center_crop, to_float_batch
from vavae.model import AutoencoderKL
from vavae.weights import write_export

FACTS = {"solver": "euler", "nfe": 49, "dtype": "float32", "guidance": 2.0, "hashes": {"model": "ab"}}


def images(seed, count=40, size=16, width=None, high=256):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, high, (count, size, width or size, 3), generator=generator, dtype=torch.uint8)


class MemoryImages:
    """An image source of one tensor, uint8 `[N, H, W, 3]`."""

    description = "memory"

    def __init__(self, pixels):
        self.images = pixels

    def __len__(self):
        return len(self.images)

    def batches(self, size):
        return iter(self.images.split(size))


def means(batch):
    """Twelve features: the colours of the quarters of an image."""
    quarters = batch.double().unflatten(1, (2, -1)).unflatten(3, (2, -1)).mean((2, 4))
    return {"features": quarters.flatten(1) / 10}


# Truths by NumPy and SciPy, from the definitions.


def quarters(pixels: torch.Tensor) -> np.ndarray:
    """The features of `means`, [N, 12]."""
    half = pixels.shape[1] // 2
    x = pixels.numpy().astype(np.float64)
    parts = [x[:, i : i + half, j : j + half].mean((1, 2)) for i in (0, half) for j in (0, half)]
    return np.concatenate(parts, 1) / 10


def moments(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance of the features of `means`."""
    x = quarters(pixels)
    return torch.from_numpy(x.mean(0)), torch.from_numpy(np.cov(x.T))


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of features [N, D] and [M, D]."""
    one, other = np.cov(a.T), np.cov(b.T)
    root = linalg.sqrtm(one @ other).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(one + other - 2 * root))


def share_inside(centres: np.ndarray, points: np.ndarray) -> float:
    """Of the points, those that lie within the distance of some centre to its third nearest neighbour."""
    radii = [sorted(np.linalg.norm(centres - c, axis=1))[3] for c in centres]
    return float(np.mean([any(np.linalg.norm(centres - p, axis=1) <= radii) for p in points]))


def peak_ratio(a: np.ndarray, b: np.ndarray) -> float:
    """PSNR in dB, the mean over images [N, H, W, 3]."""
    errors = ((a.astype(np.float64) - b) ** 2).mean((1, 2, 3))
    return float((10 * np.log10(255**2 / errors)).mean())


def likeness(a: np.ndarray, b: np.ndarray) -> float:
    """SSIM, the mean over images, of windows that lie inside: SciPy's Gaussian of 11 pixels reaches 5 to each side."""

    def blur(x):
        return ndimage.gaussian_filter(x, (0, 1.5, 1.5, 0), truncate=3.5)[:, 5:-5, 5:-5]

    a, b = a.astype(np.float64), b.astype(np.float64)
    x, y = blur(a), blur(b)
    c, d = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    top = (2 * x * y + c) * (2 * (blur(a * b) - x * y) + d)
    return float((top / ((x**2 + y**2 + c) * (blur(a * a) - x**2 + blur(b * b) - y**2 + d))).mean())


def save_folder(folder, pixels):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(pixels):
        Image.fromarray(image.numpy()).save(folder / f"{i:03d}.png")
    return folder


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


def test_folders_are_sorted_searched_deeply_and_cropped(tmp_path):
    pixels = images(1, 4, size=20, width=27)
    save_folder(tmp_path / "b", pixels[2:])
    save_folder(tmp_path / "a" / "deep", pixels[:2])
    (tmp_path / "a" / "notes.json").write_text("{}")
    assert torch.equal(next(FolderImages(tmp_path).batches(9)), pixels)
    cropped = next(FolderImages(tmp_path, 16).batches(9))
    want = np.array(center_crop(Image.fromarray(pixels[3].numpy()), 16))
    assert np.array_equal(cropped[3].numpy(), want)
    assert next(FolderImages(tmp_path, 16, "published_eval").batches(9)).shape == (4, 16, 16, 3)


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
        FolderImages(tmp_path / "mixed", 16, "middle")
    np.savez(tmp_path / "floats.npz", pixels.float().numpy())
    with pytest.raises(ValueError, match=r"must be uint8 \[N, H, W, 3\].* it is float32"):
        NpzImages(tmp_path / "floats.npz")
    np.savez(tmp_path / "other.npz", images=pixels.numpy())
    with pytest.raises(ValueError, match="no array 'arr_0', only images"):
        open_images(tmp_path / "other.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(ValueError, match="is not an npz"):
        open_images(tmp_path / "text.npz")
    (tmp_path / "text.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"neither a folder of images nor an \.npz"):
        open_images(tmp_path / "text.txt")


def npz_of(path, header: bytes, body: bytes = b"", **info):
    """An npz whose one array is given byte by byte."""
    with zipfile.ZipFile(path, "w", **info) as archive:
        archive.writestr("arr_0.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + body)


def header_of(dtype="|u1", shape="(2, 4, 4, 3)", order=False) -> bytes:
    return f"{{'descr': '{dtype}', 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()


@pytest.mark.parametrize(("header", "body", "message"), [
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
])  # fmt: skip
def test_an_npz_that_says_what_it_does_not_hold_is_named(tmp_path, header, body, message):
    npz_of(tmp_path / "a.npz", header, body)
    with pytest.raises(ValueError, match=rf"(?s)a\.npz.*({message})"):
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


def test_statistics_in_columns_are_read_as_they_are(tmp_path):
    mean, covariance = np.arange(3.0), np.arange(9.0).reshape(3, 3)
    np.savez(tmp_path / "a.npz", mu=mean.astype(np.float32), sigma=np.asfortranarray(covariance))
    got = open_reference(tmp_path / "a.npz").features
    assert np.array_equal(got[0], mean) and np.array_equal(got[1], covariance) and got[0].dtype == torch.float64


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


SIZES = "holds images of 16×16, .* of 27×20: they cannot be compared"


@pytest.mark.parametrize("kind", ["images", "statistics and images", "originals", "folders", "decoded"])
def test_images_of_two_sizes_are_not_compared(tmp_path, tokenizer, kind):
    small, large = images(0, 30), images(1, 30, size=20, width=27)
    if kind == "images":
        with pytest.raises(ValueError, match=SIZES):
            evaluate_samples(MemoryImages(small), evaluation.Reference("r", MemoryImages(large)), means, metadata={})
    elif kind == "statistics and images":
        reference = evaluation.Reference("r", MemoryImages(large), moments(small))
        with pytest.raises(ValueError, match=SIZES):
            evaluate_samples(MemoryImages(small), reference, means, metadata={})
    elif kind == "originals":
        with pytest.raises(ValueError, match=SIZES):
            evaluate_reconstructions(MemoryImages(small), MemoryImages(large), extractor=means, lpips=None, metadata={})
    elif kind == "decoded":
        decoded = Reconstructions(MemoryImages(images(1, 3, size=17)), tokenizer)
        with pytest.raises(ValueError, match=r"multiples of 2, got \[1, 3, 17, 17\]"):
            evaluate_reconstructions(decoded.originals, decoded, extractor=None, lpips=None, metadata={})
    else:
        folders = [save_folder(tmp_path / name, pixels) for name, pixels in (("a", small), ("b", large))]
        with pytest.raises(ValueError, match=SIZES):
            evaluate_samples(open_images(folders[0]), open_reference(folders[1]), means, metadata={})
        both = [open_images(folders[0], 16), open_reference(folders[1], 16)]
        assert evaluate_samples(*both, means, metadata={})["metrics"]["fid"] > 0


@pytest.mark.parametrize("names", [("samples", "reference"), ("originals", "reconstructions")])
def test_the_program_asks_for_one_size_before_it_loads_networks(tmp_path, monkeypatch, names):
    for network in ("_extractor", "perceptual_distance"):
        monkeypatch.setattr(evaluate, network, None)
    for name, size in zip(names, (16, 32), strict=True):
        np.savez(tmp_path / f"{name}.npz", images(0, 3, size=size).numpy())
    arguments = [text for name in names for text in (f"--{name}", str(tmp_path / f"{name}.npz"))]
    with pytest.raises(ValueError, match=r"16×16, .* of 32×32: they cannot be compared"):
        evaluate.main(arguments)


def test_an_npz_is_not_cropped(tmp_path):
    np.savez(tmp_path / "a.npz", images(0, 3, size=20, width=27).numpy())
    with pytest.raises(ValueError, match=r"a\.npz holds images of 27×20; an image size of 16 crops those of folders"):
        open_images(tmp_path / "a.npz", 16)


def test_samples_against_images():
    real = images(4)
    fake = (real[:30].float() * 0.7 + 38 + images(5, 30, high=4).float()).to(torch.uint8)  # less varied
    got = evaluate_samples(MemoryImages(fake), evaluation.Reference("real", MemoryImages(real)), means, metadata=FACTS,
                           batch_size=7)  # fmt: skip
    assert got["metrics"]["fid"] == pytest.approx(distance(quarters(fake), quarters(real)), rel=1e-6)
    precision, recall = (share_inside(*map(quarters, pair)) for pair in ((real, fake), (fake, real)))
    assert (got["metrics"]["precision"], got["metrics"]["recall"]) == (precision, recall) and precision > recall
    assert got["samples"] == 30 and got["samples_sha256"] == hashlib.sha256(fake.numpy().tobytes()).hexdigest()
    assert {key: got[key] for key in FACTS} == FACTS and got["notes"] == []
    assert set(got["skipped"]) == {"sfid", "inception_score"}
    assert json.loads(json.dumps(got)) == got


def test_samples_against_statistics(tmp_path):
    real, fake = images(6), images(7, 30)
    mean, covariance = (part.numpy() for part in moments(real))
    np.savez(tmp_path / "stats.npz", mu=mean, sigma=covariance)
    reference = open_reference(tmp_path / "stats.npz")
    got = evaluate_samples(MemoryImages(fake), reference, means, metadata={"solver": "heun", "seed": 3})
    assert got["metrics"] == {"fid": pytest.approx(distance(quarters(fake), quarters(real)), rel=1e-6)}
    assert "statistics alone" in got["skipped"]["precision, recall"]
    assert got["nfe"] == "not stated" and got["seed"] == 3 and got["solver"] == "heun"
    assert got["notes"] == ["not stated by whoever made the images: nfe, dtype, guidance, hashes"]
    assert got["reference"]["sha256"] == hashlib.sha256((tmp_path / "stats.npz").read_bytes()).hexdigest()

    # Statistics win over the images beside them, which still serve precision and recall.
    np.savez(tmp_path / "both.npz", arr_0=images(8).numpy(), mu=mean, sigma=covariance)
    both = evaluate_samples(MemoryImages(fake), open_reference(tmp_path / "both.npz"), means, metadata=FACTS)
    assert both["metrics"]["fid"] == got["metrics"]["fid"] and "precision" in both["metrics"]


def test_references_refuse(tmp_path):
    for name, arrays, message in (
        ("half", {"mu": np.zeros(12)}, "only one of 'mu' and 'sigma'"),
        ("spatial", {"mu_s": np.zeros(12), "sigma_s": np.eye(12)}, "holds no 'mu' and 'sigma'"),
        ("other", {"x": np.zeros(12)}, "holds no images"),
    ):
        np.savez(tmp_path / f"{name}.npz", **arrays)
        with pytest.raises(ValueError, match=message):
            open_reference(tmp_path / f"{name}.npz")
    np.savez(tmp_path / "wide.npz", mu=np.zeros(5), sigma=np.eye(5))
    with pytest.raises(ValueError, match="mu2 has shape"):
        evaluate_samples(MemoryImages(images(0)), open_reference(tmp_path / "wide.npz"), means, metadata=FACTS)


def test_too_few_samples_are_refused_unless_allowed():
    few, real = MemoryImages(images(9, 12)), evaluation.Reference("real", MemoryImages(images(10)))
    with pytest.raises(ValueError, match=r"12 samples for 12 features.*--allow-few"):
        evaluate_samples(few, real, means, metadata=FACTS)
    assert "covariance is singular" in evaluate_samples(few, real, means, metadata=FACTS, allow_few=True)["notes"][0]
    with pytest.raises(ValueError, match="12 reference images for 12 features"):
        evaluate_samples(real.images, evaluation.Reference("few", few), means, metadata=FACTS)
    with pytest.raises(ValueError, match="not finite"):
        evaluate_samples(real.images, real, lambda x: {"features": means(x)["features"] / 0}, metadata=FACTS)


def test_reconstructions():
    original = images(11, 30)
    decoded = (original.int() + images(12, 30, high=9).int()).clamp(0, 255).to(torch.uint8)
    got = evaluate_reconstructions(
        MemoryImages(original), MemoryImages(decoded), extractor=means, metadata=FACTS, batch_size=8,
        lpips=lambda a, b: (a.double() - b.double()).abs().mean((1, 2, 3)),
    )  # fmt: skip
    want = {
        "rfid": distance(quarters(decoded), quarters(original)),
        "psnr": peak_ratio(original.numpy(), decoded.numpy()),
        "ssim": likeness(original.numpy(), decoded.numpy()),
        "lpips": np.abs(original.numpy().astype(np.float64) - decoded.numpy()).mean(),
    }
    assert got["metrics"] == {name: pytest.approx(value, rel=1e-6) for name, value in want.items()}
    assert got["images"] == 30 and got["skipped"] == {}
    without = evaluate_reconstructions(
        MemoryImages(original),
        MemoryImages(decoded),
        extractor=None,
        lpips=None,
        metadata=FACTS,
        skipped={"rfid": "no net"},
    )
    assert set(without["metrics"]) == {"psnr", "ssim"} and without["metrics"]["psnr"] == got["metrics"]["psnr"]
    assert without["skipped"]["rfid"] == "no net" and "lpips" in without["skipped"]
    with pytest.raises(ValueError, match="30 originals do not pair with 29"):
        evaluate_reconstructions(
            MemoryImages(original), MemoryImages(decoded[1:]), extractor=None, lpips=None, metadata=FACTS
        )


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    config = AutoencoderConfig(
        embed_dim=4, z_channels=4, ch=32, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=(), resolution=16
    )
    return AutoencoderKL(config, kernels.select("reference")).eval()


def test_decoded_images_depend_on_the_seed_and_their_place_only(tokenizer):
    originals = MemoryImages(images(13, 5))
    by_three = torch.cat(list(Reconstructions(originals, tokenizer, seed=1).batches(3)))
    by_two = torch.cat(list(Reconstructions(originals, tokenizer, seed=1).batches(2)))
    assert by_three.dtype == torch.uint8 and by_three.shape == (5, 16, 16, 3)
    assert (by_three.int() - by_two.int()).abs().max() <= 1
    other = torch.cat(list(Reconstructions(originals, tokenizer, seed=2).batches(5)))
    mode = torch.cat(list(Reconstructions(originals, tokenizer, posterior="mode").batches(5)))
    assert (by_three.int() - other.int()).abs().max() > 3 and (by_three.int() - mode.int()).abs().max() > 3
    with torch.no_grad():
        x = to_float_batch(originals.images)
        want = (127.5 * tokenizer.decode(tokenizer.encode(x).mode()) + 128).clamp(0, 255).permute(0, 2, 3, 1)
    assert (mode.float() - want.floor()).abs().max() <= 1
    with pytest.raises(ValueError, match="posterior 'mean' is not known"):
        Reconstructions(originals, tokenizer, posterior="mean")


@pytest.fixture(scope="module")
def foundation(tmp_path_factory):
    """A small vision transformer's weights with the JSON that says how to build it."""
    torch.manual_seed(1)
    arguments = {"img_size": 16, "patch_size": 4, "embed_dim": 12, "depth": 1, "num_heads": 2}
    config = FoundationConfig(model_name="vit_tiny_patch16_224", model_args=arguments, normalization="published")
    path = tmp_path_factory.mktemp("foundation") / "net.safetensors"
    FoundationModel.classifier(config, 4, 10).save(path)
    path.with_suffix(".json").write_text(json.dumps({"config": config.model_dump(mode="json"), "grid": 4}))
    return path


def tokens(foundation, pixels: np.ndarray) -> np.ndarray:
    """The means over a vision transformer's tokens, [N, 12], by timm, for uint8 images."""
    net = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=12, depth=1, num_heads=2,
                            num_classes=10).eval()  # fmt: skip
    net.load_state_dict(load_file(foundation), strict=False)
    x = torch.from_numpy(pixels / 127.5 - 1).float().permute(0, 3, 1, 2)
    with torch.no_grad():
        return net.forward_features(x)[:, 1:].mean(1).double().numpy()  # the first is no place in the image


def test_program_on_samples(tmp_path, foundation, capsys):
    np.savez(tmp_path / "samples.npz", images(14, 30).numpy())
    (tmp_path / "samples.json").write_text(json.dumps(FACTS | {"seed": 5}))
    save_folder(tmp_path / "real", images(15, 40, size=20))
    run = ["--samples", str(tmp_path / "samples.npz"), "--reference", str(tmp_path / "real"), "--image-size", "16",
           "--foundation", str(foundation), "--set", "nfe=98",
           "--output", str(tmp_path / "out" / "report.json")]  # fmt: skip
    assert evaluate.main(run) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["nfe"] == 98 and report["solver"] == "euler" and report["seed"] == 5 and report["samples"] == 30
    assert report["features"] == "foundation model net.safetensors"
    real = [Image.fromarray(x.numpy()).resize((16, 16), Image.BICUBIC) for x in images(15, 40, size=20)]
    fake = tokens(foundation, images(14, 30).numpy())
    fid = distance(fake, tokens(foundation, np.stack([np.asarray(image) for image in real])))
    assert report["metrics"]["fid"] == pytest.approx(fid, rel=1e-3)
    out = capsys.readouterr().out
    assert f"{fid:.4f}" in out and "guidance        2.0" in out and "sfid            not measured" in out


def test_program_on_a_tokenizer(tmp_path, tokenizer, foundation, monkeypatch):
    write_export(tmp_path / "vae.safetensors", tokenizer.state_dict(), tokenizer.config, step=1)
    folder = save_folder(tmp_path / "originals", images(16, 20))

    def no_download(weights, device):
        raise RuntimeError("could not download VGG-16")

    monkeypatch.setattr(evaluate, "perceptual_distance", no_download)
    run = ["--tokenizer", str(tmp_path / "vae.safetensors"), "--originals", str(folder), "--device", "cpu",
           "--foundation", str(foundation), "--posterior", "mode", "--output", str(tmp_path / "r.json")]  # fmt: skip
    assert evaluate.main(run) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert set(report["metrics"]) == {"rfid", "psnr", "ssim"} and len(report["hashes"]["tokenizer"]) == 64
    assert "could not download VGG-16 (here: --lpips-weights)" in report["skipped"]["lpips"]
    original = images(16, 20).numpy()
    with torch.no_grad():
        x = torch.from_numpy(original / 127.5 - 1).float().permute(0, 3, 1, 2)
        values = (127.5 * tokenizer.decode(tokenizer.encode(x).mode()) + 128).permute(0, 2, 3, 1).numpy()
    decoded = values.clip(0, 255).astype(np.uint8)
    np.savez(tmp_path / "decoded.npz", decoded)
    run = ["--reconstructions", str(tmp_path / "decoded.npz"), "--originals", str(folder), "--device", "cpu",
           "--foundation", str(foundation), "--output", str(tmp_path / "s.json")]  # fmt: skip
    assert evaluate.main(run) == 0
    again = json.loads((tmp_path / "s.json").read_text())
    assert again["dtype"] == "not stated"
    want = {"psnr": peak_ratio(original, decoded), "ssim": likeness(original, decoded),
            "rfid": distance(tokens(foundation, decoded), tokens(foundation, original))}  # fmt: skip
    for metrics in (report["metrics"], again["metrics"]):
        assert metrics == {name: pytest.approx(value, rel=1e-3) for name, value in want.items()}


@pytest.mark.parametrize("option", ["--inception-weights", "--foundation", "--lpips-weights"])
@pytest.mark.parametrize("content", [None, b"damaged"])
def test_weights_that_were_named_are_not_left_out(tmp_path, monkeypatch, option, content):
    for name in ("originals", "decoded"):
        save_folder(tmp_path / name, images(19, 4))
    weights = tmp_path / "named.safetensors"
    if content is not None:
        weights.write_bytes(content)
    if option == "--lpips-weights":
        monkeypatch.setattr(evaluate, "_extractor", lambda args: means)
    folders = ["--originals", str(tmp_path / "originals"), "--reconstructions", str(tmp_path / "decoded")]
    with pytest.raises(ValueError, match="named"):
        evaluate.main([*folders, "--device", "cpu", option, str(weights), "--output", str(tmp_path / "r.json")])
    assert not (tmp_path / "r.json").exists()


def test_an_earlier_result_beside_the_images_changes_no_figure(tmp_path, foundation):
    """`--output` beside the images puts it where their metadata are looked for."""
    for name, seed in (("a", 21), ("b", 22)):
        np.savez(tmp_path / f"{name}.npz", images(seed, 30).numpy())

    def measured(samples, reference, *more):
        given = ["--samples", f"{tmp_path}/{samples}.npz", "--reference", f"{tmp_path}/{reference}.npz",
                 "--foundation", str(foundation), "--output", str(tmp_path / "a.json")]  # fmt: skip
        assert evaluate.main([*given, *more]) == 0
        return json.loads((tmp_path / "a.json").read_text())

    assert measured("a", "b")["metrics"]["fid"] > 1e-3
    again = measured("a", "a", "--set", "samples=7", "--set", "note=x")
    assert abs(again["metrics"]["fid"]) < 1e-4 and (again["samples"], again["note"]) == (30, "x")
    with pytest.raises(ValueError, match=r"a\.json is a result of evaluate"):
        measured("a", "a", "--metadata", str(tmp_path / "a.json"))


def test_program_takes_the_reference_of_a_config(tmp_path, foundation, monkeypatch):
    np.savez(tmp_path / "samples.npz", images(17, 30).numpy())
    np.savez(tmp_path / "real.npz", images(18, 30).numpy())
    config = {"preset": "default", "data": {"data_path": "x", "fid_reference_file": str(tmp_path / "real.npz"),
              "image_size": 16}, "model": {"model_type": "LightningDiT-B/1"}}  # fmt: skip
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    given = [str(tmp_path / "run.yaml"), "--samples", str(tmp_path / "samples.npz"), "--foundation", str(foundation)]
    assert evaluate.main([*given, "--output", str(tmp_path / "a.json")]) == 0
    assert json.loads((tmp_path / "a.json").read_text())["reference"]["path"] == str(tmp_path / "real.npz")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of --samples, --originals and --latents, got 0 of them"),
        (["--samples", "a", "--originals", "b"], "one of --samples, --originals and --latents, got 2 of them"),
        (["--samples", "a", "--latents", "b"], "one of --samples, --originals and --latents, got 2 of them"),
        (["--latents", "{here}/none"], "none is no directory"),
        (["--originals", "b"], "either --reconstructions or --tokenizer"),
        (["--samples", "a"], "no reference"),
        (["--samples", "a", "--reference", "b", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["--samples", "a", "--reference", "b", "--image-size", "0"], "--image-size must be at least 1, got 0"),
        (["--samples", "a", "--reference", "b", "--device", "cuda:99"], "--device 'cuda:99' is not there.*has cpu"),
        (["--samples", "a", "--reference", "b", "--device", "gpu"], "--device 'gpu' is not there.*has cpu"),
        (["--samples", "a", "--reference", "b", "--device", "mps"], "--device 'mps' is not there.*has cpu"),
        (
            ["--samples", "{here}", "--reference", "{here}", "--set", "x", "--foundation", "n"],
            "not of the form key=value",
        ),
        (
            ["--samples", "{here}", "--reference", "{here}", "--foundation", "none.safetensors"],
            "needs none.json beside it",
        ),
        (
            ["--samples", "{here}", "--reference", "{here}", "--inception-weights", "no.pth"],
            "cannot be read as weights",
        ),
    ],
)
def test_program_refuses(arguments, message, tmp_path):
    save_folder(tmp_path, images(0, 2))
    with pytest.raises(ValueError, match=message):
        evaluate.main([a.format(here=tmp_path) for a in arguments])


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """A file of torch-fidelity's layout, randomly filled: the real one is a download."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Net

    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save({}, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Net, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        net = Net("inception-v3-compat", ["2048"], str(path))
    torch.save(net.state_dict(), path)
    return path


def test_inception_features(inception_weights):
    pixels = images(19, 2, size=32)
    extractor = features.InceptionFeatures(inception_weights)
    got = extractor(pixels)
    assert {name: tuple(value.shape) for name, value in got.items()} == {
        "features": (2, 2048), "logits": (2, 1008), "spatial": (2, 17 * 17 * 7)}  # fmt: skip
    net = extractor._net
    torch.testing.assert_close(got["logits"], got["features"] @ net.fc.weight.T)
    inside = []  # the same place, found without the hook: the first branch heads the block's concatenated output
    net.Mixed_6d.register_forward_hook(lambda module, inputs, output: inside.append(output))
    again = extractor(pixels)
    want = inside[0][:, :7].permute(0, 2, 3, 1).reshape(2, -1)
    assert torch.equal(again["spatial"], want) and torch.equal(got["spatial"], want)

    few = MemoryImages(images(20, 4, size=32))
    result = evaluate_samples(
        few, evaluation.Reference("r", few), extractor, metadata=FACTS, allow_few=True, batch_size=4
    )
    assert set(result["metrics"]) == {"fid", "sfid", "inception_score", "precision", "recall"}
    assert abs(result["metrics"]["fid"]) < 1e-3 and result["metrics"]["precision"] == 1.0
    assert result["features"] == "inception-v3 (torch-fidelity)"


def test_inception_weights_are_handed_on_as_tensors_alone(tmp_path, inception_weights, monkeypatch):
    """torch-fidelity runs what a pickle says; it never meets the user's file, whatever that is also."""
    write_tensors(tmp_path / "w.safetensors", torch.load(inception_weights, weights_only=True))
    met, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda path, **how: met.append(str(path)) or load(path, **how))
    features.InceptionFeatures(tmp_path / "w.safetensors")
    assert met and not [path for path in met if path.startswith(str(tmp_path))]


def test_inception_weights_of_another_network_are_refused(tmp_path, inception_weights, monkeypatch):
    state = torch.load(inception_weights, weights_only=True)
    state.pop("fc.bias")
    torch.save(state, tmp_path / "short.pth")
    with pytest.raises(ValueError, match=r"(?s)short.pth is not torch-fidelity's Inception.*fc.bias"):
        features.InceptionFeatures(tmp_path / "short.pth")

    def offline(url, progress):
        from urllib.error import URLError

        raise URLError("no network here")

    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", offline)
    with pytest.raises(ValueError, match=r"no network here.*--inception-weights.*--foundation"):
        features.InceptionFeatures(None)
