"""What is read of the files into a device's memory, in which dtype, and what is said and refused meanwhile."""

import itertools
import os

import numpy as np
import pytest
import torch

from lightningdit import device_latents
from lightningdit.data import LatentDataset
from lightningdit.device_latents import DeviceLatents, device_bytes
from lightningdit.latents import LatentsError
from tests.toy import write_random_latents

COUNT = 26


@pytest.fixture
def latents(tmp_path):
    """[26, 3, 5, 7] in 14 shards of two ranks: the directory, and the plain ones; mirror images are 100 more."""
    return tmp_path, write_random_latents(tmp_path, counts=(6, 7), ranks=2, shard_size=2, shape=(3, 5, 7))


@pytest.mark.parametrize("chunk", [1, 3 * 4 * 105, 2**25])
@pytest.mark.parametrize("world_size", [1, 4])
def test_parts_hold_every_latent_once_and_its_mirror_image(latents, monkeypatch, world_size, chunk):
    """Read one by one, by three that lie in two shards, and all at once."""
    directory, plain = latents
    monkeypatch.setattr(device_latents, "CHUNK_BYTES", chunk)
    data, halves = LatentDataset(directory), []
    for rank in range(world_size):
        part = DeviceLatents(data, "cpu", rank, world_size)
        part.load()
        halves.append(part.rows.view(2, -1, 3, 5, 7))
    assert {half.shape[1] for half in halves} <= {COUNT // world_size, -(-COUNT // world_size)}
    assert torch.equal(torch.cat(halves, 1), torch.stack([plain, plain + 100]))
    ranks, rows = part.places(np.arange(COUNT), np.arange(COUNT) % 2 == 1)
    held = torch.stack([halves[rank].flatten(0, 1)[row] for rank, row in zip(ranks, rows, strict=True)])
    assert torch.equal(held, plain + 100 * (torch.arange(COUNT) % 2).view(-1, 1, 1, 1))


def test_it_is_read_once_until_its_memory_is_given_back(latents, monkeypatch):
    directory, plain = latents
    data, reads = LatentDataset(directory, latent_flip=False), []
    monkeypatch.setattr(data, "consecutive", lambda *a, read=data.consecutive, **k: reads.append(a) or read(*a, **k))
    part = DeviceLatents(data, "cpu")
    part.load()
    part.load()
    assert reads == [(0, COUNT)] and torch.equal(part.rows, plain.flatten(1))
    part.free()
    assert part.rows is None
    part.load()
    assert len(reads) == 2 and torch.equal(part.rows, plain.flatten(1))


def test_progress_and_rate_are_said(latents, monkeypatch, caplog):
    """By a clock of 7 s a look: one before reading, one after each of the two halves, one at the end."""
    caplog.set_level("INFO", device_latents.__name__)
    monkeypatch.setattr(device_latents.time, "perf_counter", itertools.count(0.0, 7.0).__next__)
    DeviceLatents(LatentDataset(latents[0]), "cpu", 1, 2).load()
    texts = [record.getMessage() for record in caplog.records if record.name == device_latents.__name__]
    assert texts[0] == f"{latents[0]}: read 100 % of this process's part" and len(texts) == 2
    assert texts[1].startswith(
        f"{latents[0]}: 0.00 GiB of latents in float32 on cpu of each of 2 processes, read in 21.0 s"
    )


def test_a_set_that_changes_afterwards_no_longer_matters(latents):
    directory, plain = latents
    part = DeviceLatents(LatentDataset(directory), "cpu")
    part.load()
    for path in directory.glob("*.safetensors"):
        path.write_bytes(b"")
    assert torch.equal(part.rows[:COUNT], plain.flatten(1))


def test_a_shard_cut_short_before_it_is_read_is_named(latents):
    directory, _ = latents
    data = LatentDataset(directory)
    cut = sorted(directory.glob("*.safetensors"))[9]
    with cut.open("r+b") as f:
        f.truncate(900)
    first, last = (DeviceLatents(data, "cpu", rank, 2) for rank in range(2))
    first.load()
    with pytest.raises(LatentsError, match=f"{cut.name} has been truncated"):
        last.load()
    assert last.rows is None, "nothing half read is taken for a set"


def test_reads_that_come_in_pieces_are_whole(latents, monkeypatch):
    """As systems read more than 2 GiB, or when a signal comes."""
    directory, plain = latents
    preadv = os.preadv
    monkeypatch.setattr("lightningdit.data.os.preadv", lambda f, parts, at: preadv(f, [parts[0][:100]], at))
    part = DeviceLatents(LatentDataset(directory, latent_norm=False), "cpu")
    part.load()
    assert torch.equal(part.rows[:COUNT], plain.flatten(1))


def test_bytes_of_imagenet_over_eight_devices():
    """1,281,167 latents [32, 16, 16] and their mirror images: 42 GB in bfloat16."""
    sizes = dict(parts=1, mirrors=True, processes=8)
    each = device_bytes(1_281_167, (32, 16, 16), dtype=torch.bfloat16, **sizes)
    assert each == 160_146 * 2 * 8192 * 2 == pytest.approx(42e9 / 8, rel=0.01)
    assert device_bytes(1_281_167, (32, 16, 16), dtype=torch.float32, **sizes) == 2 * each
    sizes |= dict(parts=2, mirrors=False)
    assert device_bytes(1_281_167, (32, 16, 16), dtype=torch.bfloat16, **sizes) == each
