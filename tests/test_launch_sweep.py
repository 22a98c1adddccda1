"""The sweep program: a tiny network, judged by a tiny foundation model."""

import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from common.files import sha256
from launch import sample, sweep
from launch.config import load
from launch.config_files import ConfigError
from launch.evaluation import judge
from launch.evaluation.features import FoundationFeatures
from launch.evaluation.image_source import open_images
from launch.sampling.generator import SampleGenerator
from launch.sweeping import finished, networks
from tests.children import Moment, launch
from tests.measured import distance
from tests.sweeps import SIDE, N, contents, write_sweep
from tests.tiny_weights import a_run

AXES = ("sample.cfg_scale=1,2,3", "sample.cfg_interval_start=0,0.2")
#: Of the six settings the two without guidance make the same images.
DISTINCT = 5


@pytest.fixture(autouse=True)
def threads():
    """Of whatever else computes here; a sweep's own do not depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("sweep")
    (path / "argv.json").write_text(json.dumps(write_sweep(path)))
    return path


def argv(root, output, *axes) -> list[str]:
    return [*json.loads((root / "argv.json").read_text()), *(axes or AXES), "--output", str(output)]


@pytest.fixture(scope="module")
def swept(root):
    """A finished sweep, and how often networks were built and images went through the one that judges."""
    counts = {"built": 0, "judged": 0}
    real_build, real_features = networks.build_diffusion, FoundationFeatures.__call__

    def build(*args):
        counts["built"] += 1
        return real_build(*args)

    def features(self, images):
        counts["judged"] += len(images)
        return real_features(self, images)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(networks, "build_diffusion", build)
            patch.setattr(FoundationFeatures, "__call__", features)
            assert sweep.main(argv(root, root / "out")) == 0
    finally:
        torch.set_num_threads(before)
    return root / "out", counts


def results(output) -> dict:
    return json.loads((output / "results.json").read_text())


def test_networks_are_loaded_and_the_reference_measured_once(swept):
    assert swept[1] == {"built": 1, "judged": 30 + DISTINCT * N}


def test_each_setting_has_the_figure_of_the_images_that_sample_makes(root, swept, tmp_path):
    extractor = FoundationFeatures.from_file(root / "foundation.safetensors")
    real = extractor(next(open_images(root / "real").batches(100)))["features"].double().numpy()
    rows = {tuple(row["values"].values()): row for row in results(swept[0])["sweep"]}
    assert len(rows) == 6
    for scale, start in ((1, 0), (3, 0), (2, 0.2)):
        named = {"cfg_scale": float(scale), "cfg_interval_start": float(start)}
        run = a_run(root, per_proc_batch_size=8, num_sampling_steps=3, fid_num=N, **named)
        with np.load(sample.generate(run, tmp_path / f"{scale}-{start}")) as content:
            pixels = torch.from_numpy(content["arr_0"])
        facts = json.loads((tmp_path / f"{scale}-{start}" / "samples.json").read_text())
        row = rows[scale, start]
        assert row["metrics"]["fid"] == pytest.approx(distance(extractor(pixels)["features"].double().numpy(), real))
        assert (row["nfe"], row["guided_nfe"]) == (facts["nfe"], facts["guided_nfe"])
        assert results(swept[0])["hashes"] == facts["hashes"]


def test_the_best_comes_first_and_is_a_run_file_of_sample(root, swept, tmp_path):
    output, found = swept[0], results(swept[0])
    values = [row["metrics"]["fid"] for row in found["sweep"]]
    assert values == sorted(values) and values[0] < values[-1] and found["metrics"] == {"fid": values[0]}
    run, _ = load(output / "best.yaml", kind="lightningdit")
    base, _ = load(root / "run.yaml", kind="lightningdit")
    best = {key: float(value) for key, value in found["best"].items()}
    assert run == base.model_copy(update={"sample": base.sample.model_copy(update=best)})
    assert sample.main([str(output / "best.yaml"), f"sample.fid_num={N}", "--output", str(tmp_path / "best")]) == 0
    with np.load(tmp_path / "best" / "samples.npz") as content:
        digest = judge.pixels_hash(torch.from_numpy(content["arr_0"]))
    assert digest == found["samples_sha256"] == found["sweep"][0]["samples_sha256"]


def test_the_table_has_all_settings_with_number_and_hashes(root, swept):
    text = (swept[0] / "sweep.md").read_text()
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")][2:]
    cells = [[cell.strip() for cell in row] for row in rows]
    found = results(swept[0])
    wanted = [[str(v) for v in row["values"].values()] for row in found["sweep"]]
    assert [row[1:3] for row in cells] == wanted and [row[0] for row in cells] == list("123456")
    assert {row[4] for row in cells} == {str(N)}
    assert [row[7] for row in cells] == [row["samples_sha256"][:12] for row in found["sweep"]]
    for digest in (*found["hashes"].values(), sha256(root / "foundation.safetensors")):
        assert digest in text
    assert Image.open(swept[0] / "sweep.png").size[0] > 400


def test_what_is_there_is_not_made_again_and_what_is_not_whole_is(root, swept, tmp_path, monkeypatch, caplog):
    output = tmp_path / "again"
    whole = contents(swept[0])
    for name, content in whole.items():
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_bytes(content)
    first, second, third, *_ = sorted((output / "settings").iterdir())
    first.unlink()
    second.write_bytes(second.read_bytes()[:-40])
    third.write_text(third.read_text().replace('"nfe": 2.0', '"nfe": 3.0'))
    (output / "best.yaml").unlink()
    made, real = [], sweep.make
    monkeypatch.setattr(sweep, "make", lambda setting, *args: made.append(setting.key) or real(setting, *args))
    assert sweep.main(argv(root, output)) == 0
    assert sorted(made) == [first.stem, second.stem, third.stem] and contents(output) == whole
    assert caplog.text.count("is made again") == 2 and "no JSON" in caplog.text and "checksum" in caplog.text
    made.clear()
    assert sweep.main(argv(root, output, "sample.cfg_scale=1,2,3,5", AXES[1])) == 0
    assert len(made) == 2 and len(results(output)["sweep"]) == 8
    shared = [row for row in results(output)["sweep"] if row["values"]["cfg_scale"] != 5]
    assert shared == results(swept[0])["sweep"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--samples", "20"], r"another num_samples \(16 there, 20 now\)"),
        (["sample.timestep_shift=0.5"], r"another sample\.timestep_shift \(0\.3 there, 0\.5 now\)"),
        (["transport.use_lognorm=true"], r"another transport\.use_lognorm"),
        (["ckpt_path=published.pt", "data.latent_norm=false"], r"another .*step \(7 there"),
        (["--reference", "real.npz"], r"another reference\.files_sha256"),
        (["--figure", "recognised"], "of digits of 32×32, not of images of 8×8"),
    ],
)
def test_another_sweep_s_directory_is_refused_by_the_difference(root, swept, change, words):
    if not (root / "real.npz").exists():
        np.savez(root / "real.npz", np.zeros((9, SIDE, SIDE, 3), np.uint8))
    change = [
        c.replace("published.pt", str(root / "published.pt")).replace("real.npz", str(root / "real.npz"))
        for c in change
    ]
    before = contents(swept[0])
    with pytest.raises(ValueError, match=words):
        sweep.main([*argv(root, swept[0]), *change])
    assert contents(swept[0]) == before


def test_a_setting_without_finite_samples_is_told_and_comes_last(root, tmp_path, monkeypatch):
    real = SampleGenerator.solve

    def spoilt(self, indices):
        made = real(self, indices)
        return made | {"finite_latents": made["finite_latents"] & (self.settings.cfg_scale != 2)}

    monkeypatch.setattr(SampleGenerator, "solve", spoilt)
    assert sweep.main(argv(root, tmp_path, "sample.cfg_scale=2,1")) == 0
    assert [row["values"]["cfg_scale"] for row in results(tmp_path)["sweep"]] == [1, 2]
    assert "cfg_scale=2: no samples: the latents of samples 0, 1" in (tmp_path / "sweep.md").read_text()
    assert "failed" in results(tmp_path)["sweep"][1] and results(tmp_path)["best"] == {"cfg_scale": 1}
    monkeypatch.setattr(SampleGenerator, "solve", lambda self, indices: 1 / 0)
    assert sweep.main(argv(root, tmp_path, "sample.cfg_scale=2,1")) == 0  # both are outcomes; nothing is made again


def test_a_sweep_without_any_samples_is_an_error(root, tmp_path, monkeypatch):
    def refuse(self, settings, labels):
        raise ValueError("not finite")

    monkeypatch.setattr(networks.SharedNetworks, "sample", refuse)
    with pytest.raises(ValueError, match="no setting has samples; cfg_scale=2: not finite"):
        sweep.main(argv(root, tmp_path, "sample.cfg_scale=2,3"))
    assert not (tmp_path / "results.json").exists()


def test_precisions_are_each_rounded_from_the_same_weights(root):
    shared = networks.SharedNetworks(a_run(root), torch.device("cpu"))
    settings, labels = a_run(root, precision="bfloat16").sampling(), [0, 1, 2]
    exact = shared.sample(a_run(root).sampling(), labels).images
    rounded = shared.sample(settings, labels).images
    assert torch.equal(shared.sample(a_run(root).sampling(), labels).images, exact) and not torch.equal(exact, rounded)
    alone = networks.SharedNetworks(a_run(root), torch.device("cpu")).sample(settings, labels).images
    assert torch.equal(rounded, alone)


def test_killed_and_resumed_by_another_number_of_processes_it_leaves_the_same_files(root, swept, tmp_path):
    output = tmp_path / "killed"
    at = Moment("common.records", "write_checksummed", 2, rank=1)
    codes = launch("sweep", *argv(root, output), world_size=2, at=at, log=tmp_path / "log", limit=100)
    assert codes[1] == -9 and 0 < len(list((output / "settings").iterdir())) < DISTINCT
    said = [(tmp_path / f"log.{rank}").read_text().splitlines() for rank in range(2)]
    made = [{line.partition("  ")[2] for line in lines if line.startswith("[")} for lines in said]
    assert all(made) and not made[0] & made[1] and not (output / "results.json").exists()
    assert sweep.main(argv(root, output)) == 0
    assert contents(output) == contents(swept[0])


def test_the_command_line_is_checked_before_anything_is_loaded(root, monkeypatch):
    monkeypatch.setattr(networks, "SharedNetworks", None)
    base = argv(root, root / "never")
    for change, words in {
        ("--samples", "1"): "--samples must be at least 2, got 1",
        ("--figure", "fidd"): "no figure 'fidd' \\(did you mean 'fid'\\?\\)",
        ("--figure", "fid,fid"): "figure 'fid' is given twice",
        ("--figure", "fdd"): "fdd: name DINOv2's weights",
        ("--reference", "/nowhere"): "--reference /nowhere does not exist",
        ("--figure", "recognised", "data.image_size=32"): "no figure reads it",
        ("sample.cfg_scal=1,2",): "unknown key 'cfg_scal' \\(did you mean 'cfg_scale'\\?\\)",
        ("sample.sampling_method=euler,hein",): "sampling_method 'hein' \\(did you mean 'heun'\\?\\)",
    }.items():
        with pytest.raises((ConfigError, ValueError), match=words):
            sweep.main([*base, *change])
    assert not (root / "never").exists()


def test_the_description_is_written_anew_where_nothing_was_finished(tmp_path):
    finished.claim(tmp_path, {"num_samples": 3, "sample": {}})
    finished.claim(tmp_path, {"num_samples": 4, "sample": {}})
    assert json.loads((tmp_path / "sweep.json").read_text())["num_samples"] == 4
    (tmp_path / "settings" / "x.json").write_text(yaml.safe_dump({}))
    with pytest.raises(ConfigError, match=r"another num_samples \(4 there, 3 now\)"):
        finished.claim(tmp_path, {"num_samples": 3, "sample": {}})
