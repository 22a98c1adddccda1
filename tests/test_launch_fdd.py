"""The features of FDD: the class token, DINOv2's own scaling of positions, Pillow's scaling of images."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from common.tensors import write_tensors
from launch.evaluation import dinov2
from launch.evaluation.dinov2 import ClassTokenFeatures, scale_positions, with_positions
from launch.evaluation.features import TogetherFeatures
from launch.evaluation.reference import Reference
from launch.evaluation.runner import evaluate_samples
from tests.measured import FACTS, MemoryImages, distance, images, means

ARGUMENTS = {"patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2, "num_classes": 0}


def network(side: int) -> torch.nn.Module:
    torch.manual_seed(3)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=side, **ARGUMENTS)
    torch.nn.init.normal_(vit.pos_embed)
    torch.nn.init.normal_(vit.cls_token)
    return vit.eval()


def cubic(distance: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = −0.75, PyTorch's."""
    x, a = np.abs(distance), -0.75
    near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


def scaled(grid: np.ndarray, side: int) -> np.ndarray:
    """A grid [g, g, D] at `side` places a side, as DINOv2 has it: (side + 0.1) / g is the scale; borders repeat."""
    g = len(grid)
    places = (np.arange(side) + 0.5) * g / (side + 0.1) - 0.5
    base = np.floor(places).astype(int)
    weights = np.zeros((side, g))
    for i, (place, first) in enumerate(zip(places, base, strict=True)):
        for source in range(first - 1, first + 3):
            weights[i, np.clip(source, 0, g - 1)] += cubic(np.array(place - source))
    return np.einsum("ia,jb,abd->ijd", weights, weights, grid)


@pytest.mark.parametrize(("grid", "side"), [(8, 5), (37, 16), (4, 4)])
def test_positions_are_scaled_as_dinov2_does(grid, side):
    positions = torch.randn(1, 1 + grid**2, 3, generator=torch.Generator().manual_seed(0))
    got = scale_positions(positions, side)
    assert got.shape == (1, 1 + side**2, 3) and torch.equal(got[:, 0], positions[:, 0])
    want = scaled(positions[0, 1:].unflatten(0, (grid, grid)).double().numpy(), side)
    assert np.allclose(got[0, 1:].unflatten(0, (side, side)).numpy(), want, atol=1e-4)


def truth(vit: torch.nn.Module, pixels: torch.Tensor, side: int) -> np.ndarray:
    """Class tokens by the network's own modules, of images that Pillow scaled."""
    small = [np.asarray(Image.fromarray(image.numpy()).resize((side, side), Image.BICUBIC)) for image in pixels]
    x = torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).double() / 255
    x = (x - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    vit = vit.double()
    with torch.no_grad():
        tokens = vit.patch_embed.proj(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([vit.cls_token.expand(len(x), -1, -1), tokens], 1) + vit.pos_embed
        return vit.norm(vit.blocks(tokens))[:, 0].numpy()


def test_features_are_the_class_token_of_scaled_images():
    pixels = images(0, 5, size=23)
    features = ClassTokenFeatures(network(12), 12, {"name": "tiny"})
    got = features(pixels)["dinov2"]
    assert got.dtype == torch.float32 and got.shape == (5, 12)
    assert np.allclose(got.numpy(), truth(network(12), pixels, 12), atol=2e-4)
    same = images(1, 3, size=12)
    assert np.allclose(features(same)["dinov2"].numpy(), truth(network(12), same, 12), atol=2e-4)


def test_a_network_of_another_size_gets_positions_of_dinov2_s(monkeypatch):
    """Of a file for 8 × 8 patches, for images of 3 × 3: not as timm scales them."""
    vit = network(32)
    positions = vit.pos_embed.detach().clone()
    small = with_positions(vit, 12)
    assert torch.equal(small.pos_embed, scale_positions(positions, 3))
    timms = network(32)
    timms.set_input_size(img_size=12)
    assert (timms.pos_embed - small.pos_embed).abs().max() > 0.05
    pixels = images(2, 2, size=12)
    got = ClassTokenFeatures(small, 12, {"name": "tiny"})(pixels)["dinov2"]
    assert np.allclose(got.numpy(), truth(small, pixels, 12), atol=2e-4)


@pytest.fixture
def weights(tmp_path):
    """A file of a small network, with the record that says how to build it."""
    write_tensors(tmp_path / "net.safetensors", network(16).state_dict())
    arguments = {key: value for key, value in ARGUMENTS.items() if key != "num_classes"}
    config = {"model_name": "vit_tiny_patch16_224", "model_args": arguments, "normalization": "imagenet"}
    (tmp_path / "net.json").write_text(json.dumps({"config": config, "grid": 4}))
    return tmp_path / "net.safetensors"


def test_fdd_beside_the_other_figures_in_one_pass(weights, monkeypatch):
    decoded = []

    class Counted(MemoryImages):
        def batches(self, size, start=0, stop=None):
            for batch in super().batches(size, start, stop):
                decoded.append(len(batch))
                yield batch

    real, fake = images(3, 40), images(4, 30)
    dino = ClassTokenFeatures.from_file(weights)
    source, known = Counted(fake), Reference("real", MemoryImages(real))
    got = evaluate_samples(source, known, TogetherFeatures(means, dino), metadata=FACTS, batch_size=8)
    tokens = [truth(network(16), x, 16) for x in (fake, real)]
    assert got["metrics"]["fdd"] == pytest.approx(distance(*tokens), rel=1e-3)
    assert got["basis"]["fdd"]["network"] == "class token of vit_tiny_patch16_224" and "fid" in got["metrics"]
    assert got["networks"][1]["sha256"] and got["networks"][1]["published"] is False
    assert any("class token of vit_tiny_patch16_224 are not the published file" in note for note in got["notes"])
    assert got["basis"]["fdd"]["resize"].startswith("16 × 16, bicubic")
    assert [count for count in decoded if count > 2] == [8, 8, 8, 6]  # but the first ones, which are looked at before


def test_weights_that_are_not_dinov2_s_are_refused(tmp_path):
    write_tensors(tmp_path / "other.safetensors", {"a": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"--dinov2-weights: .*other\.safetensors"):
        ClassTokenFeatures.from_file(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"--dinov2-weights: .*none\.pth"):
        ClassTokenFeatures.from_file(tmp_path / "none.pth")


def test_two_networks_of_one_kind_are_refused():
    with pytest.raises(ValueError, match="two networks give features"):
        TogetherFeatures(means, means)(images(0, 2))
    assert all(len(known) == 64 for known in dinov2.KNOWN)
