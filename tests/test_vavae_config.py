"""Config sections of tokenizer runs, the published YAML, and the stages of the released recipe."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from pydantic import ValidationError

from tests.published import TOKENIZER_YAML
from vavae.config import (
    AutoencoderConfig,
    DataConfig,
    FoundationConfig,
    LossConfig,
    StageConfig,
    check_sections,
    loss_at,
)
from vavae.discriminator import NLayerDiscriminator
from vavae.published import disc_start_in_iterations, from_published

ROOT = Path(__file__).parent.parent


def published() -> dict:
    return yaml.safe_load(TOKENIZER_YAML)


def refuses(pattern: str, function, *args, **kwargs):
    with pytest.raises(ValueError, match=pattern):
        function(*args, **kwargs)


def test_published_yaml_becomes_our_sections():
    sections, notes = from_published(published())
    assert sections["preset"] == "paper" and sections["ckpt_path"] == "/path/to/ckpt"
    assert AutoencoderConfig(**sections["model"]) == AutoencoderConfig(size="f16d32")
    foundation = FoundationConfig(**sections["foundation"])
    assert foundation.model_name == "vit_large_patch14_dinov2.lvd142m"
    assert "normalization" not in foundation.model_fields_set  # `preset: paper` says it of this model
    loss = LossConfig(**sections["loss"])
    assert (loss.disc_start, loss.kl_weight, loss.disc_weight, loss.vf_weight) == (2501, 1e-6, 0.5, 0.1)
    assert (loss.distmat_margin, loss.cos_margin, loss.adaptive_vf, loss.reverse_proj) == (0.25, 0.5, True, True)
    assert loss.reconstruction == "sum" and loss.use_vf and not loss.proj_fix
    data = DataConfig(**sections["data"])
    assert (data.data_path, data.valid_path, data.image_size) == ("/path/to/train", "/path/to/val", 256)
    assert sections["train"] == {"max_epochs": 50, "global_batch_size": 256, "precision": "float32"}
    assert float(sections["optimizer"]["lr"]) == 1e-4
    for said in ("model.target", "lightning.trainer.strategy", "data.params.wrap", "2501 iterations", "= 256"):
        assert any(said in note for note in notes), said


def test_published_yaml_without_foundation_model_has_no_vf_term():
    document = published()
    del document["model"]["params"]["use_vf"]
    sections, _ = from_published(document)
    assert "foundation" not in sections and sections["loss"]["use_vf"] is False


def test_absent_published_values_are_those_of_the_published_loss_not_ours():
    document = published()
    document["model"]["params"]["lossconfig"]["params"] = {"vf_weight": 0.5}
    loss = LossConfig(**from_published(document)[0]["loss"])
    assert (loss.distmat_margin, loss.cos_margin, loss.adaptive_vf) == (0.0, 0.0, False)


@pytest.mark.parametrize("start, iterations", [(0, 0), (1, 1), (2, 1), (5000, 2500), (5001, 2501)])
def test_disc_start_counts_both_optimizers(start, iterations):
    # The generator of batch i sees the count 2·i: the first batch with the GAN is the smallest i with 2·i >= start.
    assert disc_start_in_iterations(start) == iterations == next(i for i in range(9999) if 2 * i >= start)


@pytest.mark.parametrize(
    "path, value, error",
    [
        (["weight_intt"], 1, r"unknown key weight_intt \(did you mean 'weight_init'"),
        (["model", "params", "embed_dims"], 1, r"unknown key model\.params\.embed_dims \(did you mean 'embed_dim'"),
        (["model", "params", "ddconfig", "chmult"], 1, r"unknown key model\.params\.ddconfig\.chmult .*'ch_mult'"),
        (["model", "params", "lossconfig", "params", "vf_wieght"], 1, r"params\.vf_wieght \(did you mean 'vf_weight'"),
        (["data", "params", "train", "params", "data_roots"], 1, r"data_roots \(did you mean 'data_root'"),
        (["lightning", "trainer", "max_epoch"], 1, r"max_epoch \(did you mean 'max_epochs'"),
        (["model", "params", "use_vf"], "dinov3", r"use_vf: 'dinov3' is not one of dinov2, mae"),
        (["model", "params", "lossconfig", "params", "disc_start"], "soon", "disc_start: a whole number is wanted"),
        (["data", "params", "batch_size"], 8.5, r"batch_size: a whole number is wanted \(got 8.5"),
        (["lightning", "trainer", "precision"], 16, r"precision: 16 is not one of"),
        (["model", "params"], "none", r"model\.params: a mapping of keys to values is wanted \(got 'none'"),
    ],
)
def test_faults_of_a_published_yaml_are_named(path, value, error):
    document = published()
    section = document
    for key in path[:-1]:
        section = section[key]
    section[path[-1]] = value
    refuses(error, from_published, document)


def training(document) -> None:
    """Check the sections of a published document as training does."""
    sections, _ = from_published(document)
    model, loss, data = (cls(**sections[name]) for name, cls in SECTIONS.items())
    foundation = FoundationConfig(**sections["foundation"]) if "foundation" in sections else None
    check_sections(model, foundation, loss, data)


SECTIONS = {"model": AutoencoderConfig, "loss": LossConfig, "data": DataConfig}


@pytest.mark.parametrize("key, named", [("vf_weight", r"loss\.vf_weight"), ("disc_start", r"loss\.disc_start")])
@pytest.mark.parametrize("absent", [True, False])
def test_what_training_needs_of_the_published_loss_is_asked_for_by_both_names(key, named, absent):
    document = published()
    training(document)
    given = document["model"]["params"]["lossconfig"]["params"]
    given[key] = None
    if absent:
        del given[key]
    assert LossConfig(**from_published(document)[0]["loss"])  # read for its weights, the file will do
    refuses(rf"not set: {named} .*model\.params\.lossconfig\.params\.{key}", training, document)
    if key == "vf_weight":
        del document["model"]["params"]["use_vf"]
    else:
        given["disc_weight"] = 0.0
    training(document)  # nobody asks


@pytest.mark.parametrize("key, default", [("distmat_margin", 0.0), ("cos_margin", 0.0), ("adaptive_vf", False)])
def test_a_null_of_the_published_loss_is_what_an_absent_key_is_and_said(key, default):
    document = published()
    document["model"]["params"]["lossconfig"]["params"][key] = None
    sections, notes = from_published(document)
    assert sections["loss"][key] == default
    assert any(f"{key} is null: {default}" in note for note in notes)


def test_keys_of_the_published_loss_that_nothing_reads_are_named_and_ignored():
    document = published()
    document["model"]["params"]["lossconfig"]["params"]["vf_loss_type"] = "combined_v3"
    sections, notes = from_published(document)
    assert sections["loss"] == from_published(published())[0]["loss"]
    assert "ignored model.params.lossconfig.params.vf_loss_type: 'combined_v3'" in notes


@pytest.mark.parametrize("layers", range(1, 6))
def test_the_least_image_for_a_discriminator_is_the_least_that_it_takes(layers):
    discriminator = NLayerDiscriminator(3, ndf=2, n_layers=layers)
    least = 3 * 2**layers
    discriminator(torch.zeros(2, 3, least, least))
    with pytest.raises(RuntimeError):
        discriminator(torch.zeros(2, 3, least - 1, least - 1))
    loss = LossConfig(use_vf=False, perceptual="none", disc_n_layers=layers)
    model = AutoencoderConfig(ch_mult=[1], attn_resolutions=[])
    check_sections(model, None, loss, DataConfig(data_path="x", image_size=least))
    refuses(
        f"image_size {least - 1} is too small .*disc_n_layers {layers}, which needs {least}",
        check_sections,
        model,
        None,
        loss,
        DataConfig(data_path="x", image_size=least - 1),
    )
    check_sections(model, None, loss.model_copy(update={"disc_weight": 0.0}), DataConfig(data_path="x", image_size=1))


def test_lpips_needs_an_image_that_can_be_halved_four_times():
    loss, model = LossConfig(use_vf=False, disc_weight=0.0), AutoencoderConfig(ch_mult=[1], attn_resolutions=[])
    check_sections(model, None, loss, DataConfig(data_path="x", image_size=16))
    refuses(
        "image_size 15 is too small for LPIPS",
        check_sections,
        model,
        None,
        loss,
        DataConfig(data_path="x", image_size=15),
    )


@pytest.mark.parametrize("weights, missing", [((0.5, 0.1), False), ((0.5, None), True), ((), True)])
def test_stages_may_give_the_weight_that_the_loss_leaves_open(weights, missing):
    stages = [StageConfig(epochs=1, loss={"vf_weight": weight}) for weight in weights]
    sections = (AutoencoderConfig(), FoundationConfig(), LossConfig(vf_weight=None), DataConfig(data_path="x"), stages)
    if missing:
        refuses(r"not set: loss\.vf_weight", check_sections, *sections)
    else:
        check_sections(*sections)


@pytest.mark.parametrize(
    "section, key, value",
    [
        (["model", "params"], "use_vf", ["dinov2"]),
        (["lightning", "trainer"], "precision", [32]),
        (["lightning", "trainer"], "precision", {"a": 1}),
    ],
)
def test_values_of_another_kind_are_named_too(section, key, value):
    document = published()
    inner = document
    for name in section:
        inner = inner[name]
    inner[key] = value
    refuses(key, from_published, document)
    refuses("unknown tokenizer size", AutoencoderConfig, size=value)


def test_numbers_that_yaml_reads_as_text_are_numbers():
    assert LossConfig(**yaml.safe_load("kl_weight: 1e-6")).kl_weight == 1e-6
    refuses("kl_weight", LossConfig, kl_weight="tiny")
    refuses("kl_weight", LossConfig, kl_weight=float("nan"))


@pytest.mark.parametrize(
    "make, error",
    [
        (lambda: AutoencoderConfig(sise="f16d64"), r"unknown key 'sise' \(did you mean 'size'"),
        (lambda: LossConfig(kl_wieght=1.0), r"unknown key 'kl_wieght' \(did you mean 'kl_weight'"),
        (lambda: AutoencoderConfig(ch="128"), "valid integer"),
        (lambda: LossConfig(use_vf=1), "valid boolean"),
        (lambda: LossConfig(vf_weight=-1.0), "greater than or equal to 0"),
        (lambda: LossConfig(perceptual="vgg"), "'lpips' or 'none'"),
        (lambda: AutoencoderConfig(size="f16d33"), r"unknown tokenizer size 'f16d33' \(did you mean 'f16d32'"),
        (lambda: AutoencoderConfig(ch=48), "ch 48 × ch_mult 1 is not a multiple of the 32 norm groups"),
        (lambda: AutoencoderConfig(resolution=200), "resolution 200 is not a multiple of the down-sampling 16"),
        (
            lambda: AutoencoderConfig(attn_resolutions=[24]),
            r"no level works at 24; levels are at \[256, 128, 64, 32, 16\]",
        ),
        (lambda: AutoencoderConfig(double_z=False), "double_z"),
        (lambda: DataConfig(data_path="x", on_unreadable="ignore"), "'error' or 'skip'"),
        (lambda: StageConfig(epochs=0), "greater than or equal to 1"),
    ],
)
def test_wrong_values_are_named(make, error):
    with pytest.raises(ValidationError, match=error):
        make()


def test_configs_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        LossConfig().kl_weight = 1.0


def test_sizes():
    for size in ("f16d16", "f16d32", "f16d64"):
        config = AutoencoderConfig(size=size)
        assert config.embed_dim == config.z_channels == int(re.search(r"d(\d+)", size)[1])
        assert config.downsample_ratio == 16
    assert AutoencoderConfig(size="sd-f8d4").downsample_ratio == 8
    assert AutoencoderConfig(size="f16d64", dropout=0.5).dropout == 0.5


def test_released_recipe_changes_the_loss_by_epoch():
    shipped = yaml.safe_load((ROOT / "launch/configs/vavae_f16d32_dinov2.yaml").read_text())
    stages, base = [StageConfig(**stage) for stage in shipped["stages"]], LossConfig(kl_weight=2e-6)
    wanted = {
        0: (0.5, 0.0, 0.0),
        99.999: (0.5, 0.0, 0.0),
        100: (0.1, 0.0, 0.0),
        114.9: (0.1, 0.0, 0.0),
        115: (0.1, 0.25, 0.5),
        129: (0.1, 0.25, 0.5),
        1000: (0.1, 0.25, 0.5),
    }
    for epoch, values in wanted.items():
        loss = loss_at(base, stages, epoch)
        assert (loss.vf_weight, loss.distmat_margin, loss.cos_margin) == values, epoch
        assert loss.kl_weight == 2e-6


def test_without_stages_the_loss_stays():
    assert loss_at(LossConfig(), (), 7.5) == LossConfig()


def test_stages_are_read_from_plain_values():
    stages = [StageConfig(**stage) for stage in yaml.safe_load("[{epochs: 2, loss: {vf_weight: 5e-1}}, {epochs: 1}]")]
    base = LossConfig(vf_weight=0.3)
    assert [loss_at(base, stages, epoch).vf_weight for epoch in (0, 1.9, 2, 9)] == [0.5, 0.5, 0.3, 0.3]
    refuses("did you mean 'vf_weight'", StageConfig, epochs=1, loss={"vfweight": 1.0})
