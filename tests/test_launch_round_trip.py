"""The round trip at the end of an extraction: what is stored decodes to its images, or the set is not complete."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import kernels
from common.seeds import generator
from launch import extract as program
from launch.config import ConfigError, VavaeRun
from launch.extract import extract
from launch.extraction import round_trip
from lightningdit import latents_writer
from lightningdit.data import LatentDataset
from lightningdit.latents import LatentsError
from tests import toy
from vavae.config import AutoencoderConfig, DataConfig
from vavae.data import ImageDataset
from vavae.model import AutoencoderKL
from vavae.seeds import EXTRACTION_NOISE
from vavae.weights import load_tokenizer, write_export

OPS = kernels.select("reference")
MODEL = AutoencoderConfig(
    ch=32, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=(), z_channels=4, embed_dim=4, resolution=8
)
COUNT, SHARD, BATCH = 12, 5, 3


def write_tokenizer(root: Path, steps: int, name: str = "vae", seed: int = 0) -> None:
    """A tokenizer that was trained for so many steps on root/images and their mirror images."""
    x = all_images(root)
    x = torch.cat([x, x.flip(-1)])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoencoderKL(MODEL, OPS)
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(steps):
            posterior = model.encode(x)
            loss = (model.decode(posterior.sample()) - x).abs().mean() + 1e-6 * posterior.kl().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    write_export(root / f"{name}.safetensors", model.state_dict(), MODEL, step=0)


def all_images(root: Path) -> torch.Tensor:
    images = ImageDataset(DataConfig(data_path=str(root / "images"), image_size=8, crop="center"), seed=0)
    return images.batch(torch.zeros(len(images), dtype=torch.int64), torch.arange(len(images)))["image"]


def run_of(root: Path) -> VavaeRun:
    return VavaeRun.model_validate(
        {
            "preset": "default",
            "ckpt_path": str(root / "vae.safetensors"),
            "model": MODEL.model_dump(),
            "loss": {"use_vf": False, "perceptual": "none"},
            "data": {"data_path": str(root / "images"), "image_size": 8, "num_workers": 0},
            "kernels": "reference",
        }
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """12 smooth images and a tokenizer that knows them: about 29 dB, their mirror images at most 15 dB apart."""
    root = tmp_path_factory.mktemp("round_trip")
    toy.write_images(root / "images", count=COUNT, size=8)
    write_tokenizer(root, steps=100)
    return root


def extracted(root: Path, output: Path, **options) -> dict[str, torch.Tensor]:
    extract(run_of(root), output, batch_size=BATCH, shard_size=SHARD, **options)
    shards = [load_file(path) for path in sorted(output.glob("*.safetensors"))]
    return {key: torch.cat([shard[key] for shard in shards]) for key in shards[0]}


def psnr(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    eight_bits = [(127.5 * v + 128).clamp(0, 255).floor().double() for v in (x, y)]
    return 10 * torch.log10(255**2 / (eight_bits[0] - eight_bits[1]).square().mean(dim=(1, 2, 3)))


# --- what is stored


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("store", ["sample", "mean", "moments"])
def test_every_store_in_every_dtype_is_what_the_posterior_says(root, tmp_path, store, dtype):
    stored = extracted(root, tmp_path, store=store, dtype=dtype)
    model, x = load_tokenizer(root / "vae.safetensors", OPS), all_images(root)
    noise = torch.stack([torch.randn(2, 4, 4, 4, generator=generator(0, EXTRACTION_NOISE, i)) for i in range(COUNT)])
    for side, (key, pixels) in enumerate({"latents": x, "latents_flip": x.flip(-1)}.items()):
        posterior = model.encode(pixels)
        std = (0.5 * posterior.logvar).exp()
        want = {
            "sample": posterior.mean + std * noise[:, side],
            "mean": posterior.mean,
            "moments": torch.cat([posterior.mean, std], 1),
        }[store]
        assert stored[key].dtype == getattr(torch, dtype)
        tolerance = {"float32": 1e-5, "float16": 2**-11, "bfloat16": 2**-8}[dtype]
        torch.testing.assert_close(stored[key].float(), want.detach(), rtol=tolerance, atol=1e-5)
    data = LatentDataset(tmp_path)
    assert (data.manifest.store, data.manifest.dtype, data.shape) == (store, dtype, (4, 4, 4))
    drawn = torch.cat([data.batch([e] * COUNT, range(COUNT), [False] * COUNT)["x"] for e in range(60)]).double()
    assert drawn.mean((0, 2, 3)).abs().max() < 0.02 and (drawn.std((0, 2, 3)) - 1).abs().max() < 0.02


@pytest.mark.parametrize("store", ["sample", "mean", "moments"])
def test_the_figures_are_those_of_what_is_stored(root, tmp_path, capsys, store):
    extracted(root, tmp_path, store=store)
    data, model = LatentDataset(tmp_path), load_tokenizer(root / "vae.safetensors", OPS)
    want = []
    for flip in (False, True):
        z = data.batch([0] * COUNT, range(COUNT), [flip] * COUNT)["x"]
        z = z * data.statistics.std.view(4, 1, 1) + data.statistics.mean.view(4, 1, 1)
        with torch.no_grad():
            images = all_images(root).flip(-1) if flip else all_images(root)
            want.append(psnr(model.decode(z), images).mean().item())
    said = f"12 images decode from what is stored at {want[0]:.1f} dB, mirrored at {want[1]:.1f} dB"
    assert said in capsys.readouterr().out and min(want) > 22


def test_a_16_bit_encoder_and_16_bit_storage_decode_as_well(root, tmp_path, capsys):
    extracted(root, tmp_path / "wide")
    extracted(root, tmp_path / "narrow", precision="bfloat16", dtype="bfloat16")
    wide, narrow = (float(line.split()[8]) for line in capsys.readouterr().out.splitlines() if "decode from" in line)
    assert abs(wide - narrow) < 0.3


# --- what goes wrong is seen, and named


def exchanged(encode, *args):
    return encode(*args)[::-1]


def in_another_order(encode, *args):
    return tuple(v.roll(1, 0) for v in encode(*args))


def mirrored_in_another_order(encode, *args):
    plain, mirrored = encode(*args)
    return plain, mirrored.roll(1, 0)


def by_another_tokenizer(encode, tokenizer, *args):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return encode(AutoencoderKL(MODEL, OPS).eval(), *args)


def without_its_scale(encode, *args):
    return tuple(v / 10 for v in encode(*args))


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (exchanged, r"It fits the (mirrored|plain) image: plain and mirrored latents are exchanged"),
        (
            in_another_order,
            r"It fits the (mirrored|plain) image \d+ \(.*png\): latents and images are in different orders",
        ),
        (mirrored_in_another_order, r"It fits the mirrored image \d+ \(.*png\): latents and images are in different"),
        (by_another_tokenizer, r"It fits none of the 12 images looked at: it is another tokenizer's"),
        (without_its_scale, r"It fits none of the 12 images looked at: it is another tokenizer's, or was changed"),
    ],
)
def test_latents_that_are_not_the_images_are_found_at_the_end(root, tmp_path, monkeypatch, fault, why):
    encode = program.encode
    monkeypatch.setattr(program, "encode", lambda *args: fault(encode, *args))
    found = (
        r"the (plain|mirrored) latent of image \d+ \(.*\) decodes at .* dB, where the tokenizer had .* at the start\."
    )
    with pytest.raises(LatentsError, match=rf"{found} {why}"):
        extracted(root, tmp_path)
    assert not (tmp_path / "manifest.json").exists()
    with pytest.raises(LatentsError, match="is unfinished"):
        LatentDataset(tmp_path)


@pytest.mark.parametrize("store", ["sample", "moments"])
def test_statistics_that_do_not_fit_are_found_at_the_end(root, tmp_path, monkeypatch, store):
    real = latents_writer.write_statistics
    wrong = lambda directory, found: real(directory, found | {"std": [2 * std for std in found["std"]]})  # noqa: E731
    monkeypatch.setattr(latents_writer, "write_statistics", wrong)
    with pytest.raises(LatentsError, match=r"latents_stats\.pt does not fit the latents beside it: for channel"):
        extracted(root, tmp_path, store=store)
    assert not (tmp_path / "manifest.json").exists()


def test_one_latent_of_another_image_is_enough(root, tmp_path, monkeypatch):
    add = latents_writer.LatentsWriter.add

    def adds(writer, plain, mirrored, labels, *, at):
        if at == 5:
            plain = torch.cat([plain[1:2], plain[1:]])
        add(writer, plain, mirrored, labels, at=at)

    monkeypatch.setattr(latents_writer.LatentsWriter, "add", adds)
    with pytest.raises(LatentsError, match=r"the plain latent of image 5 .* It fits the plain image 6 "):
        extracted(root, tmp_path)


def test_what_decodes_below_the_least_psnr_is_not_complete(root, tmp_path):
    run, images = run_of(root), program.ImagesWithNoise(image_set(root), (2, 4, 4, 4), 0)
    tokenizer = load_tokenizer(run.ckpt_path, OPS)
    extracted(root, tmp_path)
    trip = round_trip.try_tokenizer(tokenizer, images, "sample", 0.0, "this")
    assert round_trip.try_stored(tokenizer, LatentDataset(tmp_path), trip, 20.0).shape == (COUNT, 2)
    with pytest.raises(LatentsError, match=r"decodes to these images at 2\d\.\d dB, below 40 \(--least-psnr\)"):
        round_trip.try_stored(tokenizer, LatentDataset(tmp_path), trip, 40.0)
    with pytest.raises(ConfigError, match=r"this reconstructs these images at 2\d\.\d dB, below 40 \(--least-psnr\)"):
        round_trip.try_tokenizer(tokenizer, images, "sample", 40.0, "this")


def image_set(root: Path) -> ImageDataset:
    return ImageDataset(DataConfig(data_path=str(root / "images"), image_size=8, crop="center"), seed=0)


@pytest.mark.parametrize("count", [1, 2, 5, 12, 16])
def test_the_images_looked_at_are_spread_over_all(root, count):
    images = program.ImagesWithNoise(image_set(root), (2, 4, 4, 4), 0)
    trip = round_trip.try_tokenizer(load_tokenizer(root / "vae.safetensors", OPS), images, "mean", 0.0, "x", count)
    indices = trip.indices.tolist()
    assert len(set(indices)) == len(indices) == min(count, COUNT) and indices[0] == 0
    assert count == 1 or indices[-1] == COUNT - 1
    assert max(b - a for a, b in zip(indices, indices[1:] or [1], strict=False)) <= -(-COUNT // max(count - 1, 1))
