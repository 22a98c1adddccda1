"""Latents directories: the published ones, our own writer, and everything that can be wrong with one."""

import json
import mmap
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from lightningdit import data
from lightningdit.data import LatentDataset
from lightningdit.latents import LatentsError, LatentStatistics, LatentsWriter, finish, read_manifest
from lightningdit.mapping import map_side_by_side
from lightningdit.seeds import generator, mix
from tests.golden import G, J, close
from tests.golden.golden import ROOT

PUBLISHED = ROOT / "06_latents_dir"
EVERY = torch.arange(12)
EPOCH_0 = torch.zeros(12, dtype=torch.int64)


@pytest.fixture
def expected():
    return G("06_dataset_expected")


def write(directory, counts=(5, 3), ranks=1, shard_size=5, shape=(4, 3, 2), identity=None, seed=0):
    """A finished directory of random latents, mean 2 and std 3, → its plain latents in order."""
    g = torch.Generator().manual_seed(seed)
    everything = []
    for rank in range(ranks):
        writer = LatentsWriter(directory, rank=rank, shard_size=shard_size, identity=identity)
        for count in counts:
            x = torch.randn(count, *shape, generator=g) * 3 + 2
            writer.add(x, x + 100, torch.arange(count) % 4)
            everything.append(x)
        writer.close()
    finish(directory, world_size=ranks, tokenizer={"name": "test", "sha256": "00"}, expected=ranks * sum(counts))
    return torch.cat(everything)


# --- the published set


def test_published_items_in_order(expected):
    for flips, name in ((False, "orig"), (True, "flip")):
        data = LatentDataset(PUBLISHED, num_classes=1000)
        batch = data.batch(EPOCH_0, EVERY, flips=[flips] * 12)
        assert torch.equal(batch["x"], expected[f"norm/{name}/x"])
        assert torch.equal(batch["y"], expected["labels"]) and batch["y"].dtype == torch.int64
    assert len(data) == J("06_dataset")["n"] and data.shape == (4, 4, 4) and data.manifest is None


def test_other_multipliers(expected):
    plain = [False] * 12
    half = LatentDataset(PUBLISHED, latent_multiplier=0.5).batch(EPOCH_0, EVERY, plain)["x"]
    assert torch.equal(half, expected["norm_mult0.5/orig/x"])
    raw = LatentDataset(PUBLISHED, latent_norm=False, latent_multiplier=0.18215).batch(EPOCH_0, EVERY, plain)["x"]
    assert torch.equal(raw, expected["raw_mult0.18215/orig/x"])


def test_published_flips_reproduce_the_seeded_run(expected):
    flips = ~(expected["seed123/uniforms"] > 0.5)
    assert torch.equal(LatentDataset(PUBLISHED).batch(EPOCH_0, EVERY, flips)["x"], expected["seed123/x"])
    np.random.seed(123)
    assert np.array_equal(np.random.uniform(0, 1, 12), expected["seed123/uniforms"].numpy())


def test_statistics_and_the_way_back(expected):
    data = LatentDataset(PUBLISHED)
    assert torch.equal(data.statistics.mean, expected["stats/mean"].flatten())
    assert torch.equal(data.statistics.std, expected["stats/std"].flatten())
    x = data.statistics.denormalise(expected["norm/orig/x"])
    close("denormalised", x, expected["denorm/of_norm_orig"], atol=1e-6)
    raw = LatentDataset(PUBLISHED, latent_norm=False).batch(EPOCH_0, EVERY, [False] * 12)["x"]
    for norm, multiplier in ((True, 1.0), (True, 0.5), (False, 0.18215)):
        other = LatentDataset(PUBLISHED, latent_norm=norm, latent_multiplier=multiplier)
        there = other.batch(EPOCH_0, EVERY, [False] * 12)["x"]
        close("there and back", other.statistics.denormalise(there), raw, atol=1e-5)
    again = LatentStatistics.from_json(json.loads(json.dumps(data.statistics.to_json())))
    assert torch.equal(again.mean, data.statistics.mean) and torch.equal(again.std, data.statistics.std)


# --- what a sample depends on


def test_any_order_any_batch():
    data = LatentDataset(PUBLISHED, seed=5)
    epochs, indices = torch.tensor([0, 3, 1, 0, 7, 3]), torch.tensor([11, 0, 5, 5, 8, 9])
    together = data.batch(epochs, indices)
    for i in range(6):
        one = data.batch(epochs[i : i + 1], indices[i : i + 1])
        assert torch.equal(one["x"][0], together["x"][i]) and one["y"][0] == together["y"][i]


def test_flips_can_be_turned_off():
    data = LatentDataset(PUBLISHED, latent_flip=False)
    plain = LatentDataset(PUBLISHED).batch(EPOCH_0, EVERY, flips=[False] * 12)
    assert torch.equal(data.batch(EPOCH_0, EVERY)["x"], plain["x"])


def test_flips_are_a_fair_hash_of_seed_epoch_and_index():
    data, other = LatentDataset(PUBLISHED, seed=0), LatentDataset(PUBLISHED, seed=1)
    epochs, indices = np.repeat(np.arange(100), 100), np.tile(np.arange(100), 100)
    flips = data.flips(epochs, indices)
    assert flips.mean() == pytest.approx(0.5, abs=0.02)
    table = flips.reshape(100, 100)
    for a, b in ((table[1:], table[:-1]), (table[:, 1:], table[:, :-1]), (flips, other.flips(epochs, indices))):
        assert (a == b).mean() == pytest.approx(0.5, abs=0.02)
    assert np.array_equal(flips, data.flips(torch.from_numpy(epochs), torch.from_numpy(indices)))


def test_mix_tells_order_apart():
    assert mix(1, 2) != mix(2, 1) and mix(0) != mix(0, 0) and mix(-1) != mix(1)
    assert np.array_equal(mix(3, np.arange(4)), [mix(3, i) for i in range(4)])
    assert torch.equal(torch.rand(3, generator=generator(1, 2)), torch.rand(3, generator=generator(1, 2)))


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_loader_workers(context):
    data = LatentDataset(PUBLISHED, seed=2)
    loader = DataLoader(_Whole(data), batch_size=None, num_workers=1, multiprocessing_context=context)
    (batch,) = list(loader)
    assert torch.equal(batch["x"], data.batch(EPOCH_0, EVERY)["x"])


class _Whole(torch.utils.data.Dataset):
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return 1

    def __getitem__(self, i):
        if i:
            raise IndexError
        return self.data.batch(EPOCH_0, EVERY)


def test_pickles_without_its_maps(tmp_path):
    write(tmp_path, counts=(999, 1001), shard_size=1500)
    data, epochs, indices = LatentDataset(tmp_path), torch.zeros(50), torch.arange(1475, 1525)
    pickled = pickle.dumps(data)
    assert len(pickled) < 8 * 2000  # not even the labels
    again = pickle.loads(pickled)
    for name, value in again.batch(epochs, indices).items():
        assert torch.equal(value, data.batch(epochs, indices)[name])


# --- the writer


def test_written_set_reads_back(tmp_path):
    x = write(tmp_path, counts=(7, 4, 2), ranks=2, shard_size=5)
    data = LatentDataset(tmp_path, latent_norm=False, num_classes=4, verify=True)
    n = len(x)
    plain = data.batch(torch.zeros(n), torch.arange(n), [False] * n)["x"]
    assert torch.equal(plain, x)
    assert torch.equal(data.batch(torch.zeros(n), torch.arange(n), [True] * n)["x"], x + 100)
    files = sorted(p.name for p in tmp_path.iterdir())
    shards = [f"latents_rank{rank:02d}_shard{shard:03d}.safetensors" for rank in (0, 1) for shard in (0, 1, 2)]
    assert files == [*shards, "latents_stats.pt", "manifest.json"]
    assert data.manifest["count"] == n == 26 and data.manifest["tokenizer"]["name"] == "test"


def test_written_shards_are_of_the_published_format(tmp_path):
    write(tmp_path)
    theirs = J("06_dataset")["safetensors_header"]["latents_rank00_shard000.safetensors"]
    with safe_open(tmp_path / "latents_rank00_shard000.safetensors", "pt") as f:
        assert f.metadata() == theirs["metadata"]
        assert sorted(f.keys()) == sorted(theirs["tensors"])
        for key, want in theirs["tensors"].items():
            assert f.get_slice(key).get_dtype() == want["dtype"]
    content = torch.load(tmp_path / "latents_stats.pt", weights_only=True)
    assert {k: (v.dtype, list(v.shape)) for k, v in content.items()} == {
        k: (torch.float32, [1, 4, 1, 1]) for k in J("06_dataset")["stats_keys"]
    }


def test_statistics_are_of_the_whole_set(tmp_path):
    x = write(tmp_path, counts=(7, 4, 2), ranks=2, shard_size=5).double().transpose(0, 1).flatten(1)
    statistics = LatentDataset(tmp_path).statistics
    close("mean", statistics.mean, x.mean(1).float(), rtol=1e-7)
    close("std", statistics.std, x.std(1, unbiased=True).float(), rtol=1e-7)


def test_published_statistics_are_reproduced(tmp_path, expected):
    """The published file was made of all twelve plain latents."""
    writer = LatentsWriter(tmp_path, shard_size=5)
    for path in sorted(PUBLISHED.glob("*.safetensors")):
        shard = load_file(path)
        writer.add(shard["latents"], shard["latents_flip"], shard["labels"])
    writer.close()
    finish(tmp_path)
    statistics = LatentDataset(tmp_path).statistics
    close("mean", statistics.mean, expected["stats/mean"].flatten(), rtol=1e-6)
    close("std", statistics.std, expected["stats/std"].flatten(), rtol=1e-6)


def test_extraction_goes_on_after_a_kill(tmp_path):
    """Only shards with their record count; what a killed process left half done is written again."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(13, 4, 3, 2, generator=g), torch.arange(13) % 4
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for directory in (whole, broken):
        writer = LatentsWriter(directory, shard_size=5, identity={"images": 13})
        writer.add(x[:11], -x[:11], y[:11])  # two shards and one latent that is lost with the process
        if directory == whole:
            writer.add(x[11:], -x[11:], y[11:])
            writer.close()
    assert writer.position == 10
    (broken / "latents_rank00_shard001.json").unlink()  # killed between the shard and its record
    (broken / ".latents_rank00_shard002.safetensors.tmp").write_bytes(b"half")
    writer = LatentsWriter(broken, shard_size=5, identity={"images": 13})
    assert writer.position == 5
    writer.add(x[5:], -x[5:], y[5:])
    writer.close()
    for directory in (whole, broken):
        finish(directory, expected=13)
    assert {p.name: p.read_bytes() for p in whole.iterdir()} == {p.name: p.read_bytes() for p in broken.iterdir()}
    assert LatentsWriter(broken, shard_size=5, identity={"images": 13}).position == 13
    assert finish(broken) == read_manifest(broken)


@pytest.mark.parametrize("killed", ["before a record", "between shards", "before the manifest", "after it"])
def test_an_unfinished_extraction_is_no_set(tmp_path, killed):
    """Not even without statistics, where it could pass for a published set; a kill while finishing loses nothing."""
    x, y = torch.ones(6, 4, 3, 2), torch.arange(6) % 4
    writer = LatentsWriter(tmp_path, shard_size=3)
    with pytest.raises(LatentsError, match="unfinished"):
        LatentDataset(tmp_path, latent_norm=False)
    writer.add(x[:4], x[:4], y[:4])
    if killed == "before a record":
        (tmp_path / "latents_rank00_shard000.json").unlink()
    if killed in ("before the manifest", "after it"):
        writer.add(x[4:], x[4:], y[4:])
        left = {p: p.read_bytes() for p in tmp_path.iterdir() if p.suffix != ".safetensors"}
        finish(tmp_path)
        for path, content in left.items():  # put back what the end of `finish` takes away
            path.write_bytes(content)
    if killed == "before the manifest":
        (tmp_path / "manifest.json").unlink()
    if killed == "after it":
        assert len(LatentDataset(tmp_path, latent_norm=False)) == 6
    else:
        with pytest.raises(LatentsError, match=r"is unfinished: run the extraction again"):
            LatentDataset(tmp_path, latent_norm=False)
    writer = LatentsWriter(tmp_path, shard_size=3)
    writer.add(x[writer.position :], x[writer.position :], y[writer.position :])
    writer.close()
    finish(tmp_path, expected=6)
    assert len(LatentDataset(tmp_path, latent_norm=False)) == 6
    assert LatentsWriter(tmp_path, shard_size=3).position == 6
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "latents_rank00_shard000.safetensors", "latents_rank00_shard001.safetensors", "latents_stats.pt",
        "manifest.json"]  # fmt: skip


def test_latents_that_no_extraction_of_ours_began_are_not_overwritten(tmp_path):
    shutil.copytree(PUBLISHED, tmp_path / "set")
    before = {p.name: p.read_bytes() for p in (tmp_path / "set").iterdir()}
    with pytest.raises(LatentsError, match=r"latents_rank00_shard000.safetensors.* give an empty directory"):
        LatentsWriter(tmp_path / "set")
    assert {p.name: p.read_bytes() for p in (tmp_path / "set").iterdir()} == before


def test_writer_refuses(tmp_path):
    x = torch.randn(3, 4, 2, 2)
    writer = LatentsWriter(tmp_path, shard_size=3, identity={"seed": 0})
    with pytest.raises(ValueError, match=r"\(3, 4, 2, 2\), \(3, 4, 2, 2\), \(2,\)"):
        writer.add(x, x, torch.arange(2))
    writer.add(x[:1], x[:1], torch.arange(1))
    with pytest.raises(ValueError, match="after latents of shape"):
        writer.add(x[:, :2], x[:, :2], torch.arange(3))
    x[1] = float("nan")
    with pytest.raises(LatentsError, match=r"shard000.*not finite"):
        writer.add(x, x, torch.arange(3))
    with pytest.raises(LatentsError, match="no complete shard"):
        finish(tmp_path)
    write(tmp_path / "a", identity={"seed": 0})
    with pytest.raises(LatentsError, match=r"shard000.*another extraction: {'seed': 0}, this one is {'seed': 1}"):
        LatentsWriter(tmp_path / "a", identity={"seed": 1})
    writer = LatentsWriter(tmp_path / "b", rank=1, shard_size=3)
    writer.add(torch.ones(3, 4, 2, 2), torch.ones(3, 4, 2, 2), torch.arange(3))
    with pytest.raises(LatentsError, match=r"3 latents.*ranks \[1\]; expected 4.*below 1"):
        finish(tmp_path / "b", world_size=1, expected=4)
    shutil.copy(tmp_path / "a" / "latents_rank00_shard000.safetensors", tmp_path / "b")
    with pytest.raises(LatentsError, match="unfinished shards latents_rank00_shard000"):
        finish(tmp_path / "b", world_size=2)


# --- what can be wrong with a directory


@pytest.fixture
def latents(tmp_path):
    write(tmp_path)
    return tmp_path


SHARD = "latents_rank00_shard001.safetensors"


def cut(path, by):
    content = path.read_bytes()
    path.write_bytes(content[:-by])


def test_missing_shard(latents):
    (latents / SHARD).unlink()
    with pytest.raises(LatentsError, match=f"{SHARD} is missing though manifest.json lists it"):
        LatentDataset(latents)


@pytest.mark.parametrize("by", [1, 200, 999])
@pytest.mark.parametrize("manifest", [True, False])
def test_truncated_shard(latents, by, manifest):
    if not manifest:
        (latents / "manifest.json").unlink()
    cut(latents / SHARD, by)
    with pytest.raises(LatentsError, match=f"{SHARD} is truncated"):
        LatentDataset(latents)


def test_truncated_to_less_than_a_header(latents):
    (latents / "manifest.json").unlink()
    (latents / SHARD).write_bytes(b"\x10\0\0")
    with pytest.raises(LatentsError, match=f"{SHARD} is truncated"):
        LatentDataset(latents)


def test_flipped_bit(latents, monkeypatch):
    content = bytearray((latents / SHARD).read_bytes())
    content[-5] ^= 4
    (latents / SHARD).write_bytes(content)
    LatentDataset(latents, verify=False)
    for verify in (True, None):  # None: a small set is always verified
        with pytest.raises(LatentsError, match=f"{SHARD} is damaged: SHA-256"):
            LatentDataset(latents, verify=verify)
    monkeypatch.setattr(data, "VERIFY_BELOW", 1)
    LatentDataset(latents)


def test_damaged_header_and_manifest(latents):
    content = bytearray((latents / SHARD).read_bytes())
    content[9] = 0
    (latents / SHARD).write_bytes(content)
    with pytest.raises(LatentsError, match=f"{SHARD} is damaged: its safetensors header"):
        LatentDataset(latents, verify=False)
    (latents / "manifest.json").write_text("{")
    with pytest.raises(LatentsError, match=r"manifest.json is damaged"):
        LatentDataset(latents)


def test_statistics_missing_or_unusable(latents):
    path = latents / "latents_stats.pt"
    torch.save({"mean": torch.zeros(1, 4, 1, 1), "std": torch.zeros(1, 4, 1, 1)}, path)
    (latents / "manifest.json").unlink()
    with pytest.raises(LatentsError, match=r"latents_stats.pt holds .*not usable"):
        LatentDataset(latents)
    torch.save({"mean": torch.zeros(1, 3, 1, 1), "std": torch.ones(1, 3, 1, 1)}, path)
    with pytest.raises(LatentsError, match=r"latents_stats.pt has 3 channels, the latents 4"):
        LatentDataset(latents)
    path.write_bytes(b"no tensors")
    with pytest.raises(LatentsError, match=r"latents_stats.pt cannot be read"):
        LatentDataset(latents)
    path.unlink()
    with pytest.raises(LatentsError, match=r"latents_stats.pt is missing: latent_norm"):
        LatentDataset(latents)
    assert LatentDataset(latents, latent_norm=False).statistics.std.tolist() == [1, 1, 1, 1]


def test_labels_outside_the_classes(latents):
    with pytest.raises(LatentsError, match=r"shard000.safetensors has labels from 0 to 3; allowed are 0 to 2"):
        LatentDataset(latents, num_classes=3)


def test_unlisted_and_foreign_shards(latents):
    extra = latents / "latents_rank07_shard000.safetensors"
    shutil.copy(latents / SHARD, extra)
    with pytest.raises(LatentsError, match=r"rank07_shard000.safetensors is not in manifest.json"):
        LatentDataset(latents)
    (latents / "manifest.json").unlink()
    assert len(LatentDataset(latents)) == 11
    wide = torch.zeros(2, 4, 3, 3)
    save_file({"latents": wide, "latents_flip": wide.clone(), "labels": torch.arange(2)}, extra)
    with pytest.raises(LatentsError, match=r"rank07.*has latents of \(4, 3, 3\).*shard000.*\(4, 3, 2\)"):
        LatentDataset(latents)
    save_file({"latents": torch.zeros(2, 4, 3, 2).half(), "labels": torch.arange(2)}, extra)
    with pytest.raises(LatentsError, match=r"rank07.*latents as F32"):
        LatentDataset(latents)
    save_file({"latents": wide, "latents_flip": wide.clone(), "labels": torch.arange(3)}, extra)
    with pytest.raises(LatentsError, match=r"rank07.*do not fit together"):
        LatentDataset(latents)


def test_no_directory_no_shards_no_checksums(tmp_path):
    with pytest.raises(LatentsError, match="is no directory"):
        LatentDataset(tmp_path / "absent")
    with pytest.raises(LatentsError, match=r"holds no \.safetensors shard"):
        LatentDataset(tmp_path)
    with pytest.raises(LatentsError, match=r"no manifest\.json, so there are no checksums"):
        LatentDataset(PUBLISHED, verify=True)


def test_gathering_from_many_shards(tmp_path):
    """Every row of every shard, in any order, against the rows that were written."""
    x = write(tmp_path, counts=(11, 6, 9), ranks=2, shard_size=4, shape=(3, 5, 7))
    statistics = LatentDataset(tmp_path).statistics
    for norm, multiplier in ((True, 1.0), (True, 0.7), (False, 1.0), (False, 0.7)):
        data = LatentDataset(tmp_path, latent_norm=norm, latent_multiplier=multiplier)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))
        flips = order % 3 == 0
        want = x[order] + 100 * flips.view(-1, 1, 1, 1)
        if norm:
            want = (want - statistics.mean.view(-1, 1, 1)) / statistics.std.view(-1, 1, 1)
        assert torch.equal(data.batch(torch.zeros(len(x)), order, flips)["x"], want * multiplier)


def test_an_empty_batch_has_its_shape():
    batch = LatentDataset(PUBLISHED).batch(EPOCH_0[:0], EVERY[:0])
    assert batch["x"].shape == (0, 4, 4, 4) and batch["y"].shape == (0,)


@pytest.mark.parametrize("multiplier", [1.0, 0.5])
@pytest.mark.parametrize("norm", [True, False])
def test_pinned_batches_are_the_same_in_memory_of_their_own(monkeypatch, norm, multiplier):
    data = LatentDataset(PUBLISHED, latent_norm=norm, latent_multiplier=multiplier)
    want, pinned, empty = data.batch(EPOCH_0, EVERY), [], torch.empty

    def stand_in(*shape, pin_memory):
        pinned.append(empty(*shape).fill_(float("nan")))
        return pinned[-1]

    monkeypatch.setattr(torch, "empty", stand_in)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda y: pinned.append(y.clone()) or pinned[-1])
    got = data.batch(EPOCH_0, EVERY, pin_memory=True)
    assert all(torch.equal(got[key], want[key]) for key in ("x", "y"))
    assert {got["x"].data_ptr(), got["y"].data_ptr()} == {p.data_ptr() for p in pinned}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_pinned_batches_on_a_gpu():
    data = LatentDataset(PUBLISHED)
    got, want = data.batch(EPOCH_0, EVERY, pin_memory=True), data.batch(EPOCH_0, EVERY)
    assert all(got[key].is_pinned() and torch.equal(got[key], want[key]) for key in ("x", "y"))


def test_the_same_batches_from_many_threads(tmp_path):
    write(tmp_path, counts=(40, 24), shard_size=10)
    data = LatentDataset(tmp_path)
    keys = [(torch.full((16,), e), torch.arange(16) * 4 % 61) for e in range(20)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda key: data.batch(*key)["x"], keys))
    assert all(torch.equal(x, data.batch(*key)["x"]) for x, key in zip(together, keys, strict=True))


def test_maps_lie_side_by_side_and_go_with_the_array(tmp_path):
    sizes = (1, mmap.PAGESIZE - 1, mmap.PAGESIZE, 3 * mmap.PAGESIZE + 5)
    contents = [bytes([n]) * size for n, size in enumerate(sizes, 1)]
    for n, content in enumerate(contents):
        (tmp_path / f"{n}").write_bytes(content)
    mapped, starts = map_side_by_side(sorted(tmp_path.iterdir()))
    assert starts == [n * mmap.PAGESIZE for n in (0, 1, 2, 3)] and len(mapped) == 7 * mmap.PAGESIZE
    for start, content in zip(starts, contents, strict=True):
        assert mapped[start : start + len(content)].tobytes() == content
    assert mapped[1:start].max() == 3 and not mapped[start + len(content) :].any() and not mapped.flags.writeable
    view = mapped[-10:]
    assert _maps_of(tmp_path) == 4
    del mapped
    assert _maps_of(tmp_path) == 4 and not view.any()
    del view
    assert _maps_of(tmp_path) == 0


def _maps_of(directory):
    return Path("/proc/self/maps").read_text().count(f"{directory}/")


def test_a_file_that_cannot_be_mapped_is_named(tmp_path):
    (tmp_path / "full").write_text("something")
    (tmp_path / "empty").touch()
    with pytest.raises(OSError, match="empty"):
        map_side_by_side([tmp_path / "full", tmp_path / "empty"])
    assert not _maps_of(tmp_path)


def test_tensors_at_odd_bytes_or_of_other_sizes(latents):
    (latents / "manifest.json").unlink()
    content = (latents / SHARD).read_bytes()
    length = int.from_bytes(content[:8], "little")
    shifted = (length + 1).to_bytes(8, "little") + content[8 : 8 + length] + b" " + content[8 + length :]
    (latents / SHARD).write_bytes(shifted)
    with pytest.raises(LatentsError, match=f"{SHARD} has tensors that begin at bytes .*not at multiples of 4"):
        LatentDataset(latents)
    header = json.loads(content[8 : 8 + length])
    header["latents"]["data_offsets"][0] += 4
    text = json.dumps(header).encode().ljust(length)
    (latents / SHARD).write_bytes(content[:8] + text + content[8 + length :])
    with pytest.raises(LatentsError, match=f"{SHARD} .*do not fit together"):
        LatentDataset(latents)


def test_index_outside_the_set():
    for index in (-1, 12):
        with pytest.raises(IndexError, match="the set has 12 latents"):
            LatentDataset(PUBLISHED).batch(torch.zeros(1), torch.tensor([index]))
