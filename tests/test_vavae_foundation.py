"""Features of the published foundation models against the recorded path, and what a wrong section says.

The models that have short names: `test_vavae_foundation_models.py`; files of weights: `…_weights.py`.
"""

import pytest
import timm
import torch

from common.files import DownloadError
from common.tensors import write_tensors
from tests.golden import G, J, close, formula_weight
from vavae.config import FoundationConfig
from vavae.foundation import FoundationModel

SMALL = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}


def small(**fields) -> FoundationConfig:
    return FoundationConfig(model_name="vit_tiny_patch16_224", model_args=SMALL, **fields)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return formula_weight(1, (1, 3, 256, 256), 0.5)


@pytest.mark.parametrize("kind, name", [("dinov2", "vit_small_patch14_dinov2"), ("mae", "vit_base_patch16_224")])
def test_features_match_the_recorded(tmp_path, images, kind, name):
    golden, arguments = G("05_vf_foundation"), dict(J("05_vf_foundation")[kind]["config"])
    del arguments["num_classes"]
    write_tensors(tmp_path / "vit.safetensors", golden.group(f"{kind}/param/"))
    config = FoundationConfig(
        model_name=name, weights=str(tmp_path / "vit.safetensors"), normalization="published", model_args=arguments
    )
    model = FoundationModel.from_config(config, 16)
    close(kind, model(images), golden[f"{kind}/feat"], atol=2e-5)
    assert model.width == 24 and model.input_size == {"dinov2": 224, "mae": 256}[kind]
    if kind == "dinov2":
        close("resized", model.prepare(images)[..., :8, :8], golden["dinov2/resized_corner8"], atol=1e-6)


def test_imagenet_normalization_is_of_the_unit_range(images):
    model = FoundationModel.from_config(small(normalization="imagenet"), 8, pretrained=False)
    x = images[..., :32, :32]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    want = ((x + 1) / 2 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    close("normalised", model.prepare(x), want, atol=1e-6)


def test_model_is_frozen_and_gives_no_gradient(images):
    model = FoundationModel.from_config(small(), 8, pretrained=False)
    x = images[..., :32, :32].clone().requires_grad_()
    features = model(x)
    assert features.shape == (1, 24, 8, 8)
    assert not features.requires_grad and not any(p.requires_grad for p in model.parameters()) and not model.training


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_trained_classifier_comes_back_as_foundation_model(tmp_path, images, suffix):
    torch.manual_seed(0)
    classifier = FoundationModel.classifier(small(), 8, num_classes=10)
    x = images[..., :32, :32]
    assert classifier.logits(x).shape == (1, 10) and classifier.logits(x).requires_grad
    path = tmp_path / f"vit{suffix}"
    if suffix == ".pt":
        torch.save(classifier.vit.state_dict(), path)
    else:
        classifier.save(path)
    model = FoundationModel.from_config(small(weights=str(path)), 8)
    # Independent path: timm's own features, class token cut off, laid out row by row.
    tokens = classifier.eval().vit.forward_features(classifier.prepare(x))[:, 1:]
    close("features", model(x), tokens.transpose(1, 2).reshape(1, 24, 8, 8), atol=1e-6)


def small_with(**arguments) -> FoundationConfig:
    return FoundationConfig(model_name="vit_tiny_patch16_224", model_args=SMALL | arguments)


@pytest.mark.parametrize(
    "arguments, error",
    [
        ({"depht": 3}, "unknown key 'depht'.*did you mean 'depth'"),
        ({"depth": -1}, "depth: must be at least 1"),
        ({"patch_size": 0}, "patch_size: must be at least 1"),
        ({"num_heads": 0}, "num_heads: must be at least 1"),
        ({"mlp_ratio": -1.0}, "mlp_ratio: must be above 0"),
        ({"reg_tokens": -1}, "reg_tokens: must be at least 0"),
        ({"global_pool": "nope"}, "global_pool: must be"),
        ({"embed_dim": "96"}, "embed_dim: a whole number"),
        # Files, and classes of timm by name.
        *(
            ({key: value}, f"unknown key '{key}'")
            for key, value in {
                "checkpoint_path": "x.pt",
                "pretrained_cfg": {"file": "x"},
                "pretrained_cfg_overlay": {"file": "x"},
                "cache_dir": "x",
                "act_layer": "gelu",
                "norm_layer": "x",
                "pretrained": True,
                "scriptable": True,
            }.items()
        ),
    ],
)
def test_arguments_that_say_no_network_are_refused(arguments, error):
    with pytest.raises(ValueError, match=f"timm's vision transformer: .*{error}"):
        small_with(**arguments)


@pytest.mark.parametrize(
    "config, error",
    [
        (
            FoundationConfig(model_name="vit_large_patch14_dinov2.lvd142"),
            "did you mean 'vit_large_patch14_dinov2.lvd142m'",
        ),
        (
            FoundationConfig(model_name="resnet18", model_args={"depth": 3}),
            "model_args {'depth': 3} do not fit resnet18",
        ),
        (small_with(embed_dim=191), "model_args .* do not fit vit_tiny_patch16_224"),
        (small_with(class_token=False), "model_args .* do not fit vit_tiny_patch16_224"),
    ],
)
def test_a_wrong_section_is_named(config, error):
    with pytest.raises(ValueError, match=error):
        FoundationModel.from_config(config, 8, pretrained=False)


def test_a_failed_download_says_what_to_do(monkeypatch):
    create = timm.create_model

    def offline(*args, pretrained, **kwargs):
        if pretrained:
            raise OSError("no route to host")
        return create(*args, **kwargs)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(DownloadError, match=r"could not download .*dinov2.*no route to host.*foundation\.weights"):
        FoundationModel.from_config(FoundationConfig(), 16)
