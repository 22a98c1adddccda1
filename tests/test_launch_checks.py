"""A dry run refuses what the run refuses, with the same words, and the run does before it builds anything."""

import os
import re
from pathlib import Path

import pytest
import torch
from deepspeed.profiling.flops_profiler import FlopsProfiler

from launch.__main__ import main
from launch.config import ConfigError, load
from launch.training import dry_run, engine
from launch.training.checks import check_directory, check_output_file, check_run, network_on_meta
from tests import toy

PROFILED = "deepspeed.overrides={flops_profiler: {enabled: true}}"
# Model, overrides (FOLDER stands for an empty folder), and what the message must say.
REFUSED = [
    ("lightningdit", ["kernels={default: reference, swigl: cuda}"], r"'swigl' \(did you mean 'swiglu'"),
    ("lightningdit", ["kernels=trition"], r"'trition' \(did you mean 'triton'"),
    ("lightningdit", ["kernels={swiglu: cudda}"], r"'cudda' \(did you mean 'cuda'"),
    ("lightningdit", ["kernels=[auto]"], "kernels: a backend's name, or names by op, is wanted"),
    ("lightningdit", ["deepspeed.file=FOLDER/absent.json"], "deepspeed.file: .*absent.json does not exist"),
    ("lightningdit", ["deepspeed.file=FOLDER"], "deepspeed.file: .*empty is a directory"),
    ("lightningdit", ["deepspeed.file=FOLDER/file"], "deepspeed.file: .*file holds nothing"),
    (
        "lightningdit",
        [PROFILED, "deepspeed.overrides.flops_profiler.module_depth=50"],
        r"deepspeed: flops_profiler.module_depth is 50, .* in \d+ levels",
    ),
    (
        "lightningdit",
        [PROFILED, "deepspeed.overrides.flops_profiler.output_file=FOLDER"],
        "deepspeed: flops_profiler.output_file: .*empty is a directory, not a file",
    ),
    (
        "lightningdit",
        [PROFILED, "deepspeed.overrides.flops_profiler.output_file=FOLDER/file/x"],
        "deepspeed: flops_profiler.output_file: .*file is no directory",
    ),
    ("lightningdit", ["deepspeed.file=zero2.json"], "zero_stage is 1, but deepspeed.file or overrides say 2"),
    ("lightningdit", ["deepspeed.overrides={zero_optimization: 2}"], "zero_optimization: a section of keys is wanted"),
    ("lightningdit", ["deepspeed.overrides=5"], "deepspeed.overrides: a mapping"),
    ("lightningdit", ["train=3"], "train: a section of keys is wanted"),
    ("lightningdit", ["train.valid_every=5"], "data.valid_path names no data"),
    ("lightningdit", ["train.weight_init=FOLDER/absent.pt"], "train.weight_init: .*absent.pt does not exist"),
    ("lightningdit", ["train.weight_init=FOLDER"], "train.weight_init: .* is a directory"),
    ("lightningdit", ["train.ckpt=FOLDER/absent"], "train.ckpt: .*absent does not exist"),
    ("lightningdit", ["train.ckpt=FOLDER/file"], "train.ckpt: .*file is no directory, which a checkpoint is"),
    ("lightningdit", ["train.ckpt=FOLDER"], "train.ckpt: .* is no checkpoint"),
    ("lightningdit", ["train.ckpt=FOLDER", "train.weight_init=FOLDER/file"], "train.ckpt .* train.weight_init .* one"),
    ("lightningdit", ["train.max_steps=null"], "give max_steps or max_epochs"),
    ("lightningdit", ["train.max_steps=010"], "010 is a number in base 8"),
    ("lightningdit", ["train.max_steps=1:30"], "1:30 is a number in base 60"),
    ("lightningdit", ["train.output_dir=FOLDER/file"], "train.output_dir: .*file is no directory"),
    ("lightningdit", ["train.output_dir=FOLDER/file/below"], "train.output_dir: .*file is no directory"),
    ("lightningdit", ["sample.cfg_channels=5"], "sample.cfg_channels is 5, .*model.in_chans 4"),
    ("lightningdit", ["model.depth=3000000"], "model.depth: must be at most 1000"),
    ("lightningdit", ["model.hidden_size=4000000000"], "model.hidden_size: must be at most"),
    ("lightningdit", ["data.image_size=20"], "data.image_size 20 makes latents of 5 × 5 .* use a multiple of 8"),
    ("lightningdit", ["data.image_size=18"], "data.image_size 18 is not a multiple of downsample_ratio 4"),
    ("lightningdit", ["data.image_size=65536"], "data.image_size 65536 makes .* tokens of hidden_size 16"),
    ("lightningdit", ["data.image_size=2048", "model.hidden_size=64000"], "65,536 tokens of hidden_size 64000"),
    ("vavae", ["loss.use_vf=true"], "loss.use_vf is true, but the run has no foundation"),
    ("vavae", ["loss.use_vf=true", "foundation=null"], "loss.use_vf is true, but the run has no foundation"),
    ("vavae", ["loss.use_vf=true", "foundation.weights=FOLDER/absent.pt"], "foundation.weights: .*does not exist"),
    ("vavae", ["loss.perceptual=lpips", "loss.perceptual_weights=FOLDER/absent.pt"], "loss.perceptual_weights: "),
    ("vavae", ["loss.disc_n_layers=3"], "image_size 16 is too small .*disc_n_layers 3, which needs 24"),
    ("vavae", ["train.weight_init=FOLDER/absent.pt"], "train.weight_init: "),
    ("vavae", ["kernels={vf_los: auto}"], "did you mean 'vf_loss'"),
    ("vavae", ["model.in_channels=4"], "model.in_channels 4"),
    ("vavae", ["data.image_size=15"], "data.image_size 15 is not a multiple"),
    ("vavae", ["model.num_res_blocks=5000"], "model.num_res_blocks: must be at most"),
    ("vavae", ["model.ch=65536", "model.ch_mult=[2, 2]"], "more than 65,536 channels"),
]


@pytest.fixture
def run_file(tmp_path):
    def write(kind: str):
        content, folder = (toy.LIGHTNINGDIT, "latents") if kind == "lightningdit" else (toy.VAVAE, "images")
        return toy.write_run(
            tmp_path / f"{kind}.yaml",
            content,
            data={"data_path": str(tmp_path / folder)},
            train={"output_dir": str(tmp_path / "out")},
        )

    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "file").touch()
    return write


@pytest.fixture
def no_engines(monkeypatch):
    def fails(*args, **kwargs):
        raise AssertionError("the run went on to its engines")

    monkeypatch.setattr(engine, "start_processes", fails)


@pytest.mark.parametrize(("kind", "overrides", "words"), REFUSED, ids=lambda value: str(value)[:40])
def test_run_and_dry_run_refuse_in_one_line(tmp_path, run_file, no_engines, capsys, kind, overrides, words):
    overrides = [override.replace("FOLDER", str(tmp_path / "empty")) for override in overrides]
    arguments = ["train", kind, str(run_file(kind)), *overrides]
    said = []
    for more in ([], ["--dry-run"]):
        assert main([*arguments, *more]) == 2
        said.append(capsys.readouterr().err)
    first, *rest = said[0].splitlines()
    assert said[0] == said[1] and re.search(words, first), first
    assert len(rest) == 1 and "Config" not in first and "pydantic" not in first
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["data_path", "valid_path"])
def test_latents_of_another_shape_are_refused_by_both(tmp_path, run_file, capsys, key):
    toy.write_latents(tmp_path / "latents")
    toy.write_random_latents(tmp_path / "others", shape=(3, 4, 4))
    arguments = ["train", "lightningdit", str(run_file("lightningdit")), f"data.{key}={tmp_path / 'others'}"]
    for more in ([], ["--dry-run"]):
        assert main([*arguments, "data.num_classes=4", *more]) == 2
        assert re.search(r"others has latents of \(3, 4, 4\); the model takes .* \(4, 4, 4\)", capsys.readouterr().err)


def test_validation_latents_of_other_classes_are_refused_by_both(tmp_path, run_file, capsys):
    toy.write_latents(tmp_path / "latents", classes=("a", "b", "c"))
    toy.write_latents(tmp_path / "others", classes=("b", "c", "d"))
    arguments = ["train", "lightningdit", str(run_file("lightningdit")), f"data.valid_path={tmp_path / 'others'}"]
    for more in ([], ["--dry-run"]):
        assert main([*arguments, *more]) == 2
        assert "others are of other classes: 'a' and 'b' for label 0" in capsys.readouterr().err


def test_a_plan_says_what_this_machine_lacks(tmp_path, run_file, capsys):
    arguments = ["train", "lightningdit", str(run_file("lightningdit")), "--dry-run", "kernels={swiglu: cuda}"]
    assert main([*arguments, "data.valid_path=/absent/latents"]) == 0
    absent = [line for line in capsys.readouterr().out.splitlines() if "not on this machine" in line]
    assert len(absent) == 3 and "kernels.swiglu cuda (" in absent[0]
    assert f"data.data_path {tmp_path / 'latents'}" in absent[1] and "data.valid_path /absent/latents" in absent[2]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("lightningdit", []),
        ("vavae", []),
        ("vavae", ["loss.use_vf=true", "foundation={}"]),
    ],
)
def test_modules_are_profiled_as_deep_as_deepspeed_finds_them(run_file, kind, changes):
    changes = [*changes, *(["loss.disc_weight=0"] if kind == "vavae" else []), PROFILED]
    for depth in range(-1, 12):
        run, _ = load(run_file(kind), [*changes, f"deepspeed.overrides.flops_profiler.module_depth={depth}"], kind=kind)
        profiler = FlopsProfiler(network_on_meta(run))
        profiler.start_profile()
        try:
            profiler.print_model_aggregated_profile(module_depth=depth)
        except KeyError:
            break
        finally:
            profiler.end_profile()
        check_run(run)
    assert depth > 3
    with pytest.raises(ConfigError, match=f"module_depth is {depth}, but the network has modules in {depth - 1} lev"):
        check_run(run)


def test_where_the_profiler_may_write(tmp_path, monkeypatch):
    for path in ("/dev/null", tmp_path / "a", tmp_path / "a/b/c"):
        check_output_file("key", Path(path))
    (tmp_path / "file").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for path in (tmp_path / "file", tmp_path / "a"):
        with pytest.raises(ConfigError, match="key: no permission to write"):
            check_output_file("key", path)


def test_a_plan_says_what_the_run_would_download(tmp_path, run_file, monkeypatch, capsys):
    """What is named or in a cache would not be."""
    monkeypatch.setattr(dry_run, "network_costs", lambda run, kinds: (dict.fromkeys(kinds, ()), 0, None))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "torch"))
    (tmp_path / "x.pt").touch()

    def told(*changes: str) -> list[str]:
        arguments = ["train", "vavae", str(run_file("vavae")), "--dry-run", "loss.disc_weight=0", *changes]
        assert main(arguments) == 0
        lines = capsys.readouterr().out.splitlines()
        return [line.partition("by the run: ")[2].partition(" (")[0] for line in lines if "to be downloaded" in line]

    vf, lpips = ("loss.use_vf=true", "foundation={}"), "loss.perceptual=lpips"
    dinov2, vgg = "the weights of vit_large_patch14_dinov2.lvd142m", "VGG-16 for LPIPS"
    assert told() == [] and told(*vf) == [dinov2] and told(*vf, lpips) == [dinov2, vgg]
    named = f"{{weights: {tmp_path / 'x.pt'}}}"
    assert told("loss.use_vf=true", f"foundation={named}", lpips, f"loss.perceptual_weights={tmp_path / 'x.pt'}") == []
    hub = tmp_path / "hub/models--timm--vit_large_patch14_dinov2.lvd142m"
    for path, content in (("refs/main", "0" * 40), (f"snapshots/{'0' * 40}/model.safetensors", "")):
        (hub / path).parent.mkdir(parents=True)
        (hub / path).write_text(content)
    (tmp_path / "torch/checkpoints").mkdir(parents=True)
    (tmp_path / "torch/checkpoints/vgg16-397923af.pth").touch()
    assert told(*vf, lpips) == []


def test_a_plan_refuses_a_foundation_model_that_has_no_weights(run_file, capsys):
    changes = ["loss.use_vf=true", "loss.disc_weight=0", "foundation={model_name: vit_base_patch16_gap_224}"]
    assert main(["train", "vavae", str(run_file("vavae")), "--dry-run", *changes]) == 2
    assert "foundation.model_name: timm has no weights of 'vit_base_patch16_gap_224'" in capsys.readouterr().err


def test_a_plan_of_what_is_here_lacks_nothing(tmp_path, run_file, capsys):
    toy.write_latents(tmp_path / "latents")
    assert main(["train", "lightningdit", str(run_file("lightningdit")), "--dry-run"]) == 0
    assert "(counted)" in (text := capsys.readouterr().out) and "not on this machine" not in text
    assert not (tmp_path / "out").exists()


def test_a_plan_does_not_decode_images_to_keep(tmp_path, run_file, monkeypatch):
    from vavae.data import ImageDataset

    toy.write_images(tmp_path / "images")
    monkeypatch.setattr(ImageDataset, "_readable", None)
    monkeypatch.setattr(dry_run, "network_costs", lambda run, kinds: (dict.fromkeys(kinds, ()), 0, None))
    assert main(["train", "vavae", str(run_file("vavae")), "--dry-run", "data.cache=true"]) == 0


def test_a_folder_that_nobody_may_write_in_is_refused(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(os, "access", lambda path, mode: asked.append((path, mode)))
    with pytest.raises(ConfigError, match=f"key: no permission to write in {tmp_path}, so .*/a/b cannot be made"):
        check_directory("key", tmp_path / "a" / "b")
    assert asked == [(tmp_path, os.W_OK | os.X_OK)]
    monkeypatch.setattr(os, "access", lambda path, mode: True)
    check_directory("key", tmp_path / "a" / "b")
    check_directory("key", tmp_path)
