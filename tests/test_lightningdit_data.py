"""The dataset: what a sample depends on, and how batches are gathered."""

import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lightningdit.data import LatentDataset
from lightningdit.latents import LatentsError, LatentStatistics, StatisticsRecord
from tests.golden import G, J, close
from tests.golden.golden import ROOT
from tests.toy import write_random_latents

PUBLISHED = ROOT / "06_latents_dir"
EVERY = torch.arange(12)
EPOCH_0 = torch.zeros(12, dtype=torch.int64)


@pytest.fixture
def expected():
    return G("06_dataset_expected")


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
    record = StatisticsRecord.model_validate_json(json.dumps(data.statistics.to_json()))
    again = LatentStatistics.from_record(record, channels=4, source="here")
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


def test_pickles_without_its_files(tmp_path):
    write_random_latents(tmp_path, counts=(999, 1001), shard_size=1500)
    data, epochs, indices = LatentDataset(tmp_path), torch.zeros(50), torch.arange(1475, 1525)
    pickled = pickle.dumps(data)
    assert len(pickled) < 8 * 2000  # not even the labels
    again = pickle.loads(pickled)
    for name, value in again.batch(epochs, indices).items():
        assert torch.equal(value, data.batch(epochs, indices)[name])


# --- batches


def test_gathering_from_many_shards(tmp_path):
    """Every row of every shard, in any order, against the rows that were written."""
    x = write_random_latents(tmp_path, counts=(11, 6, 9), ranks=2, shard_size=4, shape=(3, 5, 7))
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
    write_random_latents(tmp_path, counts=(40, 24), shard_size=10)
    data = LatentDataset(tmp_path)
    keys = [(torch.full((16,), e), torch.arange(16) * 4 % 61) for e in range(20)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda key: data.batch(*key)["x"], keys))
    assert all(torch.equal(x, data.batch(*key)["x"]) for x, key in zip(together, keys, strict=True))


def test_index_outside_the_set():
    for index in (-1, 12):
        with pytest.raises(IndexError, match="the set has 12 latents"):
            LatentDataset(PUBLISHED).batch(torch.zeros(1), torch.tensor([index]))


# --- files


@pytest.mark.parametrize("threads", [1, 4])
def test_a_shard_cut_short_while_it_is_read_is_named(tmp_path, threads):
    """Read through a map of the file, this would be a SIGBUS that ends the process without a word."""
    write_random_latents(tmp_path)
    data = LatentDataset(tmp_path, verify=False)
    cut = sorted(tmp_path.glob("*.safetensors"))[1]
    with cut.open("r+b") as f:
        f.truncate(300)
    everything = torch.arange(len(data))
    with ThreadPoolExecutor(threads) as pool, pytest.raises(LatentsError, match=f"{cut.name} has been truncated"):
        list(pool.map(lambda _: data.batch(torch.zeros_like(everything), everything), range(threads)))
