"""Every documented foundation model against timm's own, at a small size; grids, dtypes and tracing."""

import logging
import re
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.tensors import write_tensors
from tests.foundation_models import (
    GRID,
    HALF,
    IMAGENET,
    PIXELS,
    STATED,
    images,
    normalised,
    section,
    small,
    timm_network,
)
from tests.golden import close
from vavae.config import AutoencoderConfig, FoundationConfig, LossConfig
from vavae.cost import training_cost
from vavae.foundation import FoundationModel
from vavae.foundation.names import SHORT_NAMES

README = Path(__file__).parents[1] / "vavae" / "README.md"
FAMILIES = ("dinov2-s-reg", "dinov3-b", "siglip2-b", "sam-b", "eva02-b", "pe-core-b")  # one of each module and head


def features_of(network: torch.nn.Module, x: torch.Tensor, *, norm: bool = True) -> torch.Tensor:
    return network.forward_intermediates(x, indices=1, norm=norm, intermediates_only=True)[0]


@pytest.mark.parametrize("name", SHORT_NAMES)
def test_features_are_those_of_timm(tmp_path, name):
    """timm's network interpolates positions in each pass, and gets images that are normalised by the formula."""
    network, x = timm_network(name), images()
    write_tensors(tmp_path / "weights.safetensors", network.state_dict())
    img_size = {"img_size": 48} if name.startswith("sam") else {}  # of the positions in the file
    config = section(name, weights=str(tmp_path / "weights.safetensors"), model_args=img_size)
    model = FoundationModel.from_config(config, GRID)
    patch = network.patch_embed.patch_size[0]
    fed = normalised(x, *STATED[name.partition("-")[0]]).float()
    fed = F.interpolate(fed, size=patch * GRID, mode="bilinear")
    if name.startswith("eva02"):  # its last norm stands behind the pooling
        last = network.fc_norm
        tokens = features_of(network, fed, norm=False).permute(0, 2, 3, 1)
        want = F.layer_norm(tokens, (32,), last.weight, last.bias, last.eps).permute(0, 3, 1, 2)
    else:
        want = features_of(network, fed)
    assert (model.input_size, model.width) == (patch * GRID, want.shape[1]) and want.shape[2:] == (GRID, GRID)
    close(name, model(x), want, atol=2e-5 * want.abs().max().item())


def table_row(name: str) -> str:
    config = FoundationConfig(model_name=name, model_args={"depth": 1})
    with torch.device("meta"):
        model = FoundationModel.from_config(config, 16, pretrained=False)
        shape = model(torch.empty(1, 3, 256, 256)).shape
    stated = timm.get_pretrained_cfg(SHORT_NAMES[name])
    mean, std = (" ".join(f"{v:.3f}" for v in values) for values in (stated.mean, stated.std))
    patch = model.vit.patch_embed.patch_size[0]
    cells = (
        f"`{name}`",
        f"`{SHORT_NAMES[name]}`",
        shape[1],
        patch,
        model.input_size,
        f"{shape[2]} × {shape[3]}",
        mean,
        std,
    )
    return f"| {' | '.join(map(str, cells))} |"


def section_of(heading: str) -> str:
    return README.read_text("utf-8").partition(f"{heading}\n")[2].partition("\n# ")[0]


def test_the_table_in_the_docs_is_what_the_models_do():
    written = re.findall(r"^\| `[\w-]+` \| `.*$", section_of("# Foundation models"), re.M)
    assert written == [table_row(name) for name in SHORT_NAMES]


def test_names_are_of_weights_that_timm_has():
    assert set(SHORT_NAMES.values()) <= set(timm.list_models(pretrained=True))
    full, short = (
        FoundationModel.from_config(FoundationConfig(model_name=name, model_args=small(name)), GRID, pretrained=False)
        for name in (SHORT_NAMES["clip-b"], "clip-b")
    )
    assert torch.equal(full.shift, short.shift) and full.vit.state_dict().keys() == short.vit.state_dict().keys()


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("dinov2-xl", "'dinov2-xl'.*did you mean 'dinov2-l'.*short names: dinov2-s, .*eva02-l"),
        ("dinov3_l", "did you mean 'dinov3-l'"),
        ("vit_base_patch16_224.mea", r"did you mean 'vit_base_patch16_224\.mae'"),
        ("hf-hub:timm/vit_base_patch16_224.mae", "timm has no"),
        ("hiera_tiny_224.mae", "gives no map of features for images of 224 pixels: normalization of features not"),
    ],
)
def test_a_name_that_is_none_is_told(name, wanted):
    with pytest.raises(ValueError, match=rf"foundation\.model_name: .*{wanted}"):
        FoundationModel.from_config(FoundationConfig(model_name=name), GRID, pretrained=False)


# Normalisation


@pytest.mark.parametrize(
    "normalization, stated", [("imagenet", IMAGENET), ("published", HALF), ("model", STATED["clip"])]
)
def test_normalization_is_as_asked(normalization, stated):
    config = section("clip-b", normalization=normalization)
    model = FoundationModel.from_config(config, GRID, pretrained=False)
    x = images()
    close("normalised", model.prepare(x), normalised(x, *stated).float(), atol=2e-6)
    if normalization == "published":
        assert torch.equal(model.prepare(x), x)


def test_a_name_without_tag_is_of_timms_default_weights_and_that_is_logged(caplog, tmp_path):
    network = timm_network("clip-b")
    write_tensors(tmp_path / "weights.safetensors", network.state_dict())
    architecture = SHORT_NAMES["clip-b"].partition(".")[0]
    config = section("clip-b", weights=str(tmp_path / "weights.safetensors")).model_copy(
        update={"model_name": architecture}
    )
    with caplog.at_level(logging.INFO, logger="vavae.foundation.model"):
        caplog.clear()
        model = FoundationModel.from_config(config, 3)
    tag = timm.get_pretrained_cfg(architecture).tag
    assert tag and f"timm's {architecture}.{tag}, weights from {tmp_path}" in caplog.text
    assert "images of 48 pixels, mean (0.48145466," in caplog.text and "resampled" not in caplog.text
    assert torch.equal(model.shift, FoundationModel.from_config(section("clip-b"), 3, pretrained=False).shift)


def test_a_model_of_no_stated_mean_and_std_says_what_to_set(tmp_path):
    config = FoundationConfig(model_name="vit_base_patch16_gap_224", model_args=small(""), weights="none.pt")
    with pytest.raises(
        ValueError, match=r"foundation\.normalization is model.*'vit_base_patch16_gap_224': set found.*imag"
    ):
        FoundationModel.from_config(config, GRID, pretrained=False)
    as_it_is = config.model_copy(update={"normalization": "published"})
    assert FoundationModel.from_config(as_it_is, GRID, pretrained=False)(images()).shape == (2, 32, GRID, GRID)
    with pytest.raises(ValueError, match=r"foundation\.model_name: timm has no weights of 'vit_base_patch16_gap_224'"):
        FoundationModel.from_config(config.model_copy(update={"weights": None}), GRID, pretrained=False)


# Grids


@pytest.mark.parametrize("size, grid", [(48, 4), (112, 4), (80, 3), (64, 4)])
def test_features_of_another_grid_are_resampled_to_the_latents(size, grid):
    config = section("siglip2-b", input_size=size)
    torch.manual_seed(0)
    model = FoundationModel.from_config(config, grid, pretrained=False)
    x = images()
    own = model.vit.forward_intermediates(model.prepare(x), indices=1, norm=True, intermediates_only=True)[0].double()
    assert own.shape[-1] == size // 16
    want = F.interpolate(own, size=grid, mode="bilinear", align_corners=False, antialias=size // 16 > grid)
    assert model(x).shape == (2, 32, grid, grid)
    close("features", model(x), want.float(), atol=1e-6)


def test_a_model_of_one_size_is_fed_that_as_timm_resizes_to_it():
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    config = FoundationConfig(model_name="cait_xxs24_224.fb_dist_in1k", model_args=arguments)
    model = FoundationModel.from_config(config, 6, pretrained=False)
    x = images()
    assert model.input_size == 32  # not 6 × 8
    fed = F.interpolate(normalised(x, *IMAGENET), size=32, mode="bicubic", align_corners=False, antialias=True)
    own = model.vit.forward_intermediates(fed.float(), indices=1, norm=True, intermediates_only=True)[0]
    want = F.interpolate(own.double(), size=6, mode="bilinear", align_corners=False).float()
    close("features", model(x), want, atol=1e-5)
    with pytest.raises(ValueError, match=r"'cait_xxs24_224\S*' gives no map of features for images of 48 pixels"):
        FoundationModel.from_config(config.model_copy(update={"input_size": 48}), 6, pretrained=False)


def test_a_convolutional_network_gives_features_too():
    model = FoundationModel.from_config(FoundationConfig(model_name="test_resnet"), 2, pretrained=False)
    want = model.vit.forward_features(model.prepare(images()))
    assert model.input_size == 64 and not model.vit.training
    close("features", model(images()), want, atol=1e-6)


@pytest.mark.parametrize("size, allowed", [(34, "32 or 48"), (7, "16")])
def test_an_input_size_that_is_no_multiple_of_the_patch_is_refused(size, allowed):
    with pytest.raises(
        ValueError, match=rf"input_size {size} is no multiple of the patch .*16 pixels.: use {allowed}, or"
    ):
        FoundationModel.from_config(section("mae-b", input_size=size), GRID, pretrained=False)


# Dtypes, devices, tracing


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_leaves_normalisation_and_positions_in_float32(name):
    torch.manual_seed(0)
    model = FoundationModel.from_config(section(name), GRID, pretrained=False)
    x = images(size=50)
    features, fed = model(x), model.prepare(x)
    rotary = dict(model.vit.rope.named_buffers()) if getattr(model.vit, "rope", None) else {}
    before = {"shift": model.shift, "scale": model.scale} | rotary
    model.to(torch.bfloat16)
    after = {"shift": model.shift, "scale": model.scale} | (dict(model.vit.rope.named_buffers()) if rotary else {})
    assert bool(rotary) == (name.split("-")[0] in ("dinov3", "eva02", "pe"))
    for key, value in before.items():
        assert after[key].dtype == torch.float32 and torch.equal(after[key], value), key
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.prepare(x), fed.bfloat16())  # resized and normalised before it was rounded
    got = model(x)
    assert got.dtype == torch.bfloat16
    assert (got.float() - features).norm() < 0.02 * features.norm()


def test_bfloat16_features_are_resampled_in_float32():
    torch.manual_seed(0)
    model = FoundationModel.from_config(section("mae-b", input_size=112), 4, pretrained=False).to(torch.bfloat16)
    own = model.vit.forward_intermediates(model.prepare(images()), indices=1, norm=True, intermediates_only=True)[0]
    want = F.interpolate(own.double(), size=4, mode="bilinear", align_corners=False, antialias=True).bfloat16()
    assert own.dtype == torch.bfloat16 and (model(images()) == want).double().mean() > 0.99


class Mixed(TorchDispatchMode):
    """Operators that bring a tensor on the CPU together with one elsewhere."""

    def __init__(self):
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        if len({tensor.device for tensor in tensors}) > 1:
            self.seen.add(func._schema.name)
        return result


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pass_copies_nothing_to_the_device(name):
    """What is made on the CPU in each pass makes the host wait for the device, and ends CUDA graphs."""
    with torch.device("meta"):
        model, x = FoundationModel.from_config(section(name), GRID, pretrained=False), torch.empty(2, 3, 50, 50)
    with Mixed() as mixed:
        assert model(x).shape[-1] == GRID
    assert mixed.seen == set()
    with Mixed() as mixed:
        x + torch.ones(50).sum()  # seen, as a number in a tensor would be
    assert mixed.seen == {"aten::add"}


@pytest.mark.parametrize("name", ["dinov2-s-reg", "dinov3-b", "sam-b"])
def test_a_pass_is_one_graph(name):
    torch.manual_seed(0)
    config = section(name, input_size=42 if "v2" in name else 48, model_args={"depth": 1})
    model = FoundationModel.from_config(config, GRID, pretrained=False)
    traced = torch.compile(model.forward, fullgraph=True, backend="aot_eager")(images())
    close("features", traced, model(images()), atol=1e-5)


# Cost


@pytest.mark.parametrize("name", ["clip-b", "sam-b"])
def test_cost_is_counted_without_weights(name):
    tokenizer = AutoencoderConfig(
        ch=32, ch_mult=(1, 1, 1, 1, 1), num_res_blocks=1, attn_resolutions=(), resolution=PIXELS
    )
    loss = LossConfig(perceptual="none", disc_weight=0.0)
    cost = training_cost(tokenizer, section(name), loss, PIXELS)
    network = FoundationModel.from_config(section(name), GRID, pretrained=False)
    assert cost["frozen"].parameters == sum(p.numel() for p in network.vit.parameters())
    products = 2 * (PIXELS // 16) ** 2 * sum(b.attn.proj.weight.numel() for b in network.vit.blocks)
    assert cost["frozen"].trainable == 0 and cost["frozen"].flops > 10 * products
