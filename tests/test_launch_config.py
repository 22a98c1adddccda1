"""Run files: published ones load unchanged, and a wrong thing is said with its nearest right one."""

import re
from pathlib import Path

import pytest
import yaml

from launch.__main__ import main
from launch.config import ConfigError, load
from launch.config_files import merge
from launch.extends import merged, read_layers
from launch.training.config import OptimizerConfig, TrainConfig
from tests.published import LIGHTNINGDIT_OPTIONAL, LIGHTNINGDIT_YAML, TOKENIZER_OPTIONAL, TOKENIZER_YAML

CONFIGS = Path(__file__).parent.parent / "launch" / "configs"


@pytest.fixture
def published(tmp_path):
    path = tmp_path / "lightningdit_xl_vavae_f16d32.yaml"
    path.write_text(LIGHTNINGDIT_YAML)
    return path


@pytest.fixture
def published_tokenizer(tmp_path):
    path = tmp_path / "vavae_f16d32_vfdinov2.yaml"
    path.write_text(TOKENIZER_YAML)
    return path


def test_a_published_file_means_the_paper_preset(published):
    run, notes = load(published, kind="lightningdit")
    assert run.preset == "paper" and notes == []
    assert run.sampling().cfg_channels == 3 and run.sampling().cfg_scale == 10.0
    assert (run.sample.atol, run.sample.rtol) == (1e-6, 1e-3)  # YAML 1.1 reads 1e-6 as text
    assert (run.optimizer.beta2, run.optimizer.max_grad_norm, run.optimizer.ema_decay) == (0.95, 0.0, 0.9999)
    assert (run.network().depth, run.network().input_size, run.network().null_label) == (28, 16, 1000)


def test_the_default_preset_guides_all_channels(published):
    run, _ = load(published, ["preset=default"], kind="lightningdit")
    assert run.sampling().cfg_channels is None


def test_a_published_tokenizer_file_is_translated(published_tokenizer):
    run, notes = load(published_tokenizer, ["train.max_epochs=3"], kind="vavae")
    assert run.train.global_batch_size == 8 * 8 * 4 and run.train.max_epochs == 3
    assert run.loss.disc_start == 2501 and run.model.z_channels == 32
    assert (run.optimizer.lr, run.optimizer.beta1, run.optimizer.beta2) == (1e-4, 0.5, 0.9)
    assert any("5001" in note and "2501" in note for note in notes)


def test_every_optional_key_of_a_published_file_has_its_effect(tmp_path):
    path = tmp_path / "all.yaml"
    path.write_text(yaml.safe_dump(merge(*map(yaml.safe_load, (LIGHTNINGDIT_YAML, LIGHTNINGDIT_OPTIONAL)))))
    run, notes = load(path, kind="lightningdit")
    assert notes == [] and (run.data.valid_path, run.optimizer.max_grad_norm) == ("/path/to/valid", 1.0)
    assert (run.train.weight_init, run.train.resume) == ("/path/to/weights.pt", True)
    assert run.network().learn_sigma and run.network().out_channels == 64 and run.network().use_checkpoint
    assert run.train.with_validation(run.data.valid_path).valid_every == 20_000
    for section in ("model", "train"):  # either of the two keys of one name is enough
        either, _ = load(path, [f"{section}.use_checkpoint=false"], kind="lightningdit")
        assert either.network().use_checkpoint
    assert (
        not load(path, ["model.use_checkpoint=false", "train.use_checkpoint=false"], kind="lightningdit")[0]
        .network()
        .use_checkpoint
    )
    assert load(path, ["train.resume=false"], kind="lightningdit")[0].train.resume is False


def test_checkpointing_of_every_kth_block_is_for_transformers(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(LIGHTNINGDIT_YAML)
    for said, meant in (("2", 2), ("1", True), ("true", True), ("pointwise", "pointwise"), ("28", 28)):
        for section in ("train", "model"):
            run, _ = load(path, [f"{section}.use_checkpoint={said}"], kind="lightningdit")
            assert (type(run.network().use_checkpoint), run.network().use_checkpoint) == (type(meant), meant)
    for said in ("0", "-1", "1001", "2.0", "block"):
        words = refusal(path, f"train.use_checkpoint={said}")
        assert "train.use_checkpoint: allowed are false, true, 'pointwise' and k, a whole number" in words
    path.write_text(TOKENIZER_YAML)
    words = refusal(path, "train.use_checkpoint=2", kind="vavae")
    assert "train.use_checkpoint: allowed are false, true and 'pointwise' (got 2)" in words


def test_every_optional_key_of_a_published_tokenizer_has_its_effect(tmp_path):
    path = tmp_path / "all.yaml"
    path.write_text(yaml.safe_dump(merge(*map(yaml.safe_load, (TOKENIZER_YAML, TOKENIZER_OPTIONAL)))))
    run, _ = load(path, kind="vavae")
    assert run.train.weight_init == "/path/to/stage1.ckpt" and run.loss.proj_fix
    path.write_text(TOKENIZER_YAML)
    run, _ = load(path, kind="vavae")
    assert run.train.weight_init is None and not run.loss.proj_fix


def test_absent_keys_of_a_published_file_mean_false_and_four(tmp_path):
    document = yaml.safe_load(LIGHTNINGDIT_YAML)
    document["model"] = {"model_type": "LightningDiT-B/2"}
    path = tmp_path / "bare.yaml"
    path.write_text(yaml.safe_dump(document))
    network = load(path, kind="lightningdit")[0].network()
    flags = {name: value for name, value in network.model_dump().items() if isinstance(value, bool)}
    assert len(flags) >= 6 and not any(flags.values()) and network.in_channels == 4


def test_dry_run_of_the_published_file(published, capsys):
    assert main(["train", "lightningdit", str(published), "--dry-run", "--gpus", "8"]) == 0
    text = capsys.readouterr().out
    assert "80,000 steps = 63.9 epochs of 1,281,167 images (assumed, `data.num_images`)" in text
    assert "675,256,736 parameters, 674,961,824 of them trained" in text
    assert "global batch 1,024 = 8 processes × micro-batch 128 × 1 accumulated" in text
    assert "728.84 TFLOP per step" in text  # 711.76 GFLOP × 1024
    assert "latents on disk: 84.0 GB" in text  # 1,281,167 × 2 × 32 × 16 × 16 × 4 bytes
    assert "ZeRO 1" in text and "← this run" in text


def test_dry_run_of_the_published_tokenizer(published_tokenizer, capsys):
    assert main(["train", "vavae", str(published_tokenizer), "--dry-run", "--gpus", "32"]) == 0
    text = capsys.readouterr().out
    assert "69,868,835 parameters" in text  # 69,836,067 and the 32 → 1024 projection
    assert "discriminator: 2,765,633 parameters" in text
    assert "250,228 steps = 50.0 epochs of 1,281,167 images (assumed" in text
    assert "disc_start" in text


@pytest.mark.parametrize("name", sorted(p.name for p in CONFIGS.glob("*.yaml")))
def test_every_shipped_config_loads_and_sets_a_preset(name):
    layers, _ = read_layers(CONFIGS / name)
    run, _ = load(CONFIGS / name, kind="vavae" if "vavae" in name else "lightningdit")
    assert "preset" in merged(layers) and run.train.exp_name is not None
    assert run.deepspeed.merged_overrides("bfloat16").keys() <= {"zero_optimization", "data_types"}


def refusal(path, *overrides, kind="lightningdit") -> str:
    with pytest.raises(ConfigError) as e:
        load(path, list(overrides), kind=kind)
    assert str(path) in str(e.value) or "override" in str(e.value)
    return str(e.value)


def test_an_unknown_key_names_the_nearest(published, published_tokenizer):
    assert "train" in (text := refusal(published, "train.max_stesp=3")) and "'max_steps'" in text
    assert "'transport'" in refusal(published, "tranport={}")
    assert "'cos_margin'" in refusal(published_tokenizer, "loss.cosmargin=1", kind="vavae")
    assert "LightningDiT-XL/1" in refusal(published, "model.model_type=LightningDiT-XXL/1")
    published_tokenizer.write_text(TOKENIZER_YAML.replace("weight_init", "init_weight"))
    assert "weight_init" in refusal(published_tokenizer, kind="vavae")


def test_a_wrong_type_names_key_and_value(published):
    assert "train.max_steps" in (text := refusal(published, "train.max_steps=many")) and "'many'" in text
    assert "model.use_rope" in refusal(published, "model.use_rope=1")
    assert "optimizer.lr" in refusal(published, "optimizer.lr=-1")
    assert "train.precision" in refusal(published, "train.precision=int8")


def test_contradictions_are_refused(published):
    assert "keep one" in refusal(published, "train.max_epochs=2")
    assert "downsample_ratio 16" in refusal(published, "data.image_size=250")


def test_what_a_tokenizer_cannot_do_is_refused(published_tokenizer):
    refused = "deepspeed.zero_stage=3"
    assert "zero_stage 3" in refusal(published_tokenizer, refused, kind="vavae")
    load(published_tokenizer, [refused, "loss.adaptive_vf=false", "loss.disc_weight=0"], kind="vavae")
    assert "residual_dtype" in refusal(published_tokenizer, "train.residual_dtype=bfloat16", kind="vavae")


def test_a_malformed_override_or_file_is_refused(published, tmp_path):
    assert "key=value" in refusal(published, "train.max_steps")
    assert "not a section" in refusal(published, "ckpt_path.x=1")
    (tmp_path / "list.yaml").write_text("- 1")
    assert "not a mapping" in refusal(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1")
    assert "not YAML" in refusal(tmp_path / "broken.yaml")
    with pytest.raises(ConfigError, match="cannot read config"):
        load(tmp_path / "absent.yaml", kind="lightningdit")


def test_the_command_line_says_a_mistake_in_a_line(published, capsys):
    assert main(["train", "lightningdit", str(published), "train.max_stesp=3"]) == 2
    assert "error:" in (text := capsys.readouterr().err) and "Traceback" not in text
    assert main(["trian"]) == 2 and "train" in capsys.readouterr().err


def test_overrides_reach_deep_values_and_null_sections(published):
    published.write_text(LIGHTNINGDIT_YAML + "deepspeed: null\n")
    run, _ = load(
        published, ["deepspeed.zero_stage=3", "kernels={default: reference, swiglu: auto}"], kind="lightningdit"
    )
    assert run.deepspeed.zero_stage == 3 and run.kernels == {"default": "reference", "swiglu": "auto"}


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("train={max_steps: 3}", {"train": {"max_steps": 3}}),
        ("train={max_steps: 3, ckpt: null}", {"train": {"max_steps": 3, "ckpt": None}}),
        ("sample={cfg_scale: 1}", {"sample": {"cfg_scale": 1.0}}),
        (
            "deepspeed={overrides: {zero_optimization: {overlap_comm: true}}}",
            {"deepspeed": {"overrides": {"zero_optimization": {"reduce_bucket_size": 100, "overlap_comm": True}}}},
        ),
        (
            "deepspeed.overrides={zero_optimization: {overlap_comm: true}}",
            {"deepspeed": {"overrides": {"zero_optimization": {"reduce_bucket_size": 100, "overlap_comm": True}}}},
        ),
        ("kernels={swiglu: auto}", {"kernels": {"default": "reference", "swiglu": "auto"}}),
        ("kernels=auto", {"kernels": "auto"}),
    ],
)
def test_an_override_of_a_section_is_merged_into_it(published, override, changed):
    """And changes nothing else; a value that is no mapping takes the place of what was there."""
    published.write_text(
        LIGHTNINGDIT_YAML + "deepspeed: {overrides: {zero_optimization: {reduce_bucket_size: 100}}}\n"
        "kernels: {default: reference}\n"
    )
    before, after = (load(published, given, kind="lightningdit")[0].model_dump() for given in ([], [override]))
    for section, values in changed.items():
        before[section] = {**before[section], **values} if section in ("train", "sample", "deepspeed") else values
    assert after == before


@pytest.mark.parametrize("override", ["deepspeed.overrides={}", "deepspeed={}"])
def test_an_empty_override_empties(published, override):
    published.write_text(LIGHTNINGDIT_YAML + "deepspeed: {overrides: {wall_clock_breakdown: true}, zero_stage: 2}\n")
    assert load(published, kind="lightningdit")[0].deepspeed.overrides
    run, _ = load(published, [override], kind="lightningdit")
    assert run.deepspeed.overrides == {}
    assert run.deepspeed.zero_stage == (1 if override == "deepspeed={}" else 2)


@pytest.mark.parametrize("override", ["train.output_dir=elsewhere", "train={output_dir: elsewhere}"])
def test_an_override_changes_no_other_key_that_shares_an_anchor(published, override):
    document = yaml.safe_load(LIGHTNINGDIT_YAML)
    shared = {"output_dir": "here", "exp_name": "x", "max_steps": 5}
    document |= {"train": shared, "deepspeed": {"overrides": {"a": shared, "b": [shared]}}}
    text = yaml.dump(document)
    assert text.count("*id") == 2
    published.write_text(text)
    run, _ = load(published, [override, "deepspeed.overrides.a.exp_name=y"], kind="lightningdit")
    assert run.train.output_dir == "elsewhere" and run.train.exp_name == "x"
    assert run.deepspeed.overrides == {"a": shared | {"exp_name": "y"}, "b": [shared]}


def test_a_deepspeed_file_here_comes_before_a_shipped_one_and_is_said(published, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = ["deepspeed.file=zero2.json", "deepspeed.zero_stage=2"]
    run, notes = load(published, file, kind="lightningdit")
    assert len(notes) == 1 and re.match(r"deepspeed\.file zero2\.json: not here, so the one in .*deepspeed", notes[0])
    (tmp_path / "zero2.json").write_text('{"zero_optimization": {"reduce_bucket_size": 123}}')
    run, notes = load(published, file, kind="lightningdit")
    assert run.deepspeed.merged_overrides("bfloat16")["zero_optimization"]["reduce_bucket_size"] == 123
    assert len(notes) == 1 and "deepspeed.file zero2.json: the one here" in notes[0]


def test_a_deepspeed_file_must_agree_on_the_stage(published, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 2, "overlap_comm": true}}')
    run, _ = load(published, [f"deepspeed.file={path}"], kind="lightningdit")
    with pytest.raises(ConfigError, match=r"zero_stage is 1, but deepspeed\.file or overrides say 2"):
        run.deepspeed.merged_overrides("bfloat16")
    run, _ = load(
        published,
        [
            f"deepspeed.file={path}",
            "deepspeed.zero_stage=2",
            "deepspeed.overrides={zero_optimization: {overlap_comm: false}}",
        ],
        kind="lightningdit",
    )
    assert run.deepspeed.merged_overrides("bfloat16") == {"zero_optimization": {"stage": 2, "overlap_comm": False}}


def test_the_preset_decides_what_the_foundation_model_is_fed(published_tokenizer):
    for preset, expected in (("paper", "published"), ("default", "model")):
        own = {"preset": preset, "model": {"size": "f16d32"}, "foundation": {}, "data": {"data_path": "x"}}
        published_tokenizer.write_text(yaml.safe_dump(own))
        assert load(published_tokenizer, kind="vavae")[0].features().normalization == expected
        said, _ = load(published_tokenizer, ["foundation.normalization=imagenet"], kind="vavae")
        assert said.features().normalization == "imagenet"


@pytest.mark.parametrize("file", ["vavae_f16d32_dinov2.yaml", "vavae_f16d64_mae_50ep.yaml"])
def test_another_model_than_the_papers_is_fed_as_it_was_trained(file):
    assert load(file, kind="vavae")[0].features().normalization == "published"
    assert load(file, ["foundation.model_name=clip-l"], kind="vavae")[0].features().normalization == "model"


@pytest.mark.parametrize("key", ["gradient_clipping", "bf16", "train_batch_size"])
def test_what_follows_from_our_keys_is_not_overridden(published, key):
    run, _ = load(published, [f"deepspeed.overrides={{{key}: 1}}"], kind="lightningdit")
    with pytest.raises(ConfigError, match=f"{key} cannot be set there"):
        run.deepspeed.merged_overrides("bfloat16")


def test_validation_needs_data_and_defaults_to_checkpoints(published):
    run, _ = load(published, ["train.valid_every=5"], kind="lightningdit")
    with pytest.raises(ConfigError, match=r"valid_every is 5, but data\.valid_path names no data"):
        run.train.with_validation(None)
    assert run.train.with_validation("somewhere").valid_every == 5
    run, _ = load(published, kind="lightningdit")
    assert run.train.with_validation("somewhere").valid_every == run.train.ckpt_every
    assert run.train.with_validation(None).valid_every is None


def test_merge_goes_down():
    assert merge({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 5}, "e": 6}) == {"a": {"b": 5, "c": 2}, "d": 3, "e": 6}
    assert merge({"a": {"b": 1}}, {"a": {}}) == {"a": {"b": 1}}
    assert merge({"a": {"b": {"c": 1}}}, {"a": {"b": {}}}, empties=True) == {"a": {"b": {}}}


@pytest.mark.parametrize(("epochs", "images", "batch", "steps"), [(1, 8, 8, 1), (1, 9, 8, 2), (3, 10, 8, 4)])
def test_the_last_step_of_so_many_epochs_ends_them(epochs, images, batch, steps):
    assert TrainConfig(max_epochs=epochs, global_batch_size=batch).steps(images) == steps


def test_learning_rate_schedule():
    constant = OptimizerConfig(lr=1.0)
    assert [constant.lr_at(s, 10) for s in (1, 5, 10)] == [1.0, 1.0, 1.0]
    warm = OptimizerConfig(lr=1.0, warmup_steps=4, final_lr_fraction=0.1)
    assert [warm.lr_at(s, 24) for s in (1, 4, 14, 24)] == pytest.approx([0.25, 1.0, 0.55, 0.1])
