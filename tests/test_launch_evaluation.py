"""Figures of samples and of reconstructions against NumPy's and SciPy's, and what they are computed from."""

import hashlib
import json

import numpy as np
import pytest
import torch
from torch_fidelity import metric_kid

from launch.evaluation.image_source import open_images
from launch.evaluation.reconstructions import Reconstructions, evaluate_reconstructions
from launch.evaluation.reference import Reference, open_reference
from launch.evaluation.runner import evaluate_samples
from tests.measured import (
    FACTS,
    MemoryImages,
    distance,
    images,
    likeness,
    means,
    moments,
    peak_ratio,
    quarters,
    save_folder,
    share_inside,
    small_tokenizer,
)
from vavae.images import to_float_batch


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


SIZES = "holds images of 16×16, .* of 27×20: they cannot be compared"


@pytest.mark.parametrize("kind", ["images", "statistics and images", "originals", "folders", "decoded"])
def test_images_of_two_sizes_are_not_compared(tmp_path, tokenizer, kind):
    small, large = images(0, 30), images(1, 30, size=20, width=27)
    if kind == "images":
        with pytest.raises(ValueError, match=SIZES):
            evaluate_samples(MemoryImages(small), Reference("r", MemoryImages(large)), means, metadata={})
    elif kind == "statistics and images":
        reference = Reference("r", MemoryImages(large), moments(small))
        with pytest.raises(ValueError, match=SIZES):
            evaluate_samples(MemoryImages(small), reference, means, metadata={})
    elif kind == "originals":
        with pytest.raises(ValueError, match=SIZES):
            evaluate_reconstructions(MemoryImages(small), MemoryImages(large), extractor=means, lpips=None, metadata={})
    elif kind == "decoded":
        with pytest.raises(ValueError, match="memory holds images of 17×17; the tokenizer takes multiples of 2"):
            Reconstructions(MemoryImages(images(1, 3, size=17)), tokenizer)
    else:
        folders = [save_folder(tmp_path / name, pixels) for name, pixels in (("a", small), ("b", large))]
        with pytest.raises(ValueError, match=SIZES):
            evaluate_samples(open_images(folders[0]), open_reference(folders[1]), means, metadata={})
        both = [open_images(folders[0], 16), open_reference(folders[1], 16)]
        assert evaluate_samples(*both, means, metadata={})["metrics"]["fid"] > 0


def test_samples_against_images():
    real = images(4)
    fake = (real[:30].float() * 0.7 + 38 + images(5, 30, high=4).float()).to(torch.uint8)  # less varied
    got = evaluate_samples(
        MemoryImages(fake), Reference("real", MemoryImages(real)), means, metadata=FACTS, batch_size=7
    )
    assert got["metrics"]["fid"] == pytest.approx(distance(quarters(fake), quarters(real)), rel=1e-6)
    precision, recall = (share_inside(*map(quarters, pair)) for pair in ((real, fake), (fake, real)))
    assert (got["metrics"]["precision"], got["metrics"]["recall"]) == (precision, recall) and precision > recall
    hashes = b"".join(hashlib.sha256(image.numpy().tobytes()).digest() for image in fake)
    assert got["samples"] == 30 and got["samples_sha256"] == hashlib.sha256(hashes).hexdigest()
    assert {key: got[key] for key in FACTS} == FACTS
    (note,) = got["notes"]
    assert note.startswith("30 samples: Fréchet distances fall as N grows")
    kid = metric_kid.kid_features_to_metric(
        *(torch.from_numpy(quarters(x)) for x in (fake, real)), kid_subset_size=30, verbose=False
    )
    assert got["metrics"]["kid"] == pytest.approx(kid["kernel_inception_distance_mean"], rel=1e-5)
    assert got["metrics"]["kid_std"] == pytest.approx(kid["kernel_inception_distance_std"], rel=1e-5)
    assert got["basis"]["kid"] == {
        "images": 30,
        "reference": 40,
        "network": "means",
        "features": "features",
        "resize": "",
        "how": "100 subsets of 30",
    }
    assert set(got["skipped"]) == {"sfid", "inception_score", "fdd"}
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
    missing = "nfe, dtype, guidance, hashes, guidance_scale, guidance_interval, labels, weights"
    assert got["notes"][1:] == [f"not stated by whoever made the images: {missing}"]
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


def spoilt(place, value) -> np.ndarray:
    """A covariance of twelve features with one value of it replaced, on both sides of the diagonal."""
    covariance = np.eye(12)
    covariance[place] = covariance[place[::-1]] = value
    return covariance


STATISTICS = {
    "NaN": (np.full(12, np.nan), np.eye(12), "mu: 12 of 12 values are not finite"),
    "a NaN": (np.zeros(12), spoilt((1, 2), np.nan), "sigma: 2 of 144 values are not finite"),
    "infinite": (np.zeros(12), spoilt((3, 3), np.inf), "sigma: 1 of 144 values are not finite"),
    "large mean": (np.full(12, -1e300), np.eye(12), r"mu holds 1e\+300: no statistics of features"),
    "large covariance": (np.zeros(12), spoilt((0, 0), 1e300), r"sigma holds 1e\+300"),
    "of two kinds": (np.zeros(12), np.eye(11), r"sigma has shape \(11, 11\), expected \(12, 12\)"),
    "a matrix for a mean": (np.zeros((12, 1)), np.eye(12), r"mu has shape \(12, 1\), expected \(12,\)"),
    "a diagonal": (np.zeros(12), np.ones(12), r"sigma has shape \(12,\), expected \(12, 12\)"),
    "not symmetric": (np.zeros(12), np.triu(np.ones((12, 12))), "sigma is not symmetric"),
    "of other features": (np.zeros(5), np.eye(5), "holds statistics of 5 features; the network to compare by gives 12"),
    "no covariance": (np.zeros(12), -np.eye(12), "sigma2 has a negative eigenvalue"),
}


@pytest.mark.parametrize("names", [("mu", "sigma"), ("mu_s", "sigma_s")])
@pytest.mark.parametrize("kind", STATISTICS)
def test_statistics_without_a_distance_are_named_with_their_file(tmp_path, kind, names):
    mean, covariance, why = STATISTICS[kind]
    why = why if names[0] == "mu" else why.replace("mu", "mu_s", 1).replace("sigma", "sigma_s", 1)
    why = why.replace("sigma_s2", "sigma2").replace("5 features", "5 spatial" if names[0] == "mu_s" else "5 features")
    good = {"mu": np.zeros(12), "sigma": np.eye(12)}
    np.savez(tmp_path / "x.npz", **good | dict(zip(names, (mean, covariance), strict=True)))

    def both(batch):
        return means(batch) | {"spatial": means(batch)["features"]}

    with pytest.raises(ValueError, match=rf"{tmp_path}/x\.npz.*{why}"):
        evaluate_samples(MemoryImages(images(0)), open_reference(tmp_path / "x.npz"), both, metadata=FACTS)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_named_with_their_images(tmp_path, value):
    folders = [save_folder(tmp_path / name, images(seed, 20)) for seed, name in enumerate(("a", "b"))]
    first = images(1, 20)[0].double().mean()

    def broken(batch):  # of images like the first of b
        found = means(batch)["features"]
        found[(batch.double().mean((1, 2, 3)) - first).abs() < 1e-9] = value
        return {"features": found}

    pair = [open_images(folder) for folder in folders]
    with pytest.raises(ValueError, match=f"{folders[1]}: features: 12 of .* values are not finite"):
        evaluate_samples(pair[0], Reference(str(folders[1]), pair[1]), broken, metadata=FACTS)
    with pytest.raises(ValueError, match=f"{folders[1]}: features: 12 of .* values are not finite"):
        evaluate_reconstructions(*pair, extractor=broken, lpips=None, metadata=FACTS)


def test_too_small_or_too_few_images_are_named(tmp_path):
    small, one = (
        save_folder(tmp_path / name, images(0, count, size=size))
        for name, count, size in (("small", 3, 10), ("one", 1, 16))
    )
    pair = [open_images(small), open_images(small)]
    with pytest.raises(ValueError, match=f"{small} holds images of 10×10; SSIM needs at least 11 pixels a side"):
        evaluate_reconstructions(*pair, extractor=None, lpips=None, metadata=FACTS)
    middle = open_images(save_folder(tmp_path / "middle", images(0, 3, size=15)))
    with pytest.raises(ValueError, match="middle holds images of 15×15; LPIPS needs at least 16 pixels a side"):
        evaluate_reconstructions(middle, middle, extractor=None, lpips=lambda a, b: None, metadata=FACTS)
    with pytest.raises(ValueError, match=f"{one} holds 1 image; a distance needs at least 2"):
        reference = Reference("r", MemoryImages(images(1)))
        evaluate_samples(open_images(one), reference, means, metadata=FACTS, allow_few=True)
    few = MemoryImages(images(2, 3))
    got = evaluate_samples(few, Reference("r", MemoryImages(images(1))), means, metadata={}, allow_few=True)
    assert got["metrics"].keys() == {"fid", "kid", "kid_std"}
    assert got["skipped"]["precision, recall"].startswith("need more than 3")


def test_equal_images_have_no_ratio_of_signal_to_noise(tmp_path):
    """It is infinite, which JSON cannot hold."""
    original = images(11, 5)
    decoded = original.clone()
    decoded[2:] //= 2
    pair = MemoryImages(original), MemoryImages(decoded)
    got = evaluate_reconstructions(*pair, extractor=None, lpips=None, metadata={})
    assert got["metrics"].keys() == {"ssim"}
    assert got["skipped"]["psnr"] == "infinite: 2 of 5 reconstructions are equal to their originals"


def test_too_few_samples_are_refused_unless_allowed():
    few, real = MemoryImages(images(9, 12)), Reference("real", MemoryImages(images(10)))
    with pytest.raises(ValueError, match=r"12 samples for 12 features.*--allow-few"):
        evaluate_samples(few, real, means, metadata=FACTS)
    assert "covariance is singular" in evaluate_samples(few, real, means, metadata=FACTS, allow_few=True)["notes"][0]
    with pytest.raises(ValueError, match="12 reference images for 12 features"):
        evaluate_samples(real.images, Reference("few", few), means, metadata=FACTS)
    with pytest.raises(ValueError, match="not finite"):
        evaluate_samples(real.images, real, lambda x: {"features": means(x)["features"] / 0}, metadata=FACTS)


def test_reconstructions():
    original = images(11, 30)
    decoded = (original.int() + images(12, 30, high=9).int()).clamp(0, 255).to(torch.uint8)
    got = evaluate_reconstructions(
        MemoryImages(original),
        MemoryImages(decoded),
        extractor=means,
        metadata=FACTS,
        batch_size=8,
        lpips=lambda a, b: (a.double() - b.double()).abs().mean((1, 2, 3)),
    )
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
    with pytest.raises(ValueError, match="memory holds 30 images, memory 29: they do not pair"):
        evaluate_reconstructions(
            MemoryImages(original), MemoryImages(decoded[1:]), extractor=None, lpips=None, metadata=FACTS
        )


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
