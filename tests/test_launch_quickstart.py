"""Every stage of the quickstart, on its real data and programs, with a handful of training steps."""

import functools
import json
import re
import types

import numpy as np
import pytest
import yaml
from PIL import Image

from launch import extract, quickstart
from launch.digits_demo import foundation


@pytest.fixture
def hasty(tmp_path, monkeypatch):
    """Steps enough to run, not to learn; the guards that ask for quality are lowered."""
    configs = tmp_path / "configs"
    configs.mkdir()
    for name, steps, section in (("digits_vavae", 2, {}), ("digits", 3, {"num_sampling_steps": 2, "fid_num": 100})):
        content = yaml.safe_load((quickstart.CONFIGS / f"{name}.yaml").read_text())
        content["train"] |= {"max_steps": steps, "log_every": 1}
        content["sample"] = content.get("sample", {}) | section
        if not section:
            del content["sample"]
        (configs / f"{name}.yaml").write_text(yaml.safe_dump(content))
    one_step = yaml.safe_load((quickstart.CONFIGS / "digits_one_step.yaml").read_text())
    one_step["train"] |= {"max_steps": 2}
    (configs / "digits_one_step.yaml").write_text(yaml.safe_dump(one_step))
    monkeypatch.setattr(quickstart, "CONFIGS", configs)
    hurried = functools.partial(foundation.train_foundation, steps=2)
    monkeypatch.setattr(quickstart, "train_foundation", hurried)
    monkeypatch.setattr(foundation, "MIN_ACCURACY", 0.0)
    monkeypatch.setattr(extract, "LEAST_PSNR", 0.0)
    return tmp_path / "out"


def test_every_stage_runs_and_the_limits_are_checked(hasty, capsys):
    assert quickstart.main(["--output", str(hasty), "--seed", "5"]) == 1  # three steps meet no limit
    text = capsys.readouterr().out
    assert all(f"── {n}/7" in text for n in range(1, 8))
    assert "$ python -m launch train lightningdit" in text and "MISSED: held-out reconstructions, PSNR" in text
    report = json.loads((hasty / "report.json").read_text())
    assert report["seed"] == 5 and report["samples"] == 100 and report["missed"]
    assert report["made"]["nfe"] == 1 and report["made"]["settings"]["cfg_scale"] > 1
    for name in ("samples.png", "reconstructions.png", "losses.png"):
        assert np.asarray(Image.open(hasty / name)).std() > 0
    page = (hasty / "gallery.html").read_text()
    assert f"open {hasty}/gallery.html in a browser" in text and "sample 3 of class 3" in page and "fid" in page
    assert report["metrics"]["reconstruction_psnr"] == report["reconstruction_psnr"]
    images = (hasty / "samples.png").read_bytes()
    assert quickstart.main(["--output", str(hasty), "--seed", "5"]) == 1  # nothing is made twice
    assert "resumed  checkpoint " in (text := capsys.readouterr().out) and "is already there" in text
    assert (hasty / "samples.png").read_bytes() == images


def test_one_step_goes_on_from_the_model_of_flow_matching(hasty, capsys):
    """Its own run, weights, samples and report beside the others; the table is that of samples in one evaluation."""
    assert quickstart.main(["--output", str(hasty), "--one-step"]) == 1  # two steps meet no limit
    text = capsys.readouterr().out
    assert all(f"── {n}/8" in text for n in range(1, 9)) and "one-step samples an SVC recognises" in text
    assert re.search(rf"train\.weight_init=\S*{hasty}/lightningdit\.safetensors", text)
    report = json.loads((hasty / "one_step/report.json").read_text())
    assert report["made"]["nfe"] == 1 and report["made"]["solver"] == "meanflow, 1 step" and report["samples"] == 100
    assert report["missed"] and "lightningdit" in report["seconds"] and "one_step" in report["seconds"]
    for name in ("samples.png", "losses.png", "gallery.html", "lightningdit.safetensors"):
        assert (hasty / "one_step" / name).stat().st_size > 0
    assert not (hasty / "report.json").exists() and not (hasty / "samples").exists()
    first = (hasty / "one_step/lightningdit.safetensors").read_bytes()
    assert quickstart.main(["--output", str(hasty), "--one-step"]) == 1  # nothing is made twice
    assert (hasty / "one_step/lightningdit.safetensors").read_bytes() == first
    with pytest.raises(SystemExit):
        quickstart.main(["--output", str(hasty), "--until", "one_step"])


def test_until_stops_early(hasty, capsys):
    assert quickstart.main(["--output", str(hasty), "--until", "data"]) == 0
    assert sorted(p.name for p in hasty.iterdir()) == ["data"]
    assert len(list((hasty / "data/train").rglob("*.png"))) == 1297


@pytest.mark.parametrize("step", [1, 2])
def test_an_export_of_an_earlier_step_makes_way(tmp_path, monkeypatch, step):
    for suffix in (".safetensors", ".json", ".pt"):
        (tmp_path / f"vavae{suffix}").write_text('{"step": 1}')
    asked = []
    monkeypatch.setattr(quickstart, "newest", lambda directory: types.SimpleNamespace(step=step))
    monkeypatch.setattr(quickstart.exporting, "main", lambda argv: asked.append((argv, list(tmp_path.iterdir()))))
    quickstart.Quickstart(tmp_path, 0)._export("vavae")
    assert asked == ([] if step == 1 else [([str(tmp_path / "vavae"), str(tmp_path / "vavae.safetensors")], [])])
