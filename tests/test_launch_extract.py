"""Extraction: what a latents directory holds, that it goes on after a kill, and what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import kernels
from common.records import write_checksummed
from common.seeds import generator
from launch import extract as program
from launch.config import VavaeRun
from launch.extract import extract
from launch.extraction.encoding import batch_bounds, share_of
from launch.runtime.processes import Processes
from launch.runtime.run_lock import DirectoryInUseError, lock_directory
from lightningdit.data import LatentDataset
from lightningdit.latents import LatentsError
from tests import children
from vavae.config import AutoencoderConfig, DataConfig, LossConfig
from vavae.data import ImageDataset
from vavae.seeds import EXTRACTION_NOISE
from vavae.task import build_networks
from vavae.weights import fingerprint, load_tokenizer, write_export

OPS = kernels.select("reference")
TINY = {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (), "z_channels": 4, "embed_dim": 4}
MODEL = AutoencoderConfig(**TINY, resolution=16)
COUNT, SHARD, FIRST = 11, 4, "latents_rank00_shard000.safetensors"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """11 images of three classes and of several sizes, and the weights of an untrained tokenizer."""
    root = tmp_path_factory.mktemp("extract")
    rng = np.random.default_rng(0)
    for index in range(COUNT):
        (root / f"images/{index % 3}").mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (16 + index, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"images/{index % 3}/{index:02d}.png")
    network = build_networks(MODEL, LossConfig(disc_weight=0.0, use_vf=False), OPS, 0, None)["autoencoder"]
    write_export(root / "vae.safetensors", network.state_dict(), MODEL, step=0)
    return root


def run_of(files, **fields) -> VavaeRun:
    data = {"data_path": str(files / "images"), "image_size": 16, "num_workers": 0, **fields.pop("data", {})}
    return VavaeRun.model_validate(
        {
            "preset": "default",
            "ckpt_path": str(files / "vae.safetensors"),
            "model": MODEL.model_dump(),
            "loss": {"use_vf": False, "perceptual": "none"},
            "data": data,
            "kernels": "reference",
            **fields,
        }
    )


def extracted(files, output, **fields) -> dict[str, torch.Tensor]:
    extract(run_of(files, **fields), output, batch_size=3, least_psnr=0.0, shard_size=SHARD)
    shards = [load_file(path) for path in sorted(output.glob("*.safetensors"))]
    return {key: torch.cat([shard[key] for shard in shards]) for key in shards[0]}


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    output = tmp_path_factory.mktemp("latents") / "set"
    return output, extracted(files, output)


def test_one_sample_of_each_image_and_of_its_mirror_image(files, whole):
    output, latents = whole
    assert [len(load_file(p)["labels"]) for p in sorted(output.glob("*.safetensors"))] == [4, 4, 3]
    model = load_tokenizer(files / "vae.safetensors", OPS)
    images = ImageDataset(DataConfig(data_path=str(files / "images"), image_size=16, crop="center"), seed=0)
    batch = images.batch(torch.zeros(COUNT, dtype=torch.int64), torch.arange(COUNT))
    assert torch.equal(latents["labels"], batch["y"])
    draws = torch.stack([torch.randn(2, 4, 8, 8, generator=generator(0, EXTRACTION_NOISE, i)) for i in range(COUNT)])
    sides = {"latents": batch["image"], "latents_flip": batch["image"].flip(-1)}
    for noise, (key, x) in zip(draws.unbind(1), sides.items(), strict=True):
        posterior = model.encode(x)
        torch.testing.assert_close(latents[key], posterior.mean + posterior.std * noise, atol=1e-5, rtol=0)
    assert abs(draws.mean()) < 0.05 and abs(draws.std() - 1) < 0.05 and len(draws.unique()) == draws.numel()


def test_noise_depends_on_seed_and_index_alone(files, whole, tmp_path):
    again = tmp_path / "again"
    extract(run_of(files), again, batch_size=5, least_psnr=0.0, shard_size=100)
    (shard,) = again.glob("*.safetensors")
    torch.testing.assert_close(load_file(shard)["latents_flip"], whole[1]["latents_flip"], atol=1e-5, rtol=0)
    other = extracted(files, tmp_path / "other", train={"global_seed": 1})
    assert not torch.allclose(other["latents"], whole[1]["latents"], atol=1e-2)


def test_the_set_is_complete_and_loads(files, whole):
    output, latents = whole
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["count"] == COUNT and manifest["shape"] == [4, 8, 8] and manifest["classes"] == ["0", "1", "2"]
    assert manifest["tokenizer"]["sha256"] == fingerprint(load_tokenizer(files / "vae.safetensors", OPS))
    statistics = torch.load(output / "latents_stats.pt", weights_only=True)
    exact = latents["latents"].double()
    torch.testing.assert_close(statistics["mean"].flatten().double(), exact.mean(dim=(0, 2, 3)), atol=1e-6, rtol=0)
    torch.testing.assert_close(statistics["std"].flatten().double(), exact.std(dim=(0, 2, 3)), atol=1e-6, rtol=0)
    assert len(LatentDataset(output, latent_norm=True, latent_multiplier=1.0, num_classes=3, seed=0)) == COUNT


def test_an_interrupted_extraction_goes_on_to_the_same_bytes(files, whole, tmp_path, monkeypatch):
    output, calls = tmp_path / "set", []
    encode = program.encode

    def dies(*args):
        calls.append(1)
        if len(calls) == 4:  # after 7 images: one shard of 4 is complete, three images are lost
            raise KeyboardInterrupt
        return encode(*args)

    monkeypatch.setattr(program, "encode", dies)
    with pytest.raises(KeyboardInterrupt):
        extracted(files, output)
    assert not (output / "manifest.json").exists() and len(list(output.glob("*.safetensors"))) == 1
    again = []
    monkeypatch.setattr(program, "encode", lambda *args: again.append(len(args[1])) or encode(*args))
    latents = extracted(files, output)
    assert again == [3, 1, 3]  # each shard from its beginning, and no batch of two shards
    for key, value in whole[1].items():
        assert torch.equal(latents[key], value)
    again.clear()
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    extracted(files, output)
    assert not again  # a complete set needs no encoding
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


@pytest.mark.parametrize(
    ("total", "shard", "batch"), [(11, 4, 3), (11, 4, 4), (26, 10, 4), (7, 4, 100), (8, 4, 2), (9, 9, 1), (0, 5, 2)]
)
def test_batches_cover_the_images_and_none_is_of_two_shards(total, shard, batch):
    whole = batch_bounds(total, shard, batch)
    assert [i for start, stop in whole for i in range(start, stop)] == list(range(total))
    assert all(0 < stop - start <= batch for start, stop in whole)
    assert all(start // shard == (stop - 1) // shard for start, stop in whole)


@pytest.mark.parametrize("there", [[], [(0, 4)], [(6, 8), (4, 6)], [(0, 26)], [(8, 10), (24, 26)], [(0, 7)]])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 20])
def test_processes_share_the_batches_that_are_missing(there, world_size):
    """Each takes whole batches of the same division, whatever is there; one that is half there is encoded again."""
    whole = batch_bounds(26, 8, 2)
    shares = [share_of(whole, there, rank, world_size) for rank in range(world_size)]
    rows = {row for start, stop in there for row in range(start, stop)}
    want = [(start, stop) for start, stop in whole if not rows >= set(range(start, stop))]
    assert [bounds for share in shares for bounds in share] == want
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_precision_that_is_stated_is_the_one_that_encodes(files, whole, tmp_path, monkeypatch, precision):
    used, encode = set(), program.encode
    monkeypatch.setattr(
        program,
        "encode",
        lambda model, *args: used.update(parameter.dtype for parameter in model.parameters()) or encode(model, *args),
    )
    manifest = extract(run_of(files), tmp_path, batch_size=3, precision=precision, least_psnr=0.0, shard_size=SHARD)
    assert used == {getattr(torch, precision)} and manifest.identity["precision"] == precision
    stored = torch.cat([load_file(path)["latents"] for path in sorted(tmp_path.glob("*.safetensors"))])
    error = (stored - whole[1]["latents"]).abs().max().item()
    assert error == 0 if precision == "float32" else 1e-4 < error < 0.2


def test_two_processes_write_a_half_each_and_together_the_same_set(files, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(run_of(files).model_dump(mode="json")))
    for world_size in (1, 2):
        output = str(tmp_path / f"set{world_size}")
        arguments = ["extract", str(config), "--output", output, "--least-psnr", "0", "--batch-size", "3"]
        log = tmp_path / f"log{world_size}"
        assert children.launch(*arguments, world_size=world_size, log=log) == [0] * world_size
    alone, together = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("set1", "set2"))
    assert together == alone and len(LatentDataset(tmp_path / "set2")) == COUNT
    first, second = ((tmp_path / f"log2.{rank}").read_text() for rank in (0, 1))
    assert "11 images in 3 classes" in first and "11 images" not in second  # the main process alone says it
    assert "decode from what is stored" in first and "decode from what is stored" not in second


def test_a_directory_that_is_in_use_is_refused(files, tmp_path):
    with lock_directory(tmp_path, Processes(0, 1, torch.device("cpu"))):
        with pytest.raises(DirectoryInUseError, match=f"{tmp_path} is in use by process"):
            extracted(files, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_another_extraction_may_not_go_on_with_these_shards(files, whole):
    with pytest.raises(ValueError, match="belongs to another extraction"):
        extract(run_of(files, train={"global_seed": 7}), whole[0], least_psnr=0.0)


@pytest.mark.parametrize(
    "other", [{"batch_size": 4}, {"shard_size": 5}, {"store": "mean"}, {"dtype": "float16"}, {"precision": "bfloat16"}]
)
def test_what_changes_the_bits_may_not_change_on_the_way(files, whole, other):
    before = {path.name: path.read_bytes() for path in whole[0].iterdir()}
    ((name, value),) = other.items()
    options = {"batch_size": 3, "shard_size": SHARD} | other
    with pytest.raises(
        ValueError, match=rf"another extraction: {{'{name}': .*}}, this one is {{'{name}': '?{value}'?}}\."
    ):
        extract(run_of(files), whole[0], least_psnr=0.0, **options)
    assert {path.name: path.read_bytes() for path in whole[0].iterdir()} == before


def as_of_an_earlier_version(directory, **changes) -> None:
    content = json.loads((directory / "manifest.json").read_text())
    new = ("checksum", "store", "dtype")
    identity = {
        key: value
        for key, value in content["identity"].items()
        if key not in ("store", "dtype", "batch_size", "shard_size")
    }
    identity |= {"processes": 2} | changes
    write_checksummed(
        directory / "manifest.json", {k: v for k, v in content.items() if k not in new} | {"identity": identity}
    )


def test_a_set_that_an_earlier_version_completed_is_still_complete(files, whole, tmp_path, monkeypatch):
    shutil.copytree(whole[0], tmp_path / "set")
    as_of_an_earlier_version(tmp_path / "set")
    before = {path.name: path.read_bytes() for path in (tmp_path / "set").iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(program, "encode", None)
        assert extract(run_of(files), tmp_path / "set", batch_size=5).count == COUNT
    assert {path.name: path.read_bytes() for path in (tmp_path / "set").iterdir()} == before
    assert torch.equal(load_file(tmp_path / "set" / FIRST)["latents"], whole[1]["latents"][:SHARD])
    with pytest.raises(ValueError, match=r"another extraction: {'processes': 2}, this one is {'store': 'mean', "):
        extract(run_of(files), tmp_path / "set", store="mean")
    as_of_an_earlier_version(tmp_path / "set", seed=1)
    with pytest.raises(ValueError, match="another extraction"):
        extract(run_of(files), tmp_path / "set")


def labels_file(files, path, labels):
    """A list of the images in the order of their names, with these labels."""
    paths = sorted((files / "images").glob("*/*.png"), key=lambda image: image.name)
    path.write_text("".join(f"{image}\t{label}\n" for image, label in zip(paths, labels, strict=True)))
    return {"data_path": str(path)}


def test_corrected_labels_may_not_go_on_with_these_shards(files, tmp_path):
    labels = [index % 3 for index in range(COUNT)]
    where = labels_file(files, tmp_path / "list.txt", labels)
    assert extracted(files, tmp_path / "set", data=where)["labels"].tolist() == labels
    labels_file(files, tmp_path / "list.txt", [2, *labels[1:]])
    with pytest.raises(ValueError, match="belongs to another extraction"):
        extracted(files, tmp_path / "set", data=where)


def test_a_missing_image_of_a_list_is_skipped_where_allowed(files, tmp_path, capsys):
    where = labels_file(files, tmp_path / "list.txt", [index % 3 for index in range(COUNT)])
    lines = (tmp_path / "list.txt").read_text().splitlines()
    (tmp_path / "list.txt").write_text("\n".join([*lines[:4], "gone.png\t1", *lines[5:]]))
    with pytest.raises(ValueError, match=r"gone\.png does not exist"):
        extracted(files, tmp_path / "set", data=where)
    latents = extracted(files, tmp_path / "set", data={**where, "on_unreadable": "skip", "max_unreadable": 0.1})
    assert len(latents["labels"]) == COUNT and "1 unreadable images" in capsys.readouterr().out


def test_an_untrained_tokenizer_is_refused(files, tmp_path):
    with pytest.raises(ValueError, match=r"vae\.safetensors reconstructs these images at .* dB, below 30"):
        extract(run_of(files), tmp_path / "set", least_psnr=30.0)
    assert not (tmp_path / "set").exists()


def test_weights_of_another_tokenizer_are_refused(files, tmp_path):
    run = run_of(files, model={**MODEL.model_dump(), "z_channels": 8})
    with pytest.raises(ValueError, match=r"vae\.safetensors as a tokenizer does not fit"):
        extract(run, tmp_path / "set")


def test_an_unreadable_image_is_named_or_stood_in_for(files, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for label in range(3):
        (tmp_path / f"images/{label}").mkdir()
        for path in (files / f"images/{label}").iterdir():
            (tmp_path / f"images/{label}/{path.name}").write_bytes(path.read_bytes())
    (tmp_path / "images/1/04.png").write_bytes(b"broken")
    where = {"data_path": str(tmp_path / "images")}
    with pytest.raises(ValueError, match=r"1/04\.png"):
        extracted(files, tmp_path / "set", data=where)
    latents = extracted(files, tmp_path / "set", data={**where, "on_unreadable": "skip", "max_unreadable": 0.1})
    assert len(latents["labels"]) == COUNT
    assert "1 unreadable images" in capsys.readouterr().out


def test_a_training_checkpoint_directory_without_checkpoint_is_named(files, tmp_path):
    with pytest.raises(ValueError, match="no complete one below it"):
        extract(run_of(files, ckpt_path=str(tmp_path)), tmp_path / "set")


def test_the_program_reads_a_config_and_reports(files, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(run_of(files).model_dump(mode="json")))
    status = program.main([str(config), "data.num_workers=0", "--output", str(tmp_path / "set"), "--least-psnr", "0"])
    assert status == 0
    want = f"{COUNT} images of 3 classes (0, 1, 2) as latents [4, 8, 8] in {tmp_path / 'set'}"
    assert want in capsys.readouterr().out
    with pytest.raises(ValueError, match="--batch-size 0"):
        program.main([str(config), "--output", str(tmp_path / "set"), "--batch-size", "0"])
    with pytest.raises(ValueError, match="--least-psnr nan"):
        program.main([str(config), "--output", str(tmp_path / "set"), "--least-psnr", "nan"])


def test_statistics_of_latents_that_came_without(files, whole, tmp_path, capsys):
    """The same as the extraction's own; where they cannot be made, nothing is written."""
    published = tmp_path / "published"
    published.mkdir()
    for path in whole[0].glob("*.safetensors"):
        shutil.copy(path, published)
    with pytest.raises(LatentsError, match=rf"latents_stats.pt is missing.*--statistics {published}"):
        LatentDataset(published)
    assert program.main(["--statistics", str(published)]) == 0
    assert f"{COUNT * 64} values a channel" in capsys.readouterr().out
    made, own = (torch.load(d / "latents_stats.pt", weights_only=True) for d in (published, whole[0]))
    assert all(torch.equal(made[key], own[key]) for key in ("mean", "std"))
    assert len(LatentDataset(published)) == COUNT
    for argv, why in (
        (["--statistics", str(published)], "is already there"),
        (["--statistics", str(tmp_path / "none")], "not a directory"),
        (["--statistics", str(tmp_path), "--output", "x"], "takes no config and no --output"),
        (["--output", "x"], "needs a config and --output"),
    ):
        with pytest.raises(ValueError, match=why):
            program.main(argv)
