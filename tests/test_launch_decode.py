"""The decode program: latents → images, by several processes, resumed, and what it refuses."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

import kernels
from launch import decode, sample
from launch.sampling import units
from lightningdit.data import LatentDataset
from lightningdit.latents_statistics import check_statistics
from tests.test_launch_sampling import content
from tests.tiny_weights import TOKENIZER, a_run, document, write_weights
from vavae.config import AutoencoderConfig
from vavae.images import to_uint8
from vavae.model import AutoencoderKL
from vavae.weights import load_tokenizer, write_export


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def latents(weights, tmp_path_factory):
    output = tmp_path_factory.mktemp("latents") / "set"
    sample.generate(a_run(weights, format="latents", fid_num=21), output)
    return output


def run(weights, latents, output, *more: str) -> dict[str, bytes]:
    tokenizer = ["--tokenizer", str(weights / "tokenizer.safetensors")]
    assert decode.main(["--latents", str(latents), "--output", str(output), *tokenizer, *more]) == 0
    return content(output)


def test_sampled_latents_are_a_set_that_readers_take(latents):
    data = LatentDataset(latents, num_classes=3, verify=True)
    check_statistics(data)
    assert (len(data), data.shape, data.labels.tolist()) == (21, (4, 4, 4), [i % 3 for i in range(21)])
    assert data.classes == ("cat", "dog", "été")
    plain, mirrored = (data.stored(np.arange(21), np.full(21, flip)) for flip in (False, True))
    assert np.array_equal(plain, mirrored) and plain.std() > 0.1


@pytest.mark.parametrize("format", ["npz", "png", "webp"])
def test_decoding_later_is_sampling_in_that_format(weights, latents, tmp_path, format):
    """Pixel by pixel; image i of latent i is what the tokenizer alone makes of it."""
    decoded = run(weights, latents, tmp_path / "decoded", "--format", format)
    sample.generate(a_run(weights, format=format, fid_num=21), tmp_path / "sampled")
    sampled = content(tmp_path / "sampled")
    assert decoded.keys() == sampled.keys() and len(decoded) == (3 if format == "npz" else 24)
    assert all(decoded[name] == sampled[name] for name in decoded if name != "samples.json")
    facts, made = (json.loads(each["samples.json"]) for each in (decoded, sampled))
    assert {key: facts[key] for key in ("solver", "guidance", "nfe", "label_counts", "hashes")} == {
        key: made[key] for key in ("solver", "guidance", "nfe", "label_counts", "hashes")
    }
    if format == "png":
        z = torch.from_numpy(LatentDataset(latents).stored(np.array([20]), np.array([False]))).view(1, 4, 4, 4)
        tokenizer = load_tokenizer(weights / "tokenizer.safetensors", kernels.select("reference"))
        with torch.no_grad():
            want = to_uint8(tokenizer.decode(z))[0].permute(1, 2, 0).numpy()
        got = np.array(Image.open(tmp_path / "decoded" / "images" / "00000020.png"))
        assert np.abs(got.astype(int) - want).max() <= 1


def test_batches_change_no_byte_and_folders_of_classes_are_named_by_label(weights, latents, tmp_path, monkeypatch):
    monkeypatch.setattr(units, "UNIT", 8)
    whole = run(weights, latents, tmp_path / "a", "--by-class")
    again = run(weights, latents, tmp_path / "b", "--by-class", "--batch-size", "100")
    assert again == whole and "images/2/00000020.png" in whole
    labels = np.load(tmp_path / "a" / "labels.npy")
    assert labels.tolist() == [i % 3 for i in range(21)]


def test_a_config_of_either_model_names_the_tokenizer(weights, latents, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(document(weights)))
    want = run(weights, latents, tmp_path / "want")
    there = ["--latents", str(latents)]
    assert decode.main([str(config), *there, "--output", str(tmp_path / "dit")]) == 0
    tokenizer = {"preset": "default", "model": TOKENIZER, "ckpt_path": str(weights / "tokenizer.safetensors")}
    config.write_text(yaml.safe_dump(tokenizer))
    assert decode.main([str(config), "--kind", "vavae", *there, "--output", str(tmp_path / "vae")]) == 0
    assert content(tmp_path / "dit") == content(tmp_path / "vae") == want
    with pytest.raises(ValueError, match="give either CONFIG or --tokenizer"):
        decode.main([*there, "--output", str(tmp_path / "x")])


def refused(weights, latents, output, *more: str) -> str:
    with pytest.raises(ValueError) as caught:
        run(weights, latents, output, *more)
    assert not output.exists()
    return str(caught.value)


def test_what_is_not_whole_or_not_the_tokenizer_s_is_refused(weights, latents, tmp_path):
    spoilt, out = tmp_path / "set", tmp_path / "out"

    def fresh():
        shutil.rmtree(spoilt, ignore_errors=True)
        shutil.copytree(latents, spoilt)
        return spoilt

    torch.manual_seed(1)
    config = AutoencoderConfig(**TOKENIZER)
    other = AutoencoderKL(config, kernels.select("reference"))
    write_export(tmp_path / "other.safetensors", other.state_dict(), config)
    with pytest.raises(ValueError, match=r"another tokenizer \(SHA-256 [0-9a-f]{64}\) than the one given here \("):
        decode.main(
            ["--latents", str(latents), "--output", str(out), "--tokenizer", str(tmp_path / "other.safetensors")]
        )
    description = fresh() / "samples.json"
    description.write_text(description.read_text().replace('"num_samples": 21', '"num_samples": 22'))
    assert "holds 21 latents where samples.json promises 22" in refused(weights, spoilt, out)
    shard = next(fresh().glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    assert "truncated" in refused(weights, spoilt, out)
    shard = next(fresh().glob("*.safetensors"))
    save_file({name: value + 5 * (name == "latents") for name, value in load_file(shard).items()}, shard)
    (spoilt / "manifest.json").unlink()
    assert "does not fit the latents" in refused(weights, spoilt, out)
    (fresh() / "manifest.json").rename(spoilt / "unfinished")
    assert "unfinished" in refused(weights, spoilt, out)


def test_images_that_were_lost_afterwards_are_counted(weights, latents, tmp_path):
    run(weights, latents, tmp_path / "out")
    (tmp_path / "out" / "images" / "00000007.png").unlink()
    message = "holds 20 images where 21 are promised; 00000007.png are missing"
    with pytest.raises(ValueError, match=message):
        run(weights, latents, tmp_path / "out")
