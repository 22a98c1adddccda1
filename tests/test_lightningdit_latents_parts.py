"""A set written by several processes: killed before any change of a file, and finished by another number of them."""

import itertools
import json
import os
import random

import pytest
import torch

from common.records import write_checksummed
from lightningdit import latents, latents_writer
from lightningdit.data import LatentDataset
from lightningdit.latents import SHARD_NAME, LatentsError, numbered_shard
from lightningdit.latents_parts import FinishedShard, begin, complete_set, keep_intact
from lightningdit.latents_writer import LatentsWriter, finish

COUNT, SHARD, BATCH = 23, 6, 2
IDENTITY = {"images": COUNT}


class Killed(BaseException):
    """In place of SIGKILL."""


@pytest.fixture(autouse=True, scope="module")
def _no_waiting_for_the_disk():
    """Here processes end, and no machine does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


def rows(count: int = COUNT) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 4, 3, 2, generator=generator) * torch.arange(1, 5).view(4, 1, 1)
    return x, x.flip(-1), torch.arange(count) % 5


def shared(directory, world_size, save_seconds=300.0, order=None) -> list[LatentsWriter]:
    """Writers that have added what each of the processes is to write of what is missing, one after the other."""
    found = keep_intact(directory, begin(directory, IDENTITY))
    there = {row for record in found for row in range(*record.rows)}
    bounds = [
        (a, min(a + BATCH, s + SHARD, COUNT))
        for s in range(0, COUNT, SHARD)
        for a in range(s, min(s + SHARD, COUNT), BATCH)
    ]
    missing = [bound for bound in bounds if not set(range(*bound)) <= there]
    writers, content = [], rows()
    for rank in range(world_size):
        options = {"shard_size": SHARD, "identity": IDENTITY, "total": COUNT, "save_seconds": save_seconds}
        writers.append(LatentsWriter(directory, found=found, **options))
        first, last = (len(missing) * r // world_size for r in (rank, rank + 1))
        for a, b in missing[first:last]:
            writers[-1].add(*(value[a:b] for value in content), at=a)
        writers[-1].close()
    return writers


def write(directory, world_size, save_seconds=300.0) -> None:
    if complete_set(directory, IDENTITY) is None:
        found = keep_intact(directory, begin(directory, IDENTITY))
        writers = shared(directory, world_size, save_seconds)
        records = [*found, *(record for writer in writers for record in writer.records)]
        for rank, writer in enumerate(writers):
            writer.merge(records, rank=rank, world_size=world_size)
        records = [*found, *(record for writer in writers for record in writer.records)]
        finish(directory, records, expected=COUNT)
    finish(directory)


def content(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a writer that knows nothing of others leaves."""
    directory = tmp_path_factory.mktemp("whole")
    writer = LatentsWriter(directory, shard_size=SHARD, identity=IDENTITY)
    writer.add(*rows())
    writer.close()
    finish(directory, expected=COUNT)
    return content(directory)


@pytest.mark.parametrize("save_seconds", [0.0, 300.0])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 12, 30])
def test_any_number_of_processes_writes_the_same_files(tmp_path, whole, world_size, save_seconds):
    write(tmp_path, world_size, save_seconds)
    assert content(tmp_path) == whole


def killed_at(monkeypatch, moment: int) -> None:
    """The `moment`-th change of the disk, and what would follow, does not come to pass."""
    counts = itertools.count(1)
    for name in ("replace", "unlink"):
        real = getattr(os, name)

        def counted(*args, real=real, **kwargs):
            if next(counts) >= moment:
                raise Killed
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, counted)


def kept_rows(directory) -> set[int]:
    """The rows that count as written."""
    if (directory / "manifest.json").exists():
        return set(range(COUNT))
    records = [json.loads(path.read_text()) for path in directory.glob("latents*.json")]
    there = [record for record in records if (directory / record["file"]).exists()]
    return {row for record in there for row in range(record["start"], record["start"] + record["count"])}


@pytest.mark.parametrize(("before", "after", "save_seconds"), [(3, 2, 300.0), (2, 3, 0.0), (1, 2, 0.0)])
def test_a_kill_before_any_change_of_the_disk_loses_nothing_of_the_set(
    tmp_path, whole, monkeypatch, before, after, save_seconds
):
    kept = []
    for moment in itertools.count(1):
        directory = tmp_path / str(moment)
        with monkeypatch.context() as patch:
            killed_at(patch, moment)
            try:
                write(directory, before, save_seconds)
                break
            except Killed:
                pass
        if directory.exists() and not (directory / "manifest.json").exists():
            with pytest.raises(LatentsError, match=r"is unfinished|holds no \.safetensors"):
                LatentDataset(directory, latent_norm=False)
        kept.append(len(kept_rows(directory)))
        write(directory, after, save_seconds)
        assert content(directory) == whole, moment
    assert kept == sorted(kept) and kept[-1] == COUNT, "what was once written is never written again"
    assert moment > 20 and content(directory) == whole


def test_a_set_that_is_killed_many_times_by_turns_of_numbers_is_the_same(tmp_path, whole, monkeypatch):
    for seed in range(10):
        rng, directory = random.Random(seed), tmp_path / str(seed)
        for world_size in (3, 2, 4, 1, 5):
            with monkeypatch.context() as patch:
                killed_at(patch, rng.randint(2, 14))
                try:
                    write(directory, world_size, rng.choice([0.0, 300.0]))
                except Killed:
                    continue
        write(directory, 2)
        assert content(directory) == whole


def test_a_kill_costs_what_was_encoded_since_the_last_save(tmp_path, monkeypatch):
    """Complete shards and, after `save_seconds`, parts of one are kept."""
    clock = itertools.count(0, 10)
    monkeypatch.setattr("lightningdit.latents_writer.time.monotonic", lambda: next(clock))
    for seconds, kept in ((1000.0, 6), (25.0, 10)):
        directory = tmp_path / str(seconds)
        writer = LatentsWriter(directory, shard_size=SHARD, identity=IDENTITY, total=COUNT, save_seconds=seconds)
        for a in range(0, 10, BATCH):
            writer.add(*(value[a : a + BATCH] for value in rows()))
        assert LatentsWriter(directory, shard_size=SHARD, identity=IDENTITY, total=COUNT).position == kept


@pytest.mark.parametrize("damage", ["cut", "bit", "gone"])
@pytest.mark.parametrize("suffix", [".part", ".safetensors"])
def test_what_is_damaged_is_written_again(tmp_path, whole, caplog, damage, suffix):
    shared(tmp_path, 3)
    path = sorted(tmp_path.glob(f"latents*{suffix}"))[-1]
    before = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(before[:-8] if damage == "cut" else before[:-3] + bytes([before[-3] ^ 1]) + before[-2:])
    caplog.clear()
    write(tmp_path, 2)
    assert content(tmp_path) == whole
    assert damage == "gone" or path.name in caplog.text


def test_rows_that_are_missing_when_parts_are_joined_are_named(tmp_path):
    writers = shared(tmp_path, 3)
    records = [record for writer in writers for record in writer.records]
    lacking = [record for record in records if record.rows != (6, 8)]
    assert len(lacking) == len(records) - 1
    with pytest.raises(LatentsError, match=r"lacks rows of latents_rank00_shard001\.safetensors, 6 and later: run the"):
        writers[0].merge(lacking)
    with pytest.raises(LatentsError, match=r"holds 11 latents .* the first 6 without a gap; expected 23 of one shape"):
        finish(tmp_path, expected=COUNT)


# --- names


def test_names_of_many_shards_sort_as_their_numbers(tmp_path, monkeypatch):
    names = [numbered_shard(number) for number in (*range(3000), 9_999, 10_000, 98_999, 99_000, 99_999)]
    assert names == sorted(names) and all(SHARD_NAME.fullmatch(name) for name in names)
    for module in (latents, latents_writer):
        monkeypatch.setattr(module, "SHARDS_PER_RANK", 2)
    write(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.glob("*.safetensors"))[1:3] == [
        "latents_rank00_shard001.safetensors",
        "latents_rank01_shard000.safetensors",
    ]
    for name in ("manifest.json", "nothing more"):
        data = LatentDataset(tmp_path, latent_norm=False, latent_flip=False)
        assert torch.equal(data.batch([0] * COUNT, range(COUNT))["x"], rows()[0])
        (tmp_path / name).unlink(missing_ok=True)
    with pytest.raises(LatentsError, match="100,001 latents in shards of 1: at most 100,000 shards"):
        LatentsWriter(tmp_path / "x", shard_size=1, total=100_001)


# --- directories of others


def test_another_extraction_is_refused_by_what_differs(tmp_path):
    shared(tmp_path / "begun", 3)
    write(tmp_path / "complete", 1)
    for directory in (tmp_path / "begun", tmp_path / "complete"):
        before = content(directory)
        with pytest.raises(
            LatentsError, match=r"another extraction: {'images': 23}, this one is {'images': 24}\. Give"
        ):
            LatentsWriter(directory, shard_size=SHARD, identity={"images": 24})
        assert content(directory) == before


def as_earlier_versions_began(directory, processes: int) -> None:
    """The records of an earlier version do not say where a shard begins."""
    for path in directory.glob("*.json"):
        record = json.loads(path.read_text())
        del record["checksum"], record["start"]
        write_checksummed(path, record | {"identity": IDENTITY | {"processes": processes}})


def test_what_an_earlier_version_began_is_refused_with_what_to_do(tmp_path):
    writer = LatentsWriter(tmp_path, shard_size=SHARD, identity=IDENTITY)
    writer.add(*(value[:6] for value in rows()))
    assert [type(record) for record in writer.records] == [FinishedShard]
    as_earlier_versions_began(tmp_path, processes=2)
    before = content(tmp_path)
    with pytest.raises(LatentsError, match=r"an earlier version began.*Finish it with that version, or delete the dir"):
        LatentsWriter(tmp_path, shard_size=SHARD, identity=IDENTITY)
    assert content(tmp_path) == before
