"""Tokenizers in the layout of diffusers, written and read, beside its own `AutoencoderKL`."""

import inspect
import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import kernels
from common.tensors import WeightsError, read_tensors, write_tensors
from vavae.config import AutoencoderConfig, LossConfig
from vavae.diffusers_layout import (
    DiffusersConfig,
    from_diffusers,
    inexpressible,
    is_diffusers,
    sizes,
    to_diffusers,
    write_folder,
)
from vavae.model import AutoencoderKL
from vavae.sizes import infer_config
from vavae.task import VavaeTask, build_networks
from vavae.weights import fingerprint, load_tokenizer, split_tokenizer

OPS = kernels.select("reference")
WEIGHTS = "diffusion_pytorch_model.safetensors"
#: Every documented size, and one in which no two numbers of a kind are equal.
CONFIGS = {name: {"size": name} for name in AutoencoderConfig.SIZES} | {
    "uneven": {
        "ch": 32,
        "ch_mult": (1, 3, 2),
        "num_res_blocks": 3,
        "embed_dim": 5,
        "z_channels": 5,
        "attn_resolutions": (256, 64),
        "decoder_attn_resolutions": (128,),
        "in_channels": 1,
        "out_ch": 4,
    }
}
SMALL = {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "embed_dim": 4, "z_channels": 4, "attn_resolutions": (8,)}
SMALL_CONFIG = AutoencoderConfig(**SMALL, resolution=16)


@pytest.fixture(scope="module")
def diffusers():
    found = pytest.importorskip("diffusers", reason="diffusers is not installed (pip install '.[test]')")
    found.utils.logging.set_verbosity_error()  # it advises to install accelerate
    return found


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """The module with weights under which every layer matters: no bias is zero, no gain one, and attention is sharp."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            fan_in = max(1, p[0].numel()) if p.ndim > 1 else 1
            p.copy_(
                noise * (1.5 / fan_in) ** 0.5 if p.ndim > 1 else noise * 0.1 + ("norm" in name and "weight" in name)
            )
    return module.eval().requires_grad_(False)


def tokenizer(config: AutoencoderConfig) -> AutoencoderKL:
    return randomised(AutoencoderKL(config, OPS))


def write(folder: Path, model: AutoencoderKL, **said) -> Path:
    folder.mkdir()
    write_folder(folder, model.state_dict(), model.config, **said)
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return write(tmp_path / "tokenizer", tokenizer(SMALL_CONFIG))


def edited(folder: Path, **fields) -> Path:
    """The folder with other values in its config; without those that are None."""
    content = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return folder


def images(config: AutoencoderConfig, batch: int = 2) -> torch.Tensor:
    side = 2 * config.downsample_ratio
    shape = (batch, config.in_channels, side, side + config.downsample_ratio)
    return 2 * torch.rand(shape, generator=torch.Generator().manual_seed(1)) - 1


def assert_equal(ours: AutoencoderKL, theirs, dtype: torch.dtype, tolerance: float) -> None:
    """Means, log variances and decoded latents of both, to `tolerance` times the largest number of each."""
    ours, theirs, x = ours.to(dtype), theirs.to(dtype).eval(), images(ours.config).to(dtype)
    with torch.no_grad():
        mine, other = ours.encode(x), theirs.encode(x).latent_dist
        pairs = [(mine.mean, other.mean), (mine.logvar, other.logvar)]
        pairs.append((ours.decode(mine.mean), theirs.decode(mine.mean).sample))
    for a, b in pairs:
        assert a.shape == b.shape and a.dtype == b.dtype == dtype and b.std() > 0.1
        assert (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1)


# Names and shapes


@pytest.mark.parametrize("name", CONFIGS)
def test_names_and_shapes_are_those_of_diffusers(diffusers, name):
    """At full size, of an `AutoencoderKL` that diffusers builds from our config, and back again."""
    config = AutoencoderConfig(**CONFIGS[name])
    with torch.device("meta"):
        ours = AutoencoderKL(config, OPS).state_dict()
        theirs = diffusers.AutoencoderKL(**sizes(config)).state_dict()
    there = to_diffusers(ours, config)
    assert {k: v.shape for k, v in there.items()} == {k: v.shape for k, v in theirs.items()}
    assert is_diffusers(there) and not is_diffusers(ours)
    back = from_diffusers(theirs, "x")
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in ours.items()}
    assert infer_config(theirs, "x") == config


def test_the_fields_of_a_config_are_those_of_diffusers(diffusers, folder):
    """Names and defaults; all that diffusers knows is written."""
    parameters = inspect.signature(diffusers.AutoencoderKL.__init__).parameters
    theirs = {name: p.default for name, p in parameters.items() if name != "self"}
    assert {k: v for k, v in DiffusersConfig().model_dump().items() if k != "class_name"} == theirs
    written = json.loads((folder / "config.json").read_text())
    assert {key for key in written if not key.startswith("_")} == theirs.keys()
    assert written["_diffusers_version"] == diffusers.__version__


# Numbers


@pytest.mark.parametrize("name", CONFIGS)
def test_diffusers_computes_the_same_from_what_is_written(diffusers, tmp_path, name):
    config = AutoencoderConfig(**{"ch": 32} | CONFIGS[name])
    model = tokenizer(config)
    path = write(tmp_path / "x", model, weights="ema")
    theirs, report = diffusers.AutoencoderKL.from_pretrained(path, output_loading_info=True)
    assert not any(report.values()) and theirs.config["_exported"] == {"weights": "ema"}
    assert_equal(model, theirs, torch.float32, 1e-5)
    again = load_tokenizer(path, OPS)
    assert again.config == config and fingerprint(again) == fingerprint(model)
    assert_equal(model, theirs, torch.float64, 1e-12)


def saved(diffusers, folder: Path, **fields):
    """An `AutoencoderKL` with attention in a level as diffusers saves it, and the model."""
    fields = sizes(SMALL_CONFIG) | {"sample_size": 16} | fields
    model = randomised(diffusers.AutoencoderKL(**fields))
    model.save_pretrained(folder)
    return model


def as_bin(folder: Path) -> Path:
    torch.save(read_tensors(folder / WEIGHTS), folder / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    return folder


def without_config(folder: Path) -> Path:
    (folder / "config.json").unlink()
    return folder


def as_older(folder: Path) -> Path:
    """With the names that attention had before diffusers 0.18, and a config of that time."""
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    pattern = re.compile(r"\.(to_[qkv]|to_out\.0)\.")
    tensors = {
        pattern.sub(lambda m: f".{names[m[1]]}.", key): value for key, value in read_tensors(folder / WEIGHTS).items()
    }
    assert any("proj_attn" in key for key in tensors)
    write_tensors(folder / WEIGHTS, tensors)
    later = ("shift_factor", "latents_mean", "latents_std", "force_upcast", "scaling_factor", "mid_block_add_attention")
    return edited(folder, **dict.fromkeys((*later, "use_quant_conv", "use_post_quant_conv")))


FILES = {
    "folder": lambda folder: folder,
    "file": lambda folder: folder / WEIGHTS,
    "bin": as_bin,
    "bin file": lambda folder: as_bin(folder) / "diffusion_pytorch_model.bin",
    "without config": without_config,
    "older names": as_older,
}


@pytest.mark.parametrize("kind", FILES)
def test_what_diffusers_saves_is_read(diffusers, tmp_path, kind):
    theirs = saved(diffusers, tmp_path / "vae")
    model = load_tokenizer(FILES[kind](tmp_path / "vae"), OPS)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert_equal(model, theirs, torch.float32, 1e-5)
    assert model.config.embed_dim == 4 and (model.config == SMALL_CONFIG) is (kind != "without config")
    assert_equal(model, theirs, torch.float64, 1e-12)


@pytest.mark.parametrize("used", [(False, False), (True, False)])
def test_an_autoencoder_without_1x1_convolutions_is_read(diffusers, tmp_path, used):
    """As those of Stable Diffusion 3 and FLUX are; only where a config says so, or a file cut short would pass."""
    theirs = saved(diffusers, tmp_path / "vae", use_quant_conv=used[0], use_post_quant_conv=used[1])
    model = load_tokenizer(tmp_path / "vae", OPS)
    assert_equal(model, theirs, torch.float32, 1e-5)
    again = load_tokenizer(write(tmp_path / "again", model), OPS)
    assert fingerprint(again) == fingerprint(model)
    with pytest.raises(WeightsError, match=r"use_(post_)?quant_conv is True, the tensors have False|has no post_quant"):
        load_tokenizer(edited(tmp_path / "vae", use_quant_conv=True, use_post_quant_conv=True), OPS)
    with pytest.raises(WeightsError, match=r"has no post_quant_conv\.weight"):
        load_tokenizer(without_config(tmp_path / "vae"), OPS)


def test_16_bits_are_widened(diffusers, tmp_path):
    theirs = saved(diffusers, tmp_path / "vae").half()
    theirs.save_pretrained(tmp_path / "half", variant="fp16")
    model = load_tokenizer(tmp_path / "half" / "diffusion_pytorch_model.fp16.safetensors", OPS)
    assert next(model.parameters()).dtype == torch.float32
    assert_equal(model, theirs, torch.float32, 1e-5)


# What does not fit


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            lambda t: t | {"encoder.down_blocks.0.attn.q.weight": torch.zeros(1)},
            "1 keys belong to no part of one: enc.*q",
        ),
        (lambda t: t | {"decoder.extra.weight": torch.zeros(1)}, r"1 keys belong to no part of one: decoder\.extra\.w"),
        (
            lambda t: t | {"encoder.down.0.block.0.conv1.bias": torch.zeros(1)},
            "1 keys belong .*down.0.block.0.conv1.bias",
        ),
        (lambda t: t | {"encoder.conv_in.gain": torch.zeros(1)}, r"1 keys belong .*: encoder\.conv_in\.gain"),
        (
            lambda t: {k: v for k, v in t.items() if k != "decoder.up_blocks.0.resnets.1.conv2.bias"},
            r"keys under VA-VAE's names, as a tokenizer does not fit: 1 missing: decoder\.up\.1\.block\.1\.conv2\.bias",
        ),
        (
            lambda t: t | {"encoder.mid_block.attentions.0.query.weight": torch.zeros(64, 64)},
            r"a parameter twice, once as encoder\.mid_block\.attentions\.0\.query\.weight",
        ),
        (
            lambda t: t | {"decoder.mid_block.attentions.0.to_q.weight": torch.zeros(64, 63)},
            r"decoder\.mid\.attn_1\.q\.weight \[64, 63, 1, 1\] where the model has \[64, 64, 1, 1\]",
        ),
        (lambda t: t | {"quant_conv.bias": torch.full((8,), torch.nan)}, r"1 not finite: quant_conv\.bias"),
        (
            lambda t: {k: v for k, v in t.items() if not k.startswith("encoder.down_blocks.1")},
            r"is not a tokenizer of this layout|contradict|does not fit",
        ),
    ],
)
@pytest.mark.parametrize("told", [False, True])
def test_keys_that_do_not_fit_are_named(folder, change, why, told):
    write_tensors(folder / WEIGHTS, change(read_tensors(folder)))
    with pytest.raises(WeightsError, match=rf"tokenizer.*{why}"):
        load_tokenizer(folder, OPS, SMALL_CONFIG if told else None)


CONTRADICTIONS = {
    "in_channels": 1,
    "out_channels": 4,
    "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"],
    "block_out_channels": [32, 96],
    "layers_per_block": 2,
    "latent_channels": 8,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("field", CONTRADICTIONS)
def test_a_config_that_contradicts_the_tensors_is_named(folder, field, told):
    edited(folder, **{field: CONTRADICTIONS[field]})
    with pytest.raises(
        WeightsError, match=f"tokenizer and the config.json beside it contradict each other: {field} is"
    ):
        load_tokenizer(folder, OPS, SMALL_CONFIG if told else None)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"_class_name": "AutoencoderTiny"}, "_class_name is 'AutoencoderTiny', not 'AutoencoderKL'"),
        ({"_class_name": None}, "_class_name is None"),
        ({"norm_num_groups": 16}, "norm_num_groups is 16, not 32"),
        ({"act_fn": "relu"}, "act_fn is 'relu', not 'silu'"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention is false"),
        ({"tanh_latents": True}, "tanh_latents: not known"),
        ({"latent_channels": "4"}, "damaged: latent_channels"),
        ({"scaling_factor": [1]}, "damaged: scaling_factor"),
    ],
)
def test_a_config_of_another_network_is_refused(folder, fields, why):
    edited(folder, **fields)
    with pytest.raises(WeightsError, match=rf"config\.json.*{why}"):
        load_tokenizer(folder, OPS)
    (folder / "config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"config\.json is damaged: no JSON"):
        load_tokenizer(folder, OPS)


def test_other_folders_stay_what_they_are(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match="x is a directory, not a file"):
        load_tokenizer(tmp_path / "x", OPS)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"ch_mult": (2, 2)}, r"first convolution has 32 channels and its first level 64.*block_out_channels"),
        ({"embed_dim": 3}, r"3 embed_dim and 4 z_channels.*latent_channels"),
    ],
)
def test_what_diffusers_cannot_express_is_said(change, why):
    (reason,) = inexpressible(AutoencoderConfig(**SMALL | {"resolution": 16} | change))
    assert re.search(why, reason) and inexpressible(SMALL_CONFIG.model_copy(update={"dropout": 0.5})) == []


# What a config says of latents


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"scaling_factor": 0.18215},
            r"train on z · 0\.18215;.*data\.latent_norm=false data\.latent_multiplier=0\.18215 do",
        ),
        ({"scaling_factor": None}, r"train on z · 0\.18215;"),  # the default of diffusers
        ({"scaling_factor": 0.3611, "shift_factor": 0.1159}, r"train on \(z − 0\.1159\) · 0\.3611;.*section says$"),
        ({"latents_mean": [0.5] * 4, "latents_std": [2.0] * 4}, r"train on \(z − latents_mean\) / latents_std;.*says$"),
        ({"scaling_factor": 1}, None),
    ],
)
def test_the_scale_of_latents_is_said_and_not_applied(folder, caplog, fields, says):
    before = load_tokenizer(folder, OPS)
    caplog.clear()
    with caplog.at_level(logging.INFO, "vavae.weights"):
        model = load_tokenizer(edited(folder, **fields), OPS)
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert len(messages) == (says is not None) and all(re.search(says, message) for message in messages)
    assert fingerprint(model) == fingerprint(before)
    x = images(model.config)
    assert torch.equal(model.encode(x).mean, before.encode(x).mean)


def test_training_starts_from_a_folder(folder):
    """What `train.weight_init` loads, also into a run with a projection to features, which the folder has not."""
    loss = LossConfig(use_vf=False, disc_weight=0)
    task = SimpleNamespace(networks=build_networks(SMALL_CONFIG, loss, OPS, 0, None))
    for path in (folder, folder / WEIGHTS):
        VavaeTask.load_weights(task, str(path))
        assert fingerprint(task.networks["autoencoder"]) == fingerprint(load_tokenizer(folder, OPS))
    assert not split_tokenizer(read_tensors(folder), folder).dropped
    task.networks = build_networks(SMALL_CONFIG, LossConfig(), OPS, 0, 8)
    before = task.networks["autoencoder"].linear_proj.weight.clone()
    VavaeTask.load_weights(task, str(folder))
    network = task.networks["autoencoder"]
    assert torch.equal(network.linear_proj.weight, before)
    assert torch.equal(network.quant_conv.weight, load_tokenizer(folder, OPS).quant_conv.weight)
