"""Finding the shards of a latents directory and gaps between them; names of the classes."""

import json
import logging
import re
import shutil

import pytest
import torch

from lightningdit.config import DataConfig
from lightningdit.data import LatentDataset
from lightningdit.latents import LatentsError, shards_of
from lightningdit.latents_statistics import make_statistics
from lightningdit.latents_writer import LatentsWriter, finish
from tests.toy import write_latents, write_random_latents


def shard(rank, number):
    return f"latents_rank{rank:02d}_shard{number:03d}.safetensors"


def make_set(directory, names) -> None:
    """A set as the published extraction leaves it, of 5 latents in each of these shards."""
    write_random_latents(directory / "source")
    directory.mkdir(exist_ok=True)
    for name in names:
        shutil.copy(directory / "source" / shard(0, 0), directory / name)
    shutil.copy(directory / "source" / "latents_stats.pt", directory)
    shutil.rmtree(directory / "source")


@pytest.mark.parametrize(
    "names",
    [
        [shard(0, 0)],
        [shard(0, 0), shard(0, 1), shard(0, 2)],
        [shard(0, 0), shard(0, 1), shard(1, 0), shard(2, 0)],
        [shard(rank, 0) for rank in range(101)],  # three digits sort before two
        [shard(0, number) for number in range(1001)],
    ],
    ids=len,
)
def test_sets_without_gaps_are_whole(tmp_path, names):
    for name in names:
        (tmp_path / name).touch()
    assert [path.name for path in shards_of(tmp_path, None)] == sorted(names)


@pytest.mark.parametrize(
    "names, missing",
    [
        ([shard(0, 1)], shard(0, 0)),
        ([shard(0, 0), shard(0, 2)], shard(0, 1)),
        ([shard(1, 0)], shard(0, 0)),
        ([shard(0, 0), shard(2, 0)], shard(1, 0)),
        ([shard(0, 0), shard(1, 1)], shard(1, 0)),
        ([shard(0, 0), shard(0, 1), shard(0, 2), shard(1, 0), shard(1, 2)], shard(1, 1)),
        ([shard(0, 0), shard(99999999999, 99999999999)], shard(1, 0)),
        ([shard(0, 0), shard(0, 2), "latents_rank00_shard001 (1).safetensors"], shard(0, 1)),
    ],
)
def test_a_shard_that_is_missing_without_a_manifest_is_named(tmp_path, names, missing):
    make_set(tmp_path, names)
    for read in (LatentDataset, remake_statistics):
        with pytest.raises(LatentsError, match=rf"/{re.escape(missing)} is missing"):
            read(tmp_path)


def remake_statistics(directory):
    (directory / "latents_stats.pt").unlink(missing_ok=True)
    make_statistics(directory)


OTHERS = [
    "latents_rank00_shard000 (1).safetensors",
    "latents_rank00_shard000(1).safetensors",
    "latents_rank00_shard000 copy.safetensors",
    "Copy of latents_rank00_shard000.safetensors",
    "latents_rank00_shard000_1.safetensors",
    "latents_rank00_shard1.safetensors",
    "latents_rank0_shard001.safetensors",
    "latents_rank00_shard0001.safetensors",
    "latents_rank001_shard000.safetensors",
    "latents_rank00_shard٠٠١.safetensors",
    "LATENTS_rank00_shard001.safetensors",
    "._latents_rank00_shard001.safetensors",
    "model.safetensors",
    "latents_rank00_shard001\n.safetensors",
    "latents_rank-1_shard000.safetensors",
]


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize("name", OTHERS)
def test_a_file_of_another_name_is_left_out_and_said(tmp_path, caplog, name, manifest):
    caplog.set_level(logging.INFO)
    x = write_random_latents(tmp_path)
    if not manifest:
        (tmp_path / "manifest.json").unlink()
    shutil.copy(tmp_path / shard(0, 0), tmp_path / name)
    data = LatentDataset(tmp_path, latent_norm=False, latent_flip=False)
    assert torch.equal(data.batch(torch.zeros(8), torch.arange(8))["x"], x) and len(data) == 8
    assert "left out " + name.replace("\n", r"\n") + ", not named as shards are" in caplog.text
    (tmp_path / shard(0, 0)).unlink()
    with pytest.raises(LatentsError, match=rf"{shard(0, 0)} is missing"):
        LatentDataset(tmp_path)


@pytest.mark.parametrize("name", OTHERS)
def test_files_of_other_names_alone_are_no_set(tmp_path, name):
    make_set(tmp_path, [name])
    with pytest.raises(
        LatentsError, match=r"holds no \.safetensors shard with a name such as latents_rank00_shard000\.safetensors"
    ):
        LatentDataset(tmp_path)


def test_a_duplicate_does_not_keep_an_extraction_from_its_end(tmp_path):
    x, y = torch.ones(6, 4, 3, 2), torch.arange(6)
    writer = LatentsWriter(tmp_path, shard_size=3)
    writer.add(x, x, y)
    writer.close()
    for suffix in (".safetensors", ".json"):
        source = (tmp_path / shard(0, 0)).with_suffix(suffix)
        shutil.copy(source, tmp_path / f"latents_rank00_shard000 (1){suffix}")
    assert finish(tmp_path, expected=6).count == 6


# --- classes


def name_classes(directory, classes):
    path = directory / "manifest.json"
    content = json.loads(path.read_text())
    del content["checksum"]
    path.write_text(json.dumps(content | {"classes": classes}))


@pytest.mark.parametrize("classes", [[], ["a"], ["a", "b"]])
def test_labels_without_a_name_are_refused(tmp_path, classes):
    write_latents(tmp_path)  # labels 0, 1 and 2
    name_classes(tmp_path, classes)
    why = rf"shard000\.safetensors has labels from 0 to 2, but manifest\.json has names of {len(classes)} classes"
    with pytest.raises(LatentsError, match=why):
        LatentDataset(tmp_path, num_classes=3)


@pytest.mark.parametrize("classes", ["abc", {"a": 0, "b": 1, "c": 2}, [0, 1, 2], [["a"], ["b"]], ["a", "b", "a"]])
def test_names_of_classes_are_texts_and_distinct(tmp_path, classes):
    write_latents(tmp_path)
    name_classes(tmp_path, classes)
    with pytest.raises(LatentsError, match=r"manifest\.json is damaged: classes"):
        LatentDataset(tmp_path)


@pytest.mark.parametrize(
    "name, shown",
    [
        ("\x1b[2J\x1b]0;x\x07", r"\x1b[2J\x1b]0;x\x07"),
        ("\x9b2J", r"\x9b2J"),
        ("two\nlines", r"two\nlines"),
        ("\x08\x7f\0", r"\x08\x7f\x00"),
        ("a\u2028b", r"a\u2028b"),
        ("été 猫", "été 猫"),
    ],
)
def test_what_a_terminal_would_obey_in_names_is_shown_as_escapes(tmp_path, caplog, name, shown):
    caplog.set_level(logging.INFO)
    write_latents(tmp_path, classes=[name, "b", "c", "d"])
    latents = LatentDataset.from_config(DataConfig(data_path=str(tmp_path), num_classes=4), seed=0)
    assert f"20 latents of 4 classes ({shown}, b, c, …)" in caplog.text
    assert latents.classes == (name, "b", "c", "d"), "they are kept as they are"
