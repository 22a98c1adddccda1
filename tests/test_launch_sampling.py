"""Sampling as a function of (seed, index), in float32 on a CPU: batches, processes, threads, and interruptions."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from launch import sample
from launch.runtime.processes import Processes
from launch.sampling import produce, units
from launch.training import engine
from lightningdit.config import SampleConfig
from lightningdit.cost import forward_bytes_per_image
from lightningdit.model import LightningDiT
from tests.tiny_weights import a_run, write_weights

CPU = torch.device("cpu")
FORMATS = ("npz", "png", "webp", "latents")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("weights"))


def content(directory: Path) -> dict[str, bytes]:
    """All files that a finished run leaves."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def make(weights, output: Path, *, rows=None, threads=1, **keys) -> dict[str, bytes]:
    """Sample in this process; rows: the number of processes, of which each does its share here, one after the other."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        sample.generate(a_run(weights, **keys), output)
    finally:
        torch.set_num_threads(before)
    return content(output)


class Alone(Processes):
    """One of several processes, run one after the other: it waits for none, and the last one joins all parts."""

    def on_main(self, function):
        return function()

    def raise_on_all(self, error):
        if error is not None:
            raise error

    def barrier(self) -> None:
        pass


def shares(weights, output: Path, world_size: int, monkeypatch, **keys) -> dict[str, bytes]:
    """Sample by the ranges of `world_size` processes, the last first; what remains is nothing."""
    with monkeypatch.context() as patch:
        patch.setattr(produce, "_finish", lambda *args: None)
        for rank in reversed(range(world_size)):
            patch.setattr(engine, "start_processes", lambda rank=rank, **_: Alone(rank, world_size, CPU))
            patch.setattr(produce, "_already_there", lambda job: False)
            patch.setattr(produce, "rows_done", lambda total, there: np.zeros(total, bool))
            sample.generate(a_run(weights, **keys), output)
    return make(weights, output, **keys)


@pytest.mark.parametrize("guided", [True, False])
def test_batches_processes_and_threads_change_no_bit(weights, tmp_path, monkeypatch, guided):
    """Of a last unit that is not full, too: the network is called with whole units, each by one thread.

    Bits alone would not tell on every machine: some round alike at the sizes of this network.
    """
    forward, calls = LightningDiT.forward, set()

    def seen(self, x, *arguments, **more):
        calls.add((len(x), torch.get_num_threads()))
        return forward(self, x, *arguments, **more)

    monkeypatch.setattr(LightningDiT, "forward", seen)
    keys = {"fid_num": 21, "cfg_scale": 2.0 if guided else 1.0, "format": "latents"}
    monkeypatch.setattr(units, "UNIT", 8)
    whole = make(weights, tmp_path / "whole", per_proc_batch_size=None, **keys)
    assert whole.keys() >= {"latents_rank00_shard000.safetensors", "manifest.json", "samples.json"}
    for size, threads in ((1, 1), (9, 2), (100, 3)):
        again = make(weights, tmp_path / f"batches of {size}", per_proc_batch_size=size, threads=threads, **keys)
        assert again == whole, (size, threads)
    for count in (2, 3):
        assert shares(weights, tmp_path / f"{count} processes", count, monkeypatch, **keys) == whole, count
    assert calls == ({(8, 1), (16, 1)} if guided else {(8, 1)})


def test_a_sample_does_not_depend_on_how_many_there_are(weights, tmp_path):
    """Bit for bit; with dopri5, too, whose steps are a unit's: the last one is filled up with what would follow."""
    keys = {"format": "latents", "sampling_method": "dopri5", "cfg_scale": 1.0}
    for count in (3, 18):
        make(weights, tmp_path / str(count), fid_num=count, **keys)
    few, many = (load_file(tmp_path / name / "latents_rank00_shard000.safetensors")["latents"] for name in ("3", "18"))
    assert torch.equal(few, many[:3]) and len(many) == 18


def test_samples_that_an_earlier_version_described_are_there(weights, tmp_path, capsys):
    """It knew one format, and took the number at once for something that samples depend on."""
    whole = make(weights, tmp_path, fid_num=3)
    facts = json.loads(whole["samples.json"])
    settings = facts["settings"] | {"per_proc_batch_size": 4}
    earlier = {key: value for key, value in facts.items() if key not in ("format", "label_counts")}
    (tmp_path / "samples.json").write_text(json.dumps(earlier | {"settings": settings}))
    make(weights, tmp_path, fid_num=3, per_proc_batch_size=2)
    assert "is already there" in capsys.readouterr().out
    (tmp_path / "samples.json").write_text(json.dumps(earlier | {"settings": settings | {"seed": 9}}))
    with pytest.raises(ValueError, match="other settings"):
        make(weights, tmp_path, fid_num=3)


def test_units_batches_and_shares():
    """Every missing sample once, by one process, in batches of whole units, which are even."""
    done = units.rows_done(21, [(0, 4), (9, 11)])
    assert np.flatnonzero(~done).tolist() == [*range(4, 9), *range(11, 21)]
    assert units.missing_units(done, 4).tolist() == [1, 2, 3, 4, 5]
    assert units.missing_units(units.rows_done(21, [(0, 21)]), 4).tolist() == []
    shared = [units.share_of(np.array([1, 2, 3, 4, 5]), rank, 3).tolist() for rank in range(3)]
    assert shared == [[1], [2, 3], [4, 5]]
    assert list(units.batches_of([1, 2, 3, 4, 5], 4, 12, 21)) == [(4, 12), (12, 21)]
    assert list(units.batches_of([0, 2, 3], 4, 4, 14)) == [(0, 4), (8, 12), (12, 14)]
    assert list(units.batches_of(range(10), 1, 4, 10)) == [(0, 3), (3, 6), (6, 10)]
    assert units.rows_missing((4, 12), done) == [(4, 9), (11, 12)] and units.rows_missing((0, 4), done) == []


def test_a_batch_is_as_large_as_memory_allows_or_as_it_is_told(weights):
    config = a_run(weights).network()
    size = {"weight_bytes": 2, "workers": 3}
    assert units.batch_size(None, CPU, config, 256, **size) == 3 * units.UNIT
    assert units.batch_size(units.UNIT + 1, CPU, config, 256, **size) == 2 * units.UNIT
    assert units.batch_size(5, torch.device("cuda"), config, 256, **size) == 5
    one = 2 * forward_bytes_per_image(config, weight_bytes=2) + 3 * 4 * 256**2
    decoding = units.DECODED * 256**2 * units.DECODED_PIXEL
    assert units.fitting(int((decoding + 10.5 * one) / units.SHARE_OF_MEMORY), config, 256, 2) == 10
    assert units.fitting(0, config, 256, 2) == 1
    assert units.fitting(10**15, config, 256, 2) == units.MOST_TOKENS // (2 * config.num_tokens)
    assert [units.decoded_at_once(CPU, side) for side in (8, 128, 256, 512)] == [16, 16, 4, 1]
    assert SampleConfig().per_proc_batch_size is None


@pytest.mark.parametrize("format", FORMATS)
def test_what_was_killed_goes_on_and_leaves_the_same_files(weights, tmp_path, monkeypatch, format):
    """Killed while a part is written, with another number of samples at once and of processes afterwards."""
    keys = {"fid_num": 21, "cfg_scale": 1.0, "format": format}
    monkeypatch.setattr(units, "UNIT", 4)
    whole = make(weights, tmp_path / "whole", **keys)
    write, calls = produce.Parts.write, []

    def dies(self, rows, arrays):
        calls.append(rows)
        if len(calls) == 3:
            path = self.path(rows)
            path.with_name(f".{path.name}.tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        write(self, rows, arrays)

    monkeypatch.setattr(produce.Parts, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        make(weights, tmp_path / "cut", per_proc_batch_size=4, **keys)
    assert not (tmp_path / "cut" / "samples.json").exists() and len(calls) == 3
    monkeypatch.setattr(produce.Parts, "write", write)
    assert make(weights, tmp_path / "cut", per_proc_batch_size=9, **keys) == whole
    assert make(weights, tmp_path / "cut", per_proc_batch_size=1, **keys) == whole  # it is there
