"""The loader's bench: what is compared, what a row says, on tiny sets and with a clock that tells invented times."""

import json
from itertools import islice

import numpy as np
import pytest
import torch

from bench import data as bench_data
from bench.data import BATCHES, WAYS, FilePerSample, LoaderComparison, LoaderJob, disagreement
from bench.measure import rows
from bench.workloads.latents import write_latents
from launch.training.device_batches import DeviceBatches
from lightningdit.data import LatentDataset
from lightningdit.device_latents import DeviceLatents
from lightningdit.latents_writer import LatentsWriter, finish
from tests.golden.golden import ROOT

PUBLISHED = ROOT / "06_latents_dir"


class Told:
    """A device whose providers, in the order they come, take the seconds it was told; every iteration is really run."""

    kind = "cpu"
    l2_bytes = 0

    def __init__(self, *seconds: float):
        self.told, self.known = seconds, {}

    def seconds(self, iteration, count):
        each = self.known.setdefault(iteration, self.told[len(self.known) % len(self.told)])
        iteration()
        return [each] * count


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    directory = tmp_path_factory.mktemp("latents")
    write_latents(directory, (32, 16, 16), 42, 1000, shard_size=11)
    return LatentDataset(directory)


def test_the_set_made_for_a_run(latents):
    assert len(latents) == 42 and latents.shape == (32, 16, 16) and latents.labels.tolist() == list(range(42))
    assert len(list(latents.path.glob("*.safetensors"))) == 4
    plain, mirrored = (latents.batch([0] * 42, range(42), flips=[flip] * 42)["x"] for flip in (False, True))
    torch.testing.assert_close(plain.mean((0, 2, 3)), torch.zeros(32), atol=1e-3, rtol=0)
    assert len(plain.unique(dim=0)) == 42 and not torch.equal(plain, mirrored)


def test_both_ways_give_the_same_numbers(latents):
    for data in (latents, LatentDataset(PUBLISHED), LatentDataset(PUBLISHED, latent_multiplier=0.5)):
        published = FilePerSample(data)
        assert len(published) == len(data)
        assert disagreement(data, published) == ""


class OneBit(FilePerSample):
    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x * (1 + 2**-23), y


class OtherLabel(FilePerSample):
    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x, y + 1


class NextRow(FilePerSample):
    def __getitem__(self, index):
        return super().__getitem__((index + 1) % len(self))


class OtherDraw(FilePerSample):
    def __getitem__(self, index):
        np.random.uniform()
        return super().__getitem__(index)


@pytest.mark.parametrize(("wrong", "what"), [(OneBit, "x"), (OtherLabel, "y"), (NextRow, "x and y"), (OtherDraw, "x")])
def test_a_wrong_bit_label_row_or_mirroring_is_a_disagreement(latents, wrong, what):
    assert disagreement(latents, wrong(latents)).startswith(f"{what} differ")


def test_latents_on_the_device_that_are_not_the_loaders_have_no_time(latents, monkeypatch):
    assert bench_data.difference_on_device(DeviceBatches(DeviceLatents(latents, "cpu")), latents, 8) == ""
    rounded = LatentDataset(latents.path, latent_dtype=torch.bfloat16)
    monkeypatch.setattr(bench_data, "DeviceLatents", lambda data, device: DeviceLatents(rounded, device))
    comparison = LoaderComparison(Told(), rows.Log("cpu"), None)
    ready = comparison.prepare(LoaderJob(latents, 8, (0,)), "latents-device-0", "")
    assert not ready.iterations and ready.value == "x differ from the loader's"
    assert comparison.wrong(None, {"latents-device-0": ready.value}, "") == {"latents-device-0": ready.value}


@pytest.mark.parametrize("workers", [0, 2])
def test_every_provider_reads_whole_epochs_in_an_order_of_its_own(latents, workers):
    for name, (_, _, way) in WAYS.items():
        stream = way(latents, 14, workers)
        labels = [(batch["y"] if isinstance(batch, dict) else batch[1]) for batch in islice(stream, 6)]
        first, second = torch.cat(labels[:3]), torch.cat(labels[3:])
        assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(42)), name
        assert first.tolist() != second.tolist() != list(range(42))
        del stream


def test_what_a_row_says(latents, tmp_path, capsys):
    """Iterations of 16 × 8 latents in 1, 2, 8, 4 and 0.5 ms."""
    out = tmp_path / "rows.jsonl"
    comparison = LoaderComparison(Told(0.001, 0.002, 0.008, 0.004, 0.0005), rows.Log("cpu", out), None)
    got = comparison.run(LoaderJob(latents, 8, (0, 1)))
    assert [(row["provider"], row["workers"]) for row in got] == [
        ("latents", 0),
        ("latents", 1),
        ("file-per-sample", 0),
        ("file-per-sample", 1),
        ("latents-device", 0),
    ]
    assert [row["latents_per_second"] for row in got] == pytest.approx([128_000, 64_000, 16_000, 32_000, 256_000])
    assert [row["memory"] for row in got] == ["cpu"] * 5
    first = got[0]
    assert first["p20_us"] == first["p50_us"] == first["p80_us"] == pytest.approx(1000 / 128) and first["spread"] == 0
    ratios = {"latents-1": 2, "file-per-sample-0": 8, "file-per-sample-1": 4, "latents-device-0": 0.5}
    assert first["times_faster_than"] == pytest.approx(ratios)
    assert (first["bytes"], first["calls"], first["kind"], first["status"]) == (32768, BATCHES * 8, "data", "ok")
    assert first["cpu"] and first["cores"] >= 1 and first["load"] >= 0
    assert list(rows.read(out, "cpu")) == json.loads(json.dumps(got))
    comparison.conclude(got)
    printed = capsys.readouterr().out
    assert "best against best: 4.0x" in printed and "in memory of cpu: 2.0x the loader's best" in printed
    assert "128,000" in printed and f"{first['cores']} cores" in printed


def test_quantiles_of_a_time_are_those_of_the_rate_the_other_way_round():
    shown = {"latents_per_second": 3e4, "bytes": 100, "p20_us": 20, "p80_us": 50}
    assert "20,000 to 50,000" in LoaderComparison(None, None, None).measured(shown)


def test_no_time_beside_wrong_numbers(latents, monkeypatch, capsys):
    monkeypatch.setattr(bench_data, "disagreement", lambda data, published: "x differ")
    comparison = LoaderComparison(Told(), rows.Log("cpu"), None)
    got = comparison.run(LoaderJob(latents, 8, (0,)))
    assert [(row["status"], row["reason"]) for row in got] == [("incorrect", "x differ")] * 3
    assert not any("p50_us" in row or "latents_per_second" in row for row in got)
    comparison.conclude(got)
    printed = capsys.readouterr().out
    assert printed.count("incorrect: x differ") == 3 and "best" not in printed
    assert bench_data.main(["--samples", "4", "--workers", "0"]) == 1


def test_from_the_command_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_data, "HostDevice", lambda: Told(0.001, 0.01, 0.001))
    out = tmp_path / "rows.jsonl"
    both = ["--batch-size", "2", "--workers", "0", "--out", str(out)]
    assert bench_data.main(["--samples", "20", *both]) == bench_data.main(["--directory", str(PUBLISHED), *both]) == 0
    assert [row["bytes"] for row in rows.read(out, "cpu")] == [32768] * 3 + [256] * 3
    assert capsys.readouterr().out.count("best against best: 10.0x") == 2 and PUBLISHED.is_dir()


@pytest.mark.parametrize(
    ("option", "value"), [("samples", "0"), ("batch-size", "-1"), ("workers", "-1"), ("workers", "a")]
)
def test_what_is_refused(option, value, capsys):
    with pytest.raises(SystemExit):
        bench_data.main([f"--{option}", value])
    assert f"--{option}: '{value}' is no whole number" in capsys.readouterr().err


@pytest.mark.parametrize("options", [{"store": "moments"}, {"dtype": "float16"}])
def test_latents_that_the_published_way_does_not_read_are_not_compared(tmp_path, capsys, options):
    writer = LatentsWriter(tmp_path, **options)
    x = torch.arange(48.0).view(3, 4, 2, 2)
    writer.add(x, x, torch.arange(3))
    writer.close()
    finish(tmp_path)
    assert bench_data.main(["--directory", str(tmp_path)]) == 2
    assert f"{tmp_path} stores" in (said := capsys.readouterr().out) and "latents in float32 alone" in said
