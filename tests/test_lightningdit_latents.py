"""The format of latents: what the writer leaves behind, finished or killed, and all that can be wrong with it."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightningdit import latents as latents_format
from lightningdit.data import LatentDataset
from lightningdit.latents import LatentsError, read_manifest
from lightningdit.latents_writer import LatentsWriter, finish
from tests.golden import G, J, close
from tests.golden.golden import ROOT
from tests.toy import write_random_latents

PUBLISHED = ROOT / "06_latents_dir"
SHARD, LATER = "latents_rank00_shard001.safetensors", "latents_rank00_shard002.safetensors"


# --- the writer


def test_written_set_reads_back(tmp_path):
    x = write_random_latents(tmp_path, counts=(7, 4, 2), ranks=2, shard_size=5)
    data = LatentDataset(tmp_path, latent_norm=False, num_classes=4, verify=True)
    n = len(x)
    plain = data.batch(torch.zeros(n), torch.arange(n), [False] * n)["x"]
    assert torch.equal(plain, x)
    assert torch.equal(data.batch(torch.zeros(n), torch.arange(n), [True] * n)["x"], x + 100)
    files = sorted(p.name for p in tmp_path.iterdir())
    shards = [f"latents_rank{rank:02d}_shard{shard:03d}.safetensors" for rank in (0, 1) for shard in (0, 1, 2)]
    assert files == [*shards, "latents_stats.pt", "manifest.json"]
    assert data.manifest.count == n == 26 and data.manifest.tokenizer["name"] == "test"


def test_written_shards_are_of_the_published_format(tmp_path):
    write_random_latents(tmp_path)
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
    x = write_random_latents(tmp_path, counts=(7, 4, 2), ranks=2, shard_size=5).double().transpose(0, 1).flatten(1)
    statistics = LatentDataset(tmp_path).statistics
    close("mean", statistics.mean, x.mean(1).float(), rtol=1e-7)
    close("std", statistics.std, x.std(1, unbiased=True).float(), rtol=1e-7)


def test_published_statistics_are_reproduced(tmp_path):
    """The published file was made of all twelve plain latents."""
    writer = LatentsWriter(tmp_path, shard_size=5)
    for path in sorted(PUBLISHED.glob("*.safetensors")):
        shard = load_file(path)
        writer.add(shard["latents"], shard["latents_flip"], shard["labels"])
    writer.close()
    finish(tmp_path)
    statistics, expected = LatentDataset(tmp_path).statistics, G("06_dataset_expected")
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


@pytest.mark.parametrize("damage", ["cut", "empty", "bit", "none"])
def test_a_damaged_shard_of_an_unfinished_extraction_is_written_again(tmp_path, caplog, damage):
    x, y = torch.randn(6, 4, 3, 2, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 4
    for directory in (tmp_path / "whole", tmp_path / "hurt"):
        writer = LatentsWriter(directory, shard_size=3)
        writer.add(x, x, y)
    shard = tmp_path / "hurt" / SHARD
    content = shard.read_bytes()
    hurt = {"cut": content[:-8], "empty": b"", "bit": content[:-3] + b"\1" + content[-2:], "none": content}[damage]
    shard.write_bytes(hurt)
    writer = LatentsWriter(tmp_path / "hurt", shard_size=3)
    assert writer.position == (6 if damage == "none" else 3)
    assert (SHARD in caplog.text) == (damage != "none")
    writer.add(x[writer.position :], x[writer.position :], y[writer.position :])
    for directory in (tmp_path / "whole", tmp_path / "hurt"):
        finish(directory, expected=6)
    whole, mended = ({p.name: p.read_bytes() for p in (tmp_path / d).iterdir()} for d in ("whole", "hurt"))
    assert mended == whole


@pytest.mark.parametrize(
    "change, why",
    [
        ({"count": 2}, "moments of"),
        ({"shape": [4, 1, 1]}, "moments of"),
        ({"shape": [3, 3, 2]}, "moments of"),
        ({"moments": {"count": 18, "mean": [0.0], "m2": [0.0]}}, "moments of"),
        ({"moments": {"count": 18, "mean": [0.0] * 4, "m2": [-1.0] * 4}}, "must be at least 0"),
        ({"file": "../x.safetensors"}, "file"),
        ({"sha256": "0"}, "sha256"),
    ],
)
def test_a_record_that_cannot_be_is_named(tmp_path, change, why):
    x = torch.ones(3, 4, 3, 2)
    LatentsWriter(tmp_path, shard_size=3).add(x, x, torch.arange(3))
    path = tmp_path / "latents_rank00_shard000.json"
    content = {key: value for key, value in json.loads(path.read_text()).items() if key != "checksum"}
    path.write_text(json.dumps(content | change))
    with pytest.raises(LatentsError, match=rf"shard000\.json is damaged: .*{why}"):
        LatentsWriter(tmp_path, shard_size=3)


@pytest.mark.parametrize("lost", [SHARD, "latents_stats.pt"])
def test_an_extraction_that_has_ended_is_looked_at_again(latents, lost):
    (latents / lost).unlink()
    for again in (lambda: LatentsWriter(latents, shard_size=5), lambda: finish(latents)):
        with pytest.raises(LatentsError, match=f"{lost} is missing though manifest.json lists it"):
            again()


@pytest.mark.parametrize(
    "change",
    [
        {"shards": 2},
        {"count": 7},
        {"files": {}},
        {"classes": ["a", "a"]},
        {"shape": [4, 3]},
    ],
)
def test_a_manifest_that_does_not_add_up_is_damaged(latents, change):
    path = latents / "manifest.json"
    content = {key: value for key, value in json.loads(path.read_text()).items() if key != "checksum"}
    if "shards" in change:
        change = {"shards": content["shards"] * 2}
    path.write_text(json.dumps(content | change))
    with pytest.raises(LatentsError, match=r"manifest\.json is damaged"):
        LatentDataset(latents)


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
        "latents_rank00_shard000.safetensors",
        "latents_rank00_shard001.safetensors",
        "latents_stats.pt",
        "manifest.json",
    ]


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
    for plain, mirrored in ((torch.nan, 0.0), (0.0, torch.inf)):
        with pytest.raises(LatentsError, match=r"shard000.*not finite"):
            LatentsWriter(tmp_path, shard_size=3, identity={"seed": 0}).add(x + plain, x + mirrored, torch.arange(3))
    with pytest.raises(LatentsError, match="no complete shard"):
        finish(tmp_path)
    write_random_latents(tmp_path / "a", identity={"seed": 0})
    with pytest.raises(LatentsError, match=r"shard000.*another extraction: {'seed': 0}, this one is {'seed': 1}"):
        LatentsWriter(tmp_path / "a", identity={"seed": 1})
    writer = LatentsWriter(tmp_path / "b", shard_size=3)
    writer.add(torch.ones(3, 4, 2, 2), torch.ones(3, 4, 2, 2), torch.arange(3), at=3)
    with pytest.raises(LatentsError, match=r"3 latents.*the first 0 without a gap; expected any number"):
        finish(tmp_path / "b")
    writer.add(torch.ones(3, 4, 2, 2), torch.ones(3, 4, 2, 2), torch.arange(3), at=0)
    with pytest.raises(LatentsError, match=r"6 latents.*the first 6 without a gap; expected 7"):
        finish(tmp_path / "b", expected=7)
    shutil.copy(tmp_path / "a" / "latents_rank00_shard000.safetensors", tmp_path / "b" / LATER)
    with pytest.raises(LatentsError, match=f"unfinished shards {LATER}"):
        finish(tmp_path / "b")


# --- what can be wrong with a directory


@pytest.fixture
def latents(tmp_path):
    write_random_latents(tmp_path)
    return tmp_path


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
    monkeypatch.setattr(latents_format, "VERIFY_BELOW", 1)
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
    with pytest.raises(LatentsError, match=r"latents_stats.pt has .*not usable"):
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
    extra = extra.rename(latents / "latents_rank01_shard000.safetensors")
    assert len(LatentDataset(latents)) == 11
    wide = torch.zeros(2, 4, 3, 3)
    save_file({"latents": wide, "latents_flip": wide.clone(), "labels": torch.arange(2)}, extra)
    with pytest.raises(LatentsError, match=r"rank01.*has latents of \(4, 3, 3\).*shard000.*\(4, 3, 2\)"):
        LatentDataset(latents)
    save_file(
        {"latents": torch.zeros(2, 4, 3, 2), "latents_flip": torch.zeros(2, 4, 3, 2).half(), "labels": torch.arange(2)},
        extra,
    )
    with pytest.raises(
        LatentsError, match=r"rank01.*latents and latents_flip, both as F32, F16, BF16, and labels as I64"
    ):
        LatentDataset(latents)
    save_file({"latents": wide, "latents_flip": wide.clone(), "labels": torch.arange(3)}, extra)
    with pytest.raises(LatentsError, match=r"rank01.*do not fit together"):
        LatentDataset(latents)


def test_no_directory_no_shards_no_checksums(tmp_path):
    with pytest.raises(LatentsError, match="is not a directory"):
        LatentDataset(tmp_path / "absent")
    with pytest.raises(LatentsError, match=r"holds no \.safetensors shard"):
        LatentDataset(tmp_path)
    with pytest.raises(LatentsError, match=r"no manifest\.json, so there are no checksums"):
        LatentDataset(PUBLISHED, verify=True)


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
