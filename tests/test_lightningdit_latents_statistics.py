"""Statistics of latents: of the channels that are asked for and usable, wherever they come from, or refused by name."""

import json

import pytest
import torch
from pydantic import ValidationError

from lightningdit.data import LatentDataset
from lightningdit.latents import LatentsError, LatentStatistics, StatisticsRecord, read_statistics
from lightningdit.latents_statistics import make_statistics
from tests.toy import write_random_latents

WANTED = r"latents of 4 channels take floats \[4\] or \[1, 4, 1, 1\]"


@pytest.fixture
def latents(tmp_path):
    """A set without a manifest, as published."""
    write_random_latents(tmp_path)
    (tmp_path / "manifest.json").unlink()
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4,), (1, 4), (4, 1, 1), (1, 4, 1, 1)])
def test_statistics_of_either_shape_and_any_real_numbers_are_read(latents, shape, dtype):
    mean, std = torch.tensor([0.5, -1.0, 0.0, 2.0]), torch.tensor([1.0, 2.0, 0.5, 1.5])
    torch.save({"mean": mean.to(dtype).view(shape), "std": std.to(dtype).view(shape)}, latents / "latents_stats.pt")
    for found in (read_statistics(latents, 4), LatentDataset(latents).statistics):
        assert torch.equal(found.mean, mean) and torch.equal(found.std, std)
        assert found.mean.dtype == found.std.dtype == torch.float32


@pytest.mark.parametrize("key", ["mean", "std"])
@pytest.mark.parametrize(
    "value",
    [
        torch.ones(1),
        torch.ones(()),
        torch.ones(0),
        torch.ones(1, 1, 1, 1),
        torch.ones(3),
        torch.ones(8),
        torch.ones(1, 3, 1, 1),
        torch.ones(1, 8, 1, 1),
        torch.ones(1, 1, 2, 2),
        torch.ones(2, 2),
        torch.ones(4, 1),
        torch.ones(1, 1, 4),
        torch.ones(4, 1, 1, 1),
        torch.ones(1, 4, 3, 2),
        torch.ones(4, dtype=torch.complex64),
        torch.ones(4, dtype=torch.bool),
        torch.ones(4, dtype=torch.int64),
    ],
    ids=lambda value: f"{value.dtype} {list(value.shape)}",
)
def test_statistics_of_another_shape_or_of_other_numbers_are_refused(latents, key, value):
    torch.save({"mean": torch.ones(4), "std": torch.ones(4), key: value}, latents / "latents_stats.pt")
    found = rf"latents_stats\.pt has {key} {value.dtype} \[{', '.join(map(str, value.shape))}\]; {WANTED}"
    for read in (LatentDataset, lambda path: read_statistics(path, 4)):
        with pytest.raises(LatentsError, match=found):
            read(latents)


@pytest.mark.parametrize("kind", [torch.nn.Parameter, torch.Tensor.requires_grad_])
def test_statistics_that_were_parameters_are_numbers(latents, kind):
    torch.save({"mean": kind(torch.ones(4)), "std": kind(torch.ones(4))}, latents / "latents_stats.pt")
    assert not LatentDataset(latents).statistics.std.requires_grad


UNUSABLE = {
    "std 0": ("std", 0.0),
    "std below 0": ("std", -1.0),
    "std not a number": ("std", float("nan")),
    "std without end": ("std", float("inf")),
    "std below float32": ("std", 1e-60),
    "std above float32": ("std", 1e60),
    "mean not a number": ("mean", float("nan")),
    "mean without end": ("mean", float("-inf")),
    "mean above float32": ("mean", -1e60),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_statistics_that_nothing_can_be_divided_by_are_refused(latents, name):
    key, value = UNUSABLE[name]
    content = {"mean": torch.zeros(4, dtype=torch.float64), "std": torch.ones(4, dtype=torch.float64)}
    content[key][2] = value
    torch.save(content, latents / "latents_stats.pt")
    with pytest.raises(LatentsError, match=r"latents_stats\.pt has .*not usable for normalisation"):
        LatentDataset(latents)


@pytest.mark.parametrize(
    "change, why",
    [
        ({"mean": [0.0]}, rf"here has mean torch\.float32 \[1\]; {WANTED}"),
        ({"std": [1.0] * 3}, rf"\[3\]; {WANTED}"),
        ({"mean": [0.0] * 8, "std": [1.0] * 8}, rf"\[8\]; {WANTED}"),
        ({"mean": [], "std": []}, rf"\[0\]; {WANTED}"),
        ({"std": [1.0, 1.0, 0.0, 1.0]}, "not usable"),
        ({"std": [1e-60] * 4}, "not usable"),
        ({"mean": [1e60] * 4}, "not usable"),
        ({"multiplier": 0.0}, "not usable"),
        ({"multiplier": -1.0}, "not usable"),
    ],
)
def test_statistics_in_json_are_of_the_channels_asked_for(change, why):
    content = {"mean": [0.0] * 4, "std": [1.0] * 4, "multiplier": 1.0}
    record = StatisticsRecord.model_validate_json(json.dumps(content | change))
    with pytest.raises(LatentsError, match=why):
        LatentStatistics.from_record(record, channels=4, source="here")
    whole = StatisticsRecord.model_validate_json(json.dumps(content))
    assert LatentStatistics.from_record(whole, channels=4, source="here").to_json() == content


@pytest.mark.parametrize(
    "change",
    [
        {"mean": "1"},
        {"mean": [["1"]]},
        {"mean": [True] * 4},
        {"std": 1.0},
        {"std": [None] * 4},
        {"multiplier": "1"},
    ],
)
def test_statistics_in_json_are_numbers(change):
    content = {"mean": [0.0] * 4, "std": [1.0] * 4, "multiplier": 1.0}
    with pytest.raises(ValidationError):
        StatisticsRecord.model_validate_json(json.dumps(content | change))


def change_manifest(directory, **statistics):
    """Edited by hand: a manifest without its checksum is read as it is."""
    path = directory / "manifest.json"
    content = json.loads(path.read_text())
    del content["checksum"]
    path.write_text(json.dumps(content | {"statistics": content["statistics"] | statistics}))


@pytest.mark.parametrize(
    "key, value",
    [
        ("mean", [0.0] * 3),
        ("std", [1.0] * 5),
        ("std", [1.0, 1.0, 1.0, -1.0]),
        ("count", 47),
        ("mean", None),
        ("std", ["1"] * 4),
    ],
)
def test_statistics_that_a_manifest_cannot_have_are_damage(tmp_path, key, value):
    write_random_latents(tmp_path)
    change_manifest(tmp_path, **{key: value})
    for latent_norm in (True, False):
        with pytest.raises(LatentsError, match=r"manifest\.json is damaged: .*statistics"):
            LatentDataset(tmp_path, latent_norm=latent_norm)


@pytest.mark.parametrize("key", ["mean", "std"])
def test_a_statistics_file_unlike_its_manifest_is_named(tmp_path, key):
    """Also where checksums are not compared, as those of large sets are not."""
    write_random_latents(tmp_path)
    found = read_statistics(tmp_path, 4)
    values = getattr(found, key).tolist()
    change_manifest(tmp_path, **{key: [*values[:3], values[3] + 1e-3]})
    for read in (lambda: LatentDataset(tmp_path, verify=False), lambda: read_statistics(tmp_path, 4)):
        with pytest.raises(LatentsError, match=r"latents_stats\.pt has other statistics than .*manifest\.json says"):
            read()
    LatentDataset(tmp_path, latent_norm=False)


@pytest.mark.parametrize("verify", [True, False])
def test_a_statistics_file_that_was_written_again_is_told_from_a_broken_one(tmp_path, verify):
    """By its numbers: the same ones in other bytes are as good."""
    write_random_latents(tmp_path)
    path, before = tmp_path / "latents_stats.pt", read_statistics(tmp_path, 4)
    kept = torch.load(path, weights_only=True)
    torch.save(kept | {"count": torch.tensor(5)}, path)
    assert LatentDataset(tmp_path, verify=verify).statistics.to_json() == before.to_json()
    torch.save(kept | {"std": kept["std"] * 1.5, "count": torch.tensor(5)}, path)
    for latent_norm in (True, False):
        with pytest.raises(LatentsError, match=r"latents_stats\.pt has other statistics than .* was written again"):
            LatentDataset(tmp_path, latent_norm=latent_norm, verify=verify)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(LatentsError, match=r"latents_stats\.pt is truncated or damaged: .* bytes, the manifest says"):
        LatentDataset(tmp_path, verify=verify)


def test_statistics_that_are_made_are_read(latents):
    before = read_statistics(latents, 4)
    (latents / "latents_stats.pt").unlink()
    make_statistics(latents)
    after = LatentDataset(latents).statistics
    assert torch.equal(after.mean, before.mean) and torch.equal(after.std, before.std)
