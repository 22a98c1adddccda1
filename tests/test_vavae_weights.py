"""Tokenizer files: published layouts sorted and loaded strictly, exports that come back, and files that do not fit."""

import json
import logging
import resource

import pytest
import torch

import kernels
from common.tensors import WeightsError, load_strict, read_tensors, write_tensors
from tests.golden import G, J
from vavae.config import AutoencoderConfig, LossConfig
from vavae.model import AutoencoderKL
from vavae.sizes import infer_config
from vavae.task import build_networks
from vavae.weights import fingerprint, load_tokenizer, split_tokenizer, write_export

OPS = kernels.select("reference")
TINY = AutoencoderConfig(**J("04_vae_tiny")["tiny_config"])


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return G("04_vae_tiny").group("param/")


def training_checkpoint(tensors) -> dict:
    """The published training layout in small: what the trainer of the published code would have saved."""
    networks = build_networks(TINY, LossConfig(disc_ndf=8, use_vf=False), OPS, 0, None)
    return {
        **tensors,
        "linear_proj.weight": torch.ones(24, 4, 1, 1),
        **{f"loss.discriminator.{k}": v for k, v in networks["discriminator"].state_dict().items()},
        "loss.logvar": torch.zeros(()),
        "loss.perceptual_loss.lin0.model.1.weight": torch.zeros(1, 64, 1, 1),
        "foundation_model.model.cls_token": torch.zeros(1, 1, 24),
        "foundation_model.model.norm.weight": torch.zeros(24),
    }


def test_published_training_layout_is_sorted_without_rest():
    recorded = J("05_vae_real_training_keys")
    parts = split_tokenizer({k: torch.empty(s, device="meta") for k, s in recorded["state_dict"].items()}, "x")
    counts = recorded["counts"]
    assert len(parts.autoencoder) == sum(
        counts[k] for k in ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "linear_proj.")
    )
    assert len(parts.discriminator) == counts["loss.discriminator."]
    assert parts.dropped == {k: counts[k] for k in ("foundation_model.", "loss.perceptual_loss.", "loss.logvar")}
    with torch.device("meta"):
        networks = build_networks(AutoencoderConfig(size="f16d32"), LossConfig(), OPS, 0, 1024)
    load_strict(networks["autoencoder"], parts.autoencoder, "recorded")
    load_strict(networks["discriminator"], parts.discriminator, "recorded")


@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: {"state_dict": t, "global_step": 7}])
def test_published_checkpoint_becomes_a_tokenizer_and_says_what_it_left_out(tensors, tmp_path, caplog, wrap):
    torch.save(wrap(training_checkpoint(tensors)), tmp_path / "vae.ckpt")
    with caplog.at_level(logging.INFO):
        model = load_tokenizer(tmp_path / "vae.ckpt", OPS, TINY)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, tensors[key]) for key, value in model.state_dict().items())
    (message,) = caplog.messages
    for part in (
        "2 tensors foundation_model.",
        "1 tensor loss.logvar",
        "1 tensor linear_proj.",
        "22 tensors loss.discriminator.",
    ):
        assert part in message


def test_export_comes_back_with_its_config(tensors, tmp_path):
    write_export(tmp_path / "deep/tokenizer.v2", tensors, TINY, step=12, weights="model")
    document = json.loads((tmp_path / "deep/tokenizer.v2.json").read_text())
    assert (document["kind"], document["step"], document["weights"]) == ("vavae", 12, "model")
    model = load_tokenizer(tmp_path / "deep/tokenizer.v2.safetensors", OPS)
    assert model.config == TINY
    assert all(torch.equal(value, tensors[key]) for key, value in model.state_dict().items())
    assert [path.name for path in (tmp_path / "deep").iterdir() if path.name.startswith(".")] == []


def test_an_export_cut_short_leaves_the_one_before(tmp_path):
    """A disk that takes no file of more than 100 kB: the weights fit on it, what is said of them does not."""
    write_export(tmp_path / "net", {"a": torch.zeros(3)}, TINY, step=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_export(tmp_path / "net", {"a": torch.ones(3)}, TINY, step=2, note="x" * 200_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name in before} == before
    write_export(tmp_path / "net", {"a": torch.ones(3)}, TINY, step=2)
    assert json.loads((tmp_path / "net.json").read_text())["step"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.json", "net.safetensors"]


def test_fingerprint_is_of_the_weights_not_the_file(tensors, tmp_path):
    write_tensors(tmp_path / "a.safetensors", tensors)
    torch.save({"state_dict": training_checkpoint(tensors)}, tmp_path / "b.pt")
    first, second = (load_tokenizer(tmp_path / name, OPS, TINY) for name in ("a.safetensors", "b.pt"))
    assert fingerprint(first) == fingerprint(second)
    with torch.no_grad():
        second.encoder.conv_in.bias[0] += 1e-6
    assert fingerprint(first) != fingerprint(second)


def test_differences_are_all_named(tensors, tmp_path):
    wrong = {k: v for k, v in tensors.items() if k != "quant_conv.bias"}
    wrong |= {"encoder.extra": torch.zeros(1), "encoder.conv_in.bias": torch.zeros(5)}
    write_tensors(tmp_path / "vae.safetensors", wrong)
    with pytest.raises(WeightsError) as error:
        load_tokenizer(tmp_path / "vae.safetensors", OPS, TINY)
    for part in (
        "vae.safetensors",
        "1 missing: quant_conv.bias",
        "1 unexpected: encoder.extra",
        "encoder.conv_in.bias [5] where the model has [32]",
    ):
        assert part in str(error.value)


def test_a_failed_load_changes_nothing(tensors):
    network = build_networks(TINY, LossConfig(use_vf=False), OPS, 0, None)["autoencoder"]
    before = fingerprint(network)
    with pytest.raises(WeightsError):
        load_strict(network, {k: v for k, v in tensors.items() if k != "quant_conv.bias"}, "cut")
    assert fingerprint(network) == before


def test_keys_of_no_part_are_named(tensors):
    with pytest.raises(
        WeightsError, match=r"w\.pt is not a tokenizer: 1 keys belong to no part of one: model\.encoder"
    ):
        split_tokenizer({**tensors, "model.encoder": torch.zeros(1)}, "w.pt")


def test_unreadable_files_are_named(tensors, tmp_path):
    with pytest.raises(WeightsError, match=r"gone\.pt does not exist"):
        read_tensors(tmp_path / "gone.pt")
    write_tensors(tmp_path / "cut.safetensors", tensors)
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:-8])
    torch.save(tensors, tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:-100])
    torch.save({"state_dict": tensors, "callback": logging.Formatter()}, tmp_path / "code.ckpt")
    torch.save([1, 2], tmp_path / "list.pt")
    reasons = {"cut.safetensors": "damaged", "cut.pt": "damaged", "code.ckpt": "logging.Formatter", "list.pt": "list"}
    for name, reason in reasons.items():
        with pytest.raises(WeightsError, match=f"{name}.*{reason}"):
            read_tensors(tmp_path / name)


# Sizes read off the tensors

CONFIGS = {name: {"size": name} for name in AutoencoderConfig.SIZES} | {
    "uneven": {
        "ch": 32,
        "ch_mult": (1, 3, 2),
        "num_res_blocks": 3,
        "embed_dim": 5,
        "z_channels": 7,
        "attn_resolutions": (256, 64),
        "decoder_attn_resolutions": (128,),
        "in_channels": 1,
        "out_ch": 4,
    },
    "without attention": {"ch": 64, "ch_mult": (1,), "num_res_blocks": 1, "attn_resolutions": ()},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_sizes_are_read_off_the_tensors(name):
    config = AutoencoderConfig(**CONFIGS[name])
    with torch.device("meta"):
        state = AutoencoderKL(config, OPS).state_dict()
    assert infer_config(state, "vae.pt") == config


@pytest.mark.parametrize(("recorded", "size"), [("vavae_f16d32", "f16d32"), ("marvae_f16d16", "mar-f16d16")])
def test_sizes_of_published_tensors_are_the_documented(recorded, size):
    shapes = J("04_vae_real_f16d32")[recorded]["state_dict"]
    tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    assert infer_config(tensors, "vae.pt") == AutoencoderConfig(size=size)


def test_a_published_file_alone_becomes_the_same_tokenizer(tensors, tmp_path):
    torch.save({"state_dict": training_checkpoint(tensors)}, tmp_path / "vae.pt")
    told, read = load_tokenizer(tmp_path / "vae.pt", OPS, TINY), load_tokenizer(tmp_path / "vae.pt", OPS)
    images = torch.rand(2, 3, 64, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(told.encode(images).mean, read.encode(images).mean)
    assert torch.equal(told(images)[0], read(images)[0])


OTHERS = {
    "diffusers": (
        ["encoder.conv_in.weight", "encoder.down_blocks.0.resnets.0.norm1.weight", "quant_conv.weight"],
        r"vae\.pt(, its keys under VA-VAE's names,)? (is not a tokenizer|does not have|as a tokenizer does not fit)",
    ),
    "diffusers decoder": (
        ["decoder.up_blocks.3.resnets.0.conv1.bias"],
        r"vae\.pt(, its keys under VA-VAE's names,)? (is not a tokenizer|as a tokenizer does not fit)",
    ),
    "classifier": (["conv1.weight"], r"vae\.pt is not a tokenizer of this layout: it has no encoder\.conv_in\.weight"),
    "encoder alone": (["encoder.conv_in.weight"], r"vae\.pt (is not|does not have the sizes of) a tokenizer"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_tensors_of_something_else_are_named(tmp_path, name):
    keys, message = OTHERS[name]
    torch.save({key: torch.zeros(32, 3, 3, 3) for key in keys}, tmp_path / "vae.pt")
    with pytest.raises(WeightsError, match=message):
        load_tokenizer(tmp_path / "vae.pt", OPS)
    if name.startswith("diffusers"):
        with pytest.raises(WeightsError, match=message):
            load_tokenizer(tmp_path / "vae.pt", OPS, TINY)


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("encoder.conv_in.weight", (31, 3, 3, 3)),
        ("encoder.conv_in.weight", (32,)),
        ("post_quant_conv.weight", (4,)),
        ("encoder.down.0.block.0.conv1.weight", (33, 32, 3, 3)),
        ("decoder.conv_out.weight", ()),
        ("encoder.conv_in.weight", (0, 3, 3, 3)),
    ],
)
def test_sizes_that_no_tokenizer_has_are_named(tensors, key, shape):
    with pytest.raises(WeightsError, match=r"vae\.pt does not have the sizes of a tokenizer"):
        infer_config({**tensors, key: torch.zeros(shape)}, "vae.pt")


def test_the_json_beside_a_file_must_be_a_tokenizers(tensors, tmp_path):
    write_tensors(tmp_path / "vae.safetensors", tensors)
    (tmp_path / "vae.json").write_text('{"kind": "lightningdit", "config": {}}')
    with pytest.raises(ValueError, match="'lightningdit', not 'vavae'"):
        load_tokenizer(tmp_path / "vae.safetensors", OPS)
