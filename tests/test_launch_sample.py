"""The sampling program, on a tiny tokenizer and a tiny network."""

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import kernels
from common.files import FileError
from launch import sample
from launch.config import LightningDiTRun
from launch.export import export
from launch.runtime import processes
from launch.runtime.run_lock import DirectoryInUseError, lock_directory
from launch.sampling import generator, produce, units
from launch.trained import from_checkpoint
from launch.training import checkpoint, engine
from launch.training.checkpoint_search import find_checkpoint
from lightningdit.flow import Transport
from lightningdit.model import LightningDiT
from lightningdit.sampler import BatchSampler
from lightningdit.sampler import sample as sample_latents
from lightningdit.weights import read_weights, save_export, save_published
from tests.children import Moment, launch
from tests.tiny_weights import STATISTICS, TOKENIZER, a_run, document, write_weights
from vavae.config import AutoencoderConfig
from vavae.images import to_uint8
from vavae.model import AutoencoderKL
from vavae.weights import load_tokenizer, write_export

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    monkeypatch.setattr(units, "UNIT", 4)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("weights"))


def images_of(npz):
    with np.load(npz) as content:
        return content["arr_0"], content["arr_1"]


def test_images_labels_and_facts(weights, tmp_path):
    npz = sample.generate(a_run(weights), tmp_path / "a")
    images, labels = images_of(npz)
    assert images.shape == (10, 8, 8, 3) and images.dtype == np.uint8
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    assert len(np.unique(images.reshape(10, -1), axis=0)) == 10
    facts = json.loads((tmp_path / "a" / "samples.json").read_text())
    assert (facts["num_samples"], facts["nfe"], facts["step"], facts["weights"]) == (10, 3, 7, "ema")
    assert 0 < facts["guided_nfe"] < 3 and facts["dtype"] == "float32" and "scale 2" in facts["guidance"]
    assert all(len(value) == 64 for value in facts["hashes"].values())
    assert Image.open(tmp_path / "a" / "samples.png").size[0] > 8
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["samples.json", "samples.npz", "samples.png"]


def test_a_directory_that_is_in_use_is_refused_until_its_images_are_there(weights, tmp_path):
    with lock_directory(tmp_path / "a", processes.Processes(0, 1, CPU)):
        with pytest.raises(DirectoryInUseError, match=rf"{tmp_path}/a is in use by process"):
            sample.generate(a_run(weights), tmp_path / "a")
        assert [path.name for path in (tmp_path / "a").iterdir()] == [".lock"]
    npz = sample.generate(a_run(weights), tmp_path / "a")
    with lock_directory(tmp_path / "a", processes.Processes(0, 1, CPU)):
        assert sample.generate(a_run(weights), tmp_path / "a") == npz


def test_names_of_classes_come_with_samples_and_exports_but_do_not_make_them_others(weights, tmp_path, capsys):
    export(find_checkpoint(weights / "run"), tmp_path / "net")
    run = a_run(weights).model_copy(update={"ckpt_path": str(tmp_path / "net.safetensors")})
    sample.generate(run, tmp_path / "a")
    description = tmp_path / "a" / "samples.json"
    facts = json.loads(description.read_text())
    assert facts["classes"] == json.loads((tmp_path / "net.json").read_text())["classes"] == ["cat", "dog", "été"]
    del facts["classes"]  # as samples from before names were kept
    description.write_text(json.dumps(facts))
    sample.generate(run, tmp_path / "a")
    assert "is already there" in capsys.readouterr().out
    unnamed = document(weights) | {"ckpt_path": str(weights / "published.pt")}
    unnamed["data"] |= {"latent_norm": False}
    npz = sample.generate(LightningDiTRun.model_validate(unnamed), tmp_path / "b")
    assert "classes" not in json.loads(npz.with_name("samples.json").read_text())


def test_the_pixels_are_the_decoded_denormalised_samples(weights, tmp_path):
    """Done by hand for one image."""
    run, ops = a_run(weights), kernels.select("reference")
    images, _ = images_of(sample.generate(run, tmp_path / "a"))
    network = LightningDiT(run.network(), ops)
    network.load_state_dict(read_weights(weights / "published.pt")[0])
    made = sample_latents(network, Transport(), run.sampling(), torch.tensor([2]), [5], shape=(4, 4, 4), null_label=3)
    z = made.latents * STATISTICS.std.view(1, -1, 1, 1) + STATISTICS.mean.view(1, -1, 1, 1)
    with torch.no_grad():
        want = to_uint8(load_tokenizer(weights / "tokenizer.safetensors", ops).decode(z))[0].permute(1, 2, 0).numpy()
    assert np.abs(images[5].astype(int) - want).max() <= 1


def test_likelihoods_lie_beside_the_images(weights, tmp_path):
    run = a_run(weights, cfg_scale=1.0, likelihood=True, fid_num=6)
    npz = sample.generate(run, tmp_path / "likely")
    with np.load(npz) as content:
        likelihoods, images = content["log_likelihood"], content["arr_0"]
    assert likelihoods.shape == (6,) and np.isfinite(likelihoods).all() and len(set(likelihoods.tolist())) == 6
    facts = json.loads((tmp_path / "likely" / "samples.json").read_text())
    assert facts["log_likelihood"] == pytest.approx(likelihoods.mean()) and facts["guided_nfe"] == 0
    plain = sample.generate(a_run(weights, cfg_scale=1.0, fid_num=6), tmp_path / "plain")
    assert np.array_equal(images_of(plain)[0], images) and "log_likelihood" not in np.load(plain)


def test_an_interrupted_run_goes_on(weights, tmp_path, monkeypatch):
    whole = sample.generate(a_run(weights), tmp_path / "whole")
    original, calls = sample.SampleGenerator.solve, []

    def dies(self, indices):
        calls.append(indices)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, indices)

    monkeypatch.setattr(sample.SampleGenerator, "solve", dies)
    with pytest.raises(KeyboardInterrupt):
        sample.generate(a_run(weights), tmp_path / "cut")
    npz = sample.generate(a_run(weights), tmp_path / "cut")
    assert [list(c) for c in calls] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [8, 9, 10, 11]]
    assert npz.read_bytes() == whole.read_bytes()
    sample.generate(a_run(weights), tmp_path / "cut")
    assert len(calls) == 4  # nothing is made twice


@pytest.fixture(scope="module")
def unfinished(weights, tmp_path_factory):
    """A sampling whose parts 0, 4 and 8 were made, and not joined."""
    output = tmp_path_factory.mktemp("unfinished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units, "UNIT", 4)
        patch.setattr(produce, "_finish", lambda *args: None)
        sample.generate(a_run(weights), output)
    return output


def rewritten(path, **changes) -> None:
    with np.load(path) as content:
        arrays = dict(content) | changes
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})


DAMAGES = {
    "empty": (lambda path: path.write_bytes(b""), "is damaged"),
    "text": (lambda path: path.write_text("hello"), "is damaged"),
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:-300]), "is damaged"),
    "pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "named pipe"),
    "fewer images": (lambda path: rewritten(path, images=np.zeros((3, 16, 16, 3), np.uint8)), "does not hold 4 images"),
    "no images": (lambda path: rewritten(path, images=None), "does not hold 4 images"),
    "floats": (lambda path: rewritten(path, images=np.zeros((4, 16, 16, 3))), "does not hold 4 images"),
    "many counts": (lambda path: rewritten(path, nfe=np.zeros(3)), "does not hold 4 images"),
    "another size": (lambda path: rewritten(path, images=np.zeros((4, 6, 6, 3), np.uint8)), "images of another size"),
    "another part": (
        lambda path: path.write_bytes(path.with_name("0000000-0000004.npz").read_bytes()),
        "the images from 0 on",
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_part_is_named_and_made_again(weights, unfinished, tmp_path, kind):
    damage, why = DAMAGES[kind]
    output = tmp_path / "samples"
    shutil.copytree(unfinished, output)
    part = output / "parts" / "0000004-0000008.npz"
    damage(part)
    with pytest.raises(FileError, match=rf"0000004-0000008\.npz .*{why}"):
        sample.generate(a_run(weights), output)
    assert not (output / "samples.npz").exists() and not (output / "samples.json").exists()
    part.unlink()
    whole = sample.generate(a_run(weights), tmp_path / "whole")
    assert sample.generate(a_run(weights), output).read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("content", [b"", b"hello"])
def test_finished_samples_that_are_damaged_are_not_there(weights, tmp_path, content):
    npz = sample.generate(a_run(weights, fid_num=4), tmp_path)
    whole = npz.read_bytes()
    npz.write_bytes(content)
    with pytest.raises(FileError, match=r"samples\.npz is damaged"):
        sample.generate(a_run(weights, fid_num=4), tmp_path)
    npz.unlink()
    assert sample.generate(a_run(weights, fid_num=4), tmp_path).read_bytes() == whole


def no_npz(directory) -> bool:
    return not any(path.suffix == ".npz" for path in directory.rglob("*"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["run", "published.pt", "export", "tokenizer.safetensors"])
def test_weights_that_are_not_finite_make_no_image(weights, tmp_path, kind, value):
    content, ops = document(weights) | {"data": document(weights)["data"] | {"latent_norm": False}}, "reference"
    spoilt = tmp_path / kind
    if kind == "tokenizer.safetensors":
        tokenizer = load_tokenizer(weights / kind, kernels.select(ops))
        tokenizer.decoder.conv_out.bias[1] = value  # one colour of three
        write_export(spoilt, tokenizer.state_dict(), tokenizer.config)
        content["vae"]["ckpt_path"] = str(spoilt)
    else:
        state, _ = read_weights(weights / "published.pt")
        state["final_layer.linear.bias"][3] = value
        if kind == "published.pt":
            save_published(spoilt, state, state)
        elif kind == "export":
            found = from_checkpoint(checkpoint.newest(weights / "run" / "checkpoints"))
            save_export(spoilt, replace(found, state=state))
        else:
            old = checkpoint.newest(weights / "run" / "checkpoints").state
            checkpoint.save(spoilt / "checkpoints", old, {"model": {"model": state, "ema": state}})
        content["ckpt_path"] = str(spoilt)
    with pytest.raises(ValueError, match=f"{kind}.*not finite|not finite.*{kind}"):
        sample.generate(LightningDiTRun.model_validate(content), tmp_path / "out")
    assert no_npz(tmp_path)


@pytest.mark.parametrize("what", ["latents", "decoded images", "log-likelihoods"])
def test_a_sample_that_is_not_finite_is_named_and_its_batch_not_kept(weights, tmp_path, monkeypatch, what):
    """Finite weights may overflow too."""
    run = a_run(weights, cfg_scale=1.0, likelihood=True)
    real, decode = BatchSampler.__call__, AutoencoderKL.decode

    def spoilt(sampler, y, indices):
        made = real(sampler, y, indices)
        if 5 in indices and what != "decoded images":
            part = made.latents if what == "latents" else made.log_likelihood
            part[indices.index(5)] = float("nan")
        return made

    def spoilt_decode(self, z):
        images = decode(self, z)
        if what == "decoded images" and spoilt_decode.calls == 1:
            images[1, 2, 0, 0] = float("inf")
        spoilt_decode.calls += 1
        return images

    spoilt_decode.calls = 0
    monkeypatch.setattr(BatchSampler, "__call__", spoilt)
    monkeypatch.setattr(AutoencoderKL, "decode", spoilt_decode)
    source = "tokenizer.safetensors" if what == "decoded images" else "run in float32"
    with pytest.raises(ValueError, match=f"the {what} of samples 5 are not finite; they come from .*{source}"):
        sample.generate(run, tmp_path)
    assert [path.name for path in (tmp_path / "parts").glob("*.npz")] == ["0000000-0000004.npz"]
    monkeypatch.undo()
    assert np.isfinite(np.load(sample.generate(run, tmp_path))["log_likelihood"]).all()


def test_a_solver_that_finds_no_step_names_samples_and_weights(weights, tmp_path):
    state = {key: value * 1e19 for key, value in read_weights(weights / "published.pt")[0].items()}
    save_published(tmp_path / "large.pt", state, state)
    content = document(weights, sampling_method="dopri5")
    content["data"]["latent_norm"] = False
    run = LightningDiTRun.model_validate(content | {"ckpt_path": str(tmp_path / "large.pt")})
    with pytest.raises(ValueError, match=r"samples 0, 1, 2, 3 of .*large.pt: dopri5 finds no step .*not finite"):
        sample.generate(run, tmp_path / "out")
    assert no_npz(tmp_path)


class Rank(processes.Processes):
    """One of several processes, run one after the other."""

    def barrier(self) -> None:
        pass

    def broadcast(self, value):
        return value

    def on_main(self, function):
        """What all learn of the parts that are there: none, as they look before any of them makes one."""
        if self.is_main:
            function()
        return []


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_each_batch_is_made_by_one_process(weights, tmp_path, monkeypatch, world_size):
    real, made = sample.SampleGenerator.solve, []

    def counted(self, indices):
        made.append((rank, list(indices)))
        return real(self, indices)

    monkeypatch.setattr(sample.SampleGenerator, "solve", counted)
    (tmp_path / "parts").mkdir()
    for rank in reversed(range(world_size)):  # the main process last: it joins the parts
        monkeypatch.setattr(engine, "start_processes", lambda rank=rank, **_: Rank(rank, world_size, CPU))
        sample.generate(a_run(weights), tmp_path)
    assert sorted(indices for _, indices in made) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert {rank for rank, _ in made} == set(range(world_size))


def test_two_processes_killed_and_finished_by_three_leave_the_files_of_one(weights, tmp_path, monkeypatch):
    """By SIGKILL, one as it keeps its second part; the other leaves then, too."""
    monkeypatch.undo()  # they have units as they are
    settings = {"fid_num": 5 * units.UNIT - 3, "per_proc_batch_size": units.UNIT, "num_sampling_steps": 2}
    config, output = tmp_path / "run.yaml", tmp_path / "killed"
    config.write_text(yaml.safe_dump(document(weights, **settings)))
    command = ["sample", str(config), "--output", str(output)]
    kill = Moment("launch.sampling.parts:Parts", "write", 2, rank=1)
    codes = launch(*command, world_size=2, at=kill, log=tmp_path / "log")
    assert codes[1] == -9 and codes[0] != 0 and not (output / "samples.json").exists()
    assert len(list((output / "parts").glob("*.npz"))) in (1, 2, 3, 4)
    assert launch(*command, world_size=3, log=tmp_path / "log") == [0] * 3, (tmp_path / "log.0").read_text()
    sample.generate(a_run(weights, **settings), tmp_path / "whole")
    for name in ("samples.npz", "samples.json", "samples.png"):
        assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_network_runs_in_the_precision_that_is_stated(weights, tmp_path, monkeypatch, precision):
    """Weights and arithmetic of the blocks, and an error against float64 of that many bits."""
    run, dtypes, made = a_run(weights, precision=precision, fid_num=4), set(), []

    class Spied(BatchSampler):
        def __init__(self, model, *arguments, **more):
            super().__init__(model, *arguments, **more)
            model.blocks[0].mlp.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
            dtypes.update(parameter.dtype for parameter in model.blocks.parameters())

        def __call__(self, y, indices):
            made.append(super().__call__(y, indices))
            return made[0]

    monkeypatch.setattr(generator, "BatchSampler", Spied)
    sample.generate(run, tmp_path)
    facts = json.loads((tmp_path / "samples.json").read_text())
    assert facts["dtype"] == facts["settings"]["precision"] == precision
    assert dtypes == {getattr(torch, precision)} and made[0].latents.dtype == torch.float32
    network = LightningDiT(run.network(), kernels.select("reference"))
    network.load_state_dict(read_weights(weights / "published.pt")[0])
    y = torch.tensor([0, 1, 2, 0])
    known = {"shape": (4, 4, 4), "null_label": 3}
    exact = sample_latents(network.double(), Transport(), run.sampling(), y, range(4), **known).latents
    error = ((made[0].latents - exact).abs().max() / exact.abs().max()).item()
    low, high = (0.0, 1e-5) if precision == "float32" else (2.0**-14, 2.0**-6)
    assert low <= error < high, error


def test_batch_size_and_number_change_no_image(weights, tmp_path):
    few, _ = images_of(sample.generate(a_run(weights, fid_num=4, per_proc_batch_size=3), tmp_path / "few"))
    many, _ = images_of(sample.generate(a_run(weights), tmp_path / "many"))
    assert np.abs(few.astype(int) - many[:4]).max() <= 1


def test_images_of_other_settings_are_not_mixed(weights, tmp_path):
    sample.generate(a_run(weights), tmp_path)
    with pytest.raises(ValueError, match=r"holds images of other guidance, settings .*scale 2 .*scale 3 "):
        sample.generate(a_run(weights, cfg_scale=3.0), tmp_path)
    said = rf"^{tmp_path} holds images of other settings \(settings\.seed: 0 there, 1 now\); give another --output"
    with pytest.raises(ValueError, match=said):
        sample.generate(a_run(weights, seed=1), tmp_path)


def test_wrong_weights_and_labels_are_named(weights, tmp_path):
    base = document(weights)

    def error(labels=None, **changes):
        with pytest.raises(ValueError) as caught:
            sample.generate(LightningDiTRun.model_validate(base | changes), tmp_path, labels=labels)
        return str(caught.value)

    assert "is another network than the config's: depth 2 (config: 3)" in error(model=base["model"] | {"depth": 3})
    assert "vae.ckpt_path is not set" in error(vae=base["vae"] | {"ckpt_path": None})
    assert "does not exist" in error(vae=base["vae"] | {"ckpt_path": str(tmp_path / "x.pt")})
    assert "is no checkpoint" in error(ckpt_path=str(tmp_path))
    assert "x.pt does not exist" in error(ckpt_path=str(tmp_path / "x.pt"), data=base["data"] | {"latent_norm": False})
    assert "labels [3, -1]: classes are 0 to 2" in error(labels=[0, 3, -1])


def test_tokenizer_of_other_channels(weights, tmp_path):
    config = AutoencoderConfig(**TOKENIZER | {"embed_dim": 3})
    other = AutoencoderKL(config, kernels.select("reference"))
    write_export(tmp_path / "other.safetensors", other.state_dict(), config)
    run = document(weights)
    run["vae"]["ckpt_path"] = str(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="latents of 3 channels, the model makes 4"):
        sample.generate(LightningDiTRun.model_validate(run), tmp_path)


def test_command_line_and_demo(weights, tmp_path, monkeypatch):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(document(weights)))
    with pytest.raises(ValueError, match=r"--demo shows classes of ImageNet's 1,000; this model has 3 \(data.num_cl"):
        sample.main([str(config), "--demo", "--output", str(tmp_path / "demo")])
    monkeypatch.setattr(sample, "DEMO_LABELS", (0, 1, 2, 0, 1, 2, 0, 1))
    assert sample.main([str(config), "--demo", "--output", str(tmp_path / "demo")]) == 0
    assert Image.open(tmp_path / "demo" / "samples.png").size == (32, 16)
    facts = json.loads((tmp_path / "demo" / "samples.json").read_text())
    assert facts["guidance"].startswith("scale 9") and facts["guided_nfe"] == facts["nfe"]
    arguments = [str(config), "sample.num_sampling_steps=2", "--labels", "2,2", "--output", str(tmp_path / "two")]
    assert sample.main(arguments) == 0
    assert images_of(tmp_path / "two" / "samples.npz")[1].tolist() == [2, 2]
