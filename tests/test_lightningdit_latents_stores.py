"""What is stored of an image, and as what: the bits on the disk, what training reads, and the statistics of it."""

import json
import pickle

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from common.seeds import generator
from lightningdit.config import DataConfig
from lightningdit.data import LatentDataset
from lightningdit.latents import LatentsError
from lightningdit.latents_statistics import check_statistics, make_statistics, merge_moments, moments_of
from lightningdit.latents_writer import LatentsWriter, finish

COUNT, SHAPE = 50, (4, 3, 5)
FIRST = "latents_rank00_shard000.safetensors"
DTYPES = ("float32", "float16", "bfloat16")
POSTERIOR_NOISE = 1


def posteriors() -> tuple[torch.Tensor, torch.Tensor]:
    """Means and standard deviations [N, C, H, W], each channel of its own size."""
    g = torch.Generator().manual_seed(0)
    scale = torch.tensor([0.1, 1.0, 3.0, 20.0]).view(4, 1, 1)
    mean = scale * (torch.randn(COUNT, *SHAPE, generator=g) + torch.randn(COUNT, 4, 1, 1, generator=g) + 2)
    return mean, scale * torch.rand(COUNT, *SHAPE, generator=g)


def write(directory, store, dtype) -> None:
    mean, std = posteriors()
    plain = torch.cat([mean, std], 1) if store == "moments" else mean
    flipped = torch.cat([-mean, 2 * std], 1) if store == "moments" else -mean
    writer = LatentsWriter(directory, shard_size=20, store=store, dtype=dtype)
    for start in range(0, COUNT, 7):
        writer.add(plain[start : start + 7], flipped[start : start + 7], torch.arange(COUNT)[start : start + 7] % 3)
    writer.close()
    finish(directory, expected=COUNT)


def rounded(x: torch.Tensor, dtype: str) -> torch.Tensor:
    """To the nearest number of a dtype, ties to even, in float32: by NumPy, and for bfloat16 by the bits."""
    if dtype == "float32":
        return x
    if dtype == "float16":
        return torch.from_numpy(x.numpy().astype(np.float16).astype(np.float32))
    bits = x.numpy().view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
    return torch.from_numpy(bits.astype(np.uint32).view(np.float32).copy())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("store", ["sample", "mean"])
def test_values_are_stored_to_the_nearest_and_read_in_float32(tmp_path, store, dtype):
    write(tmp_path, store, dtype)
    data, mean = LatentDataset(tmp_path, latent_norm=False), rounded(posteriors()[0], dtype)
    for flip, want in ((False, mean), (True, -mean)):
        x = data.batch([0] * COUNT, range(COUNT), [flip] * COUNT)["x"]
        assert x.dtype == torch.float32 and torch.equal(x, want)
    assert load_file(tmp_path / FIRST)["latents"].dtype == getattr(torch, dtype)
    assert (data.store, data.dtype, data.manifest.store) == (store, getattr(torch, dtype), store)
    statistics = LatentDataset(tmp_path).statistics
    exact = mean.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(statistics.mean.double(), exact.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(statistics.std.double(), exact.std(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("store", ["sample", "moments"])
def test_what_is_stored_may_be_rounded_to_bfloat16_before_it_is_used(tmp_path, store, dtype):
    """Twice where float16 is stored: from what the file holds. Statistics and noise stay what they are."""
    write(tmp_path, store, dtype)
    data, exact = (LatentDataset(tmp_path, seed=3, latent_dtype=t) for t in (torch.bfloat16, torch.float32))
    mean, std = (rounded(rounded(value, dtype), "bfloat16") for value in posteriors())
    parts = [mean, std] if store == "moments" else [mean]
    indices, plain = np.arange(COUNT), np.zeros(COUNT, bool)
    assert torch.equal(torch.from_numpy(data.stored(indices, plain)), torch.stack(parts, 1).flatten(2))
    got, statistics = data.batch([2] * COUNT, indices, plain)["x"], exact.statistics
    noise = [torch.randn(SHAPE, generator=generator(3, POSTERIOR_NOISE, 2, index)) for index in range(COUNT)]
    want = mean + std * torch.stack(noise) if store == "moments" else mean
    want = (want - statistics.mean.view(4, 1, 1)) / statistics.std.view(4, 1, 1)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)
    assert torch.equal(got, exact.batch([2] * COUNT, indices, plain)["x"]) == (dtype == "bfloat16")
    assert torch.equal(data.statistics.std, statistics.std)


@pytest.mark.parametrize("dtype", DTYPES)
def test_moments_are_drawn_by_seed_epoch_and_index(tmp_path, dtype):
    write(tmp_path, "moments", dtype)
    mean, std = (rounded(value, dtype) for value in posteriors())
    data = LatentDataset(tmp_path, seed=3)
    epochs, indices, flips = [0, 5, 2, 0], [49, 0, 20, 19], [False, True, False, True]
    want = []
    for epoch, index, flip in zip(epochs, indices, flips, strict=True):
        noise = torch.randn(SHAPE, generator=generator(3, POSTERIOR_NOISE, epoch, index))
        x = (-mean if flip else mean)[index] + (2 * std if flip else std)[index] * noise
        want.append((x - data.statistics.mean.view(4, 1, 1)) / data.statistics.std.view(4, 1, 1))
    found = data.batch(epochs, indices, flips)["x"]
    torch.testing.assert_close(found, torch.stack(want), rtol=0, atol=2e-6)
    for again in (LatentDataset(tmp_path, seed=3), pickle.loads(pickle.dumps(data))):
        assert torch.equal(again.batch(epochs[2:], indices[2:], flips[2:])["x"], found[2:])
    other = LatentDataset(tmp_path, seed=4).batch(epochs, indices, flips)["x"]
    later = data.batch([e + 1 for e in epochs], indices, flips)["x"]
    assert all((found - x).abs().flatten(1).max(1).values.min() > 0.1 for x in (other, later))
    assert data.shape == SHAPE and data.manifest.shape == SHAPE


def test_moments_are_drawn_normally_about_their_means(tmp_path):
    write(tmp_path, "moments", "float32")
    data, (mean, std) = LatentDataset(tmp_path, latent_norm=False), posteriors()
    drawn = torch.cat([data.batch([e] * COUNT, range(COUNT), [False] * COUNT)["x"] for e in range(40)]).double()
    noise = (drawn - mean.repeat(40, 1, 1, 1)) / std.clamp_min(1e-6).repeat(40, 1, 1, 1)
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01 and abs((noise**3).mean()) < 0.03
    table = torch.corrcoef(noise[:, 0, 0].T)  # positions
    assert (table - torch.eye(5)).abs().max() < 0.1


def test_statistics_of_moments_are_those_of_the_samples(tmp_path):
    """mean(μ), and var(μ) + mean(σ²): as many samples, drawn often, come to them."""
    write(tmp_path, "moments", "float32")
    (mean, std), statistics = (v.double().transpose(0, 1).flatten(1) for v in posteriors()), LatentDataset(tmp_path)
    exact = (mean.var(1) + std.square().mean(1)).sqrt()
    torch.testing.assert_close(statistics.statistics.mean.double(), mean.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(statistics.statistics.std.double(), exact, rtol=1e-6, atol=0)
    raw = LatentDataset(tmp_path, latent_norm=False)
    variances = [raw.batch([e] * COUNT, range(COUNT), [False] * COUNT)["x"].var((0, 2, 3)) for e in range(200)]
    torch.testing.assert_close(torch.stack(variances).mean(0).double(), exact.square(), rtol=0.02, atol=0)
    check_statistics(statistics)


@pytest.mark.parametrize("store", ["sample", "moments"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sets_that_lost_their_manifest_and_statistics_still_say_what_they_store(tmp_path, store, dtype):
    write(tmp_path, store, dtype)
    whole, statistics = LatentDataset(tmp_path), torch.load(tmp_path / "latents_stats.pt", weights_only=True)
    want = whole.batch([1, 2], [30, 4])["x"]
    for name in ("manifest.json", "latents_stats.pt"):
        (tmp_path / name).unlink()
    make_statistics(tmp_path)
    made = torch.load(tmp_path / "latents_stats.pt", weights_only=True)
    assert all(torch.equal(made[key], statistics[key]) for key in ("mean", "std"))
    assert torch.equal(LatentDataset(tmp_path).batch([1, 2], [30, 4])["x"], want)


@pytest.mark.parametrize("store", ["sample", "mean", "moments"])
def test_only_what_is_not_published_is_said(tmp_path, caplog, store):
    caplog.set_level("INFO")
    write(tmp_path, store, "float32" if store == "sample" else "float16")
    with safe_open(tmp_path / FIRST, "pt") as f:
        metadata = f.metadata()
    published = {"total_size": "20", "dtype": "torch.float32", "device": "cpu"}
    assert metadata == (published if store == "sample" else published | {"dtype": "torch.float16", "store": store})
    caplog.clear()
    LatentDataset.from_config(DataConfig(data_path=str(tmp_path), num_classes=3), seed=0)
    said = "" if store == "sample" else f", stored as {store} in float16"
    assert f"{tmp_path}: 50 latents{said}\n" in caplog.text


def test_statistics_of_shards_of_any_size_merge_to_those_of_all():
    mean, std = posteriors()
    stored = torch.cat([mean, std], 1)
    one = merge_moments([moments_of(stored, "moments")])
    for cuts in ((1, 49), (20, 20, 10), (17, 33)):
        many = merge_moments(moments_of(part, "moments") for part in stored.split(cuts))
        for key in ("mean", "std"):
            np.testing.assert_allclose(many[key], one[key], rtol=1e-12)
        assert many["count"] == one["count"] == COUNT * 15


def test_statistics_are_the_same_bits_with_any_number_of_threads():
    x, threads = torch.randn(3000, 2, 16, 16, generator=torch.Generator().manual_seed(0)), torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            found.append(moments_of(x, "sample"))
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]


# --- what is refused


def test_values_beyond_float16_are_refused(tmp_path):
    x = torch.full((3, 4, 2, 2), 65519.0)  # the last that rounds to float16's largest
    writer = LatentsWriter(tmp_path, shard_size=3, dtype="float16")
    writer.add(x, -x, torch.arange(3))
    assert load_file(tmp_path / FIRST)["latents"].float().max() == 65504
    x[1, 2, 1, 0] = -65520.0
    for plain, mirrored in ((x, x * 0), (x * 0, x)):
        with pytest.raises(
            LatentsError, match=r"shard001.*reach 65,520, and torch.float16 ends at 65,504: store them as"
        ):
            writer.add(plain, mirrored, torch.arange(3))
    with pytest.raises(LatentsError, match="not finite"):
        writer.add(x * torch.nan, x, torch.arange(3))
    wide = LatentsWriter(tmp_path / "wide", shard_size=3, dtype="bfloat16")
    wide.add(x, x, torch.arange(3))
    assert load_file(tmp_path / "wide" / FIRST)["latents"].float().min() == -65536


def test_moments_are_as_many_means_as_deviations(tmp_path):
    x = torch.zeros(3, 5, 2, 2)
    with pytest.raises(ValueError, match="5 channels of moments: wanted as many means as standard deviations"):
        LatentsWriter(tmp_path, store="moments").add(x, x, torch.arange(3))
    assert not list(tmp_path.glob("*.safetensors"))


def test_shards_of_different_kinds_are_no_set(tmp_path):
    write(tmp_path, "sample", "float32")
    (tmp_path / "manifest.json").unlink()
    content, path = load_file(tmp_path / FIRST), tmp_path / FIRST
    halves = {name: value.half() if value.is_floating_point() else value for name, value in content.items()}
    save_file(halves, path)
    with pytest.raises(
        LatentsError, match=r"shard001.* stores sample in torch.float32, .*shard000.* sample in torch.fl"
    ):
        LatentDataset(tmp_path)
    save_file(content, path, {"store": "mode"})
    with pytest.raises(LatentsError, match=r"shard000.* stores 'mode' of each image; known are sample, mean, moments"):
        LatentDataset(tmp_path)
    odd = {name: value[:, :3].contiguous() if value.dim() == 4 else value for name, value in content.items()}
    save_file(odd, path, {"store": "moments"})
    with pytest.raises(LatentsError, match=r"shard000.* has 3 channels: means and standard deviations are as many"):
        LatentDataset(tmp_path)
    save_file(content | {"latents_flip": content["latents_flip"].half()}, path)
    with pytest.raises(LatentsError, match="latents and latents_flip, both as F32, F16, BF16"):
        LatentDataset(tmp_path)


@pytest.mark.parametrize("changed", [{"store": "mean"}, {"dtype": "float16"}])
def test_a_manifest_that_says_another_store_is_refused(tmp_path, changed):
    write(tmp_path, "sample", "float32")
    path = tmp_path / "manifest.json"
    content = json.loads(path.read_text())
    del content["checksum"]
    path.write_text(json.dumps(content | changed))
    with pytest.raises(LatentsError, match=r"manifest\.json says count, shape, store and dtype"):
        LatentDataset(tmp_path)


def test_a_manifest_of_an_earlier_version_means_samples_in_float32(tmp_path):
    write(tmp_path, "sample", "float32")
    path = tmp_path / "manifest.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({key: content[key] for key in content if key not in ("checksum", "store", "dtype")}))
    assert LatentDataset(tmp_path).store == "sample" and len(LatentDataset(tmp_path)) == COUNT
