"""`export --format diffusers` of a LightningDiT: stock diffusers loads the folder and samples what `sample` does."""

import ast
import copy
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import yaml
from diffusers.utils import dynamic_modules_utils

import kernels
from common.seeds import generator
from launch.config import LightningDiTRun
from launch.export import main as export_main
from launch.exporting.lightningdit_pipeline import LightningDiTTransformer2DModel
from launch.exporting.pipeline import SOURCE
from launch.pipelines import pipeline_settings
from launch.trained import build_diffusion, build_tokenizer, diffusion_weights
from lightningdit.config import ModelConfig
from lightningdit.flow import Transport
from lightningdit.model import LightningDiT
from lightningdit.sampler import sample, sample_noise
from lightningdit.weights import read_export, save_export
from tests.tiny_weights import a_run, document, write_weights
from vavae.images import to_uint8
from vavae.weights import fingerprint

OPS = kernels.select("reference")
FILES = {
    "README.md",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
    "transformer/lightningdit_pipeline.py",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module", autouse=True)
def modules(tmp_path_factory):
    """diffusers copies the code that it runs to a place of its own."""
    with pytest.MonkeyPatch.context() as patch:
        place = tmp_path_factory.mktemp("modules")
        patch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(place))
        patch.syspath_prepend(place)
        yield place


@pytest.fixture(scope="module")
def folder(weights, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("exports") / "digits"
    assert export_main([str(weights / "run"), str(path), "--format", "diffusers"]) == 0
    return path


def load(folder: Path, **options):
    pipe = diffusers.DiffusionPipeline.from_pretrained(str(folder), trust_remote_code=True, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ours(run: LightningDiTRun, labels: list[int]):
    """Latents and 8-bit images of this project for samples 0 to len(labels)."""
    found, settings = diffusion_weights(run), run.sampling()
    model, tokenizer = build_diffusion(found, OPS, "run"), build_tokenizer(run, OPS)
    made = sample(
        model, Transport.from_config(run.transport), settings, torch.tensor(labels), range(len(labels)),
        shape=(4, 4, 4), null_label=model.config.null_label,
    )  # fmt: skip
    with torch.no_grad():
        decoded = tokenizer.decode(found.latents.denormalise(made.latents))
    return made.latents, to_uint8(decoded).permute(0, 2, 3, 1)


def test_a_run_becomes_a_pipeline_that_stock_diffusers_loads(weights, folder):
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == FILES
    assert (folder / "transformer/lightningdit_pipeline.py").read_bytes() == SOURCE.read_bytes()
    with pytest.raises(ValueError, match="trust_remote_code"):
        diffusers.DiffusionPipeline.from_pretrained(str(folder))
    pipe = load(folder)
    assert type(pipe.vae) is diffusers.AutoencoderKL
    assert type(pipe.scheduler) is diffusers.FlowMatchEulerDiscreteScheduler
    latents, images = ours(a_run(weights), [2, 0, 1])
    generators = [generator(0, index, 0) for index in range(3)]
    assert (pipe([2, 0, 1], generator=generators, output_type="latent").images - latents).abs().max() < 1e-5
    made = pipe(["été", 0, "dog"], latents=sample_noise(0, range(3), (4, 4, 4))).images
    pixels = torch.stack([torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) for image in made])
    off = (pixels.view(images.shape).int() - images.int()).abs()  # other sums may round to the next of 8 bits
    assert off.max() <= 1 and off.count_nonzero() < 0.01 * off.numel()


@pytest.mark.parametrize(
    "settings",
    [
        dict(cfg_scale=1.0, timestep_shift=0.0),
        dict(cfg_scale=6.7, cfg_channels=3, timestep_shift=0.3, cfg_interval_start=0.2, num_sampling_steps=8),
        # Guided from a point of the grid on, which float32 reaches and rounding must not miss.
        dict(cfg_scale=3.0, timestep_shift=0.0, cfg_interval_start=0.3, num_sampling_steps=11),
        dict(cfg_scale=3.0, timestep_shift=2.5, cfg_interval_start=0.0, num_sampling_steps=2),
    ],
    ids=["unguided", "first channels", "at a grid point", "one step"],
)
def test_settings_travel_and_sample_the_same_latents(weights, tmp_path, settings):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(document(weights, **settings) | {"ckpt_path": None}))
    export_main([str(weights / "run"), str(tmp_path / "net")])
    argv = [str(tmp_path / "net.safetensors"), str(tmp_path / "x"), "--format", "diffusers", "--config", str(config)]
    assert export_main(argv) == 0
    expected, _ = ours(a_run(weights, **settings), [1, 2])
    noise = sample_noise(0, range(2), (4, 4, 4))
    found = load(tmp_path / "x")([1, 2], latents=noise, output_type="latent").images
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    again = load(tmp_path / "x")([1, 2], latents=noise, output_type="latent", guidance_scale=1.5, guidance_channels=2,
                                 guidance_interval=(0.5, 1.0), num_inference_steps=5).images  # fmt: skip
    other = settings | dict(cfg_scale=1.5, cfg_channels=2, cfg_interval_start=0.5, num_sampling_steps=6)
    expected, _ = ours(a_run(weights, **other), [1, 2])
    assert (again - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_guidance_ends_and_grows_as_model_index_says(weights, folder, tmp_path, schedule):
    """Against Euler's method written out: w(t) = 1 + (w − 1)·s(t) from time 0.25 to 0.5, both on the grid of times."""
    shutil.copytree(folder, tmp_path / "x")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index |= dict(guidance_scale=3.0, guidance_start=0.25, guidance_end=0.5, guidance_schedule=schedule)
    (tmp_path / "x/model_index.json").write_text(json.dumps(index | {"num_inference_steps": 8}))
    scheduler = json.loads((folder / "scheduler/scheduler_config.json").read_text(encoding="utf-8"))
    (tmp_path / "x/scheduler/scheduler_config.json").write_text(json.dumps(scheduler | {"shift": 1.0}))
    model = build_diffusion(diffusion_weights(a_run(weights)), OPS, "run")
    x = noise = sample_noise(0, range(2), (4, 4, 4))
    y, share = torch.tensor([1, 2]), {"constant": lambda t: 1, "linear": lambda t: t,
                                      "cosine": lambda t: (1 - math.cos(math.pi * t)) / 2}[schedule]  # fmt: skip
    with torch.no_grad():
        for step in range(8):
            t = torch.full((2,), step / 8)
            velocity, null = model(x, t, y), model(x, t, torch.full_like(y, 3))
            if 2 <= step <= 4:
                velocity = null + (1 + 2 * share(step / 8)) * (velocity - null)
            x = x + velocity / 8
    found = load(tmp_path / "x")([1, 2], latents=noise, output_type="latent").images
    assert (found - x).abs().max() < 1e-5 * x.abs().max()


@pytest.mark.parametrize("shift", [1.0, 0.25, 5.0])
def test_a_changed_scheduler_is_read_back(folder, tmp_path, shift):
    path = "scheduler/scheduler_config.json"
    config = json.loads((folder / path).read_text(encoding="utf-8"))
    shutil.copytree(folder, tmp_path / "x")
    (tmp_path / "x" / path).write_text(json.dumps(config | {"shift": shift}), encoding="utf-8")
    assert pipeline_settings(tmp_path / "x")["timestep_shift"] == pytest.approx(1 / shift)
    assert export_main([str(tmp_path / "x"), str(tmp_path / "again"), "--format", "diffusers"]) == 0
    again = json.loads((tmp_path / "again" / path).read_text(encoding="utf-8"))
    assert again == config | {"shift": pytest.approx(shift)}
    for other, named in (
        ({"_class_name": "DDIMScheduler"}, "DDIMScheduler"),
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting"),
        ({"shift": 0}, "shift"),
    ):
        (tmp_path / "x" / path).write_text(json.dumps(config | other), encoding="utf-8")
        with pytest.raises(ValueError, match=rf"scheduler_config\.json.*{named}"):
            pipeline_settings(tmp_path / "x")
    (tmp_path / "x" / path).unlink()
    assert pipeline_settings(tmp_path / "x") == pipeline_settings(folder)


CONFIGS = {
    "published": dict(use_rope=True, use_rmsnorm=True, use_swiglu=True),
    "qknorm without shift": dict(use_rope=True, use_rmsnorm=True, use_swiglu=True, use_qknorm=True, wo_shift=True),
    "LayerNorm": dict(use_qknorm=True, patch_size=2, learn_sigma=True, class_dropout_prob=0.0),
    "RoPE and LayerNorm": dict(use_rope=True, mlp_ratio=3.3, patch_size=2),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_network_is_ours_to_rounding(name, dtype):
    sizes = dict(input_size=8, in_channels=5, hidden_size=32, depth=2, num_heads=2, num_classes=7, patch_size=1)
    config = ModelConfig(**(sizes | CONFIGS[name]))
    torch.manual_seed(0)
    reference = LightningDiT(config, OPS).eval()
    for parameter in reference.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) * 0.3 + (parameter.dim() == 1)
    network = LightningDiTTransformer2DModel(**config.model_dump(exclude={"use_checkpoint", "time_pairs"})).eval()
    loaded = network.load_state_dict(reference.state_dict(), strict=False)
    assert not loaded.missing_keys and set(loaded.unexpected_keys) <= {
        "pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin"
    }  # fmt: skip
    x, t, y = torch.randn(3, 5, 8, 8), torch.tensor([0.0, 0.4, 1.0]), torch.tensor([0, 6, 3])
    with torch.no_grad():
        found, theirs = network.to(dtype)(x, t, y).sample, copy.deepcopy(reference).to(dtype)(x, t, y)
        truth = reference.double()(x.double(), t.double(), y)
    errors = [(value.double() - truth).square().mean().sqrt() for value in (found, theirs)]
    assert found.dtype == network.pos_embed.dtype == torch.float32 and found.shape == truth.shape
    assert errors[0] < 2 * errors[1] + 1e-7 * truth.abs().max(), errors


def test_it_loads_in_bfloat16_with_tables_in_float32(weights, folder):
    pipe = load(folder, dtype=torch.bfloat16)
    network = pipe.transformer
    assert network.blocks[0].attn.qkv.weight.dtype == pipe.vae.dtype == torch.bfloat16
    reference = build_diffusion(diffusion_weights(a_run(weights)), OPS, "run").state_dict()
    assert torch.equal(network.freqs_cos, reference["feat_rope.freqs_cos"])
    assert (network.pos_embed - reference["pos_embed"]).abs().max() < 1e-6
    expected, _ = ours(a_run(weights), [2, 0])
    noise = sample_noise(0, range(2), (4, 4, 4))
    found = pipe([2, 0], latents=noise, output_type="latent").images
    assert found.dtype == torch.float32 and (found - expected).abs().max() < 0.03 * expected.abs().max()
    assert pipe([2], output_type="np").images.shape == (1, 8, 8, 3) and pipe.vae.dtype == torch.float32


def test_the_file_of_ours_needs_torch_and_diffusers_alone():
    tree = ast.parse(SOURCE.read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} == {
        "collections",
        "diffusers",
        "inspect",
        "math",
        "operator",
        "PIL",
        "torch",
    }
    assert SOURCE.read_text(encoding="utf-8").startswith("# SPDX-License-Identifier: Apache-2.0\n")


def test_calls_that_mean_nothing_are_refused(folder):
    pipe = load(folder)
    for options, why in (
        (dict(class_labels=[3]), r"class_labels \[3\]: classes are 0 to 2"),
        (dict(class_labels="cow"), "no class is called 'cow'"),
        (dict(class_labels=0, output_type="jpg"), "allowed: pil, np, pt, latent"),
        (dict(class_labels=[0, 1], latents=torch.zeros(1, 4, 4, 4)), r"these labels take \(2, 4, 4, 4\)"),
        *((dict(class_labels=each), "class_labels is empty; allowed: one label") for each in ([], ())),
        *((dict(class_labels=[0, each]), f"class_labels: {each}; allowed: whole numbers from 0 to 2, and names")
          for each in (1.5, 1.0, True, None)),
        *((dict(num_inference_steps=each), f"num_inference_steps is {each}; allowed: whole numbers from 1 on")
          for each in (0, -1, 2.5)),
        *((dict(guidance_scale=each), f"guidance_scale is {each}; allowed: numbers from 1 ")
          for each in (math.nan, math.inf, 0.5, -2)),
        *((dict(guidance_channels=each), f"guidance_channels is {each}; allowed: 1 to 4, or 0 for all of them")
          for each in (5, -1, 1.5)),
        *((dict(guidance_interval=each), "guidance_interval is .*; allowed: two times, 0 <= from <= to <= 1")
          for each in ((), (0.5,), (0.5, 0.25), (-0.1, 1), (0, 1.1), (0, math.nan), (0, 0.5, 1), 0.5, "01")),
        *((dict(class_labels=[0, 1], generator=[generator(0, i, 0) for i in range(count)]),
           f"generator is a list of {count}; allowed: one generator, or one for each of 2") for count in (0, 1, 3)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=why):
            pipe(**({"class_labels": 0} | options))
    pipe.vae.register_to_config(latents_std=None)
    with pytest.raises(ValueError, match="latents_std None in the config of vae; allowed: both, or neither"):
        pipe(0)


def test_labels_of_any_whole_type_are_taken(folder):
    pipe, expected = load(folder), [2, 0]
    for labels in (np.array(expected), torch.tensor(expected), [np.int64(2), np.str_("cat")], (2, "cat")):
        assert pipe.label_numbers(labels) == expected
    assert all(pipe.label_numbers(one) == [2] for one in (2, np.int64(2), torch.tensor(2), np.uint8(2), "été"))


def test_what_no_pipeline_expresses_is_said(weights, tmp_path, caplog):
    export_main([str(weights / "run"), str(tmp_path / "net")])
    network = read_export(tmp_path / "net")
    state = network.state | {"pos_embed": network.state["pos_embed"] + 0.1}
    save_export(tmp_path / "odd", replace(network, state=state))
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(document(weights) | {"ckpt_path": None}))
    source, named = str(tmp_path / "net.safetensors"), ["--format", "diffusers", "--config", str(config)]
    for argv, why in (
        ([source, *named, "transport.path_type=GVP"], "path_type is GVP, not Linear"),
        ([source, *named, "transport.prediction=noise"], "prediction is noise, not velocity"),
        ([str(tmp_path / "odd.safetensors"), *named], "pos_embed are not the tables"),
        ([source, *named[:2]], "names none: give --tokenizer"),
        ([source, *named, "vae.ckpt_path=none.pt"], "vae.ckpt_path: .*none.pt"),
        ([str(weights / "run"), "--format", "diffusers", "--license", "My Own"], "--license 'My Own': an identifier"),
    ):
        with pytest.raises(ValueError, match=why):
            export_main([argv[0], str(tmp_path / "x"), *argv[1:]])
        assert not (tmp_path / "x").exists()
    tokenizer = ["--tokenizer", str(weights / "tokenizer.safetensors")]
    save_export(tmp_path / "untold", replace(network, sample=None))
    assert export_main([str(tmp_path / "untold.safetensors"), str(tmp_path / "x"), *named[:2], *tokenizer]) == 0
    assert "tells no sampling settings: 249 steps without guidance" in caplog.text
    assert export_main([source, str(tmp_path / "y"), *named, "sample.sampling_method=heun"]) == 0
    assert "sampling_method heun: the pipeline's scheduler is Euler's" in caplog.text
    assert "scheduler is Euler's" in (tmp_path / "y/README.md").read_text(encoding="utf-8")


def test_programs_take_the_folder_for_network_and_tokenizer(weights, folder, tmp_path):
    run = LightningDiTRun.model_validate(document(weights))
    vae = run.vae.model_copy(update={"ckpt_path": str(folder)})
    again = run.model_copy(update={"ckpt_path": str(folder), "vae": vae})
    first, second = diffusion_weights(run), diffusion_weights(again)
    assert first.state.keys() == second.state.keys()
    assert all(torch.equal(first.state[name], value) for name, value in second.state.items())
    assert second.latents.to_json() == first.latents.to_json() and second.step == 7
    assert second.extra["classes"] == ["cat", "dog", "été"]
    assert fingerprint(build_tokenizer(again, OPS)) == fingerprint(build_tokenizer(run, OPS))
    assert export_main([str(folder), str(tmp_path / "back")]) == 0
    assert all(torch.equal(first.state[name], value) for name, value in read_export(tmp_path / "back").state.items())
    assert export_main([str(folder), str(tmp_path / "again"), "--format", "diffusers"]) == 0
    for name in ("model_index.json", "scheduler/scheduler_config.json", "vae/config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    changed = dict(num_inference_steps=8, guidance_scale=3.5, guidance_end=0.75, guidance_channels=2)
    for name, values in (("changed", changed), ("odd", {"guidance_scale": 0.5})):
        shutil.copytree(folder, tmp_path / name)
        (tmp_path / name / "model_index.json").write_text(json.dumps(index | values), encoding="utf-8")
    assert export_main([str(tmp_path / "changed"), str(tmp_path / "taken"), "--format", "diffusers"]) == 0
    assert json.loads((tmp_path / "taken/model_index.json").read_text(encoding="utf-8")) == index | changed
    with pytest.raises(ValueError, match=r"odd/model_index.json: sample.*cfg_scale"):
        export_main([str(tmp_path / "odd"), str(tmp_path / "x"), "--format", "diffusers"])
    assert str(tmp_path) not in (tmp_path / "back.json").read_text(encoding="utf-8"), "a folder of this machine"
    shutil.copytree(folder, tmp_path / "damaged")
    path = tmp_path / "damaged/transformer/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\1\2\3\4")
    with pytest.raises(ValueError, match=r"safetensors is damaged: SHA-256 .*, config.json says"):
        diffusion_weights(again.model_copy(update={"ckpt_path": str(tmp_path / "damaged")}))
    stated = json.loads((folder / "transformer/config.json").read_text(encoding="utf-8"))
    assert stated["_exported"]["hashes"]["model"] == fingerprint(build_diffusion(first, OPS, "run"))
