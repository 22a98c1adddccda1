"""A sweep's command line as axes and settings, how settings are shared out, and the run file of the best one."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from launch import sweep
from launch.config import load
from launch.config_files import ConfigError
from launch.evaluation.figures import FIGURES
from launch.sweeping import picture, report
from launch.sweeping.axes import Axis, Setting, load_settings, split_overrides
from launch.sweeping.share import cost, shares
from lightningdit.config import SampleConfig
from tests.tiny_weights import document


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(document(tmp_path)))
    return path


LISTS = {
    "sample.cfg_scale=1,2,4.5": [1, 2, 4.5],
    "sample.cfg_scale= 1 , 1e-4 ": [1, 1e-4],
    "sample.cfg_channels=null,3": [None, 3],
    "sample.x=true,no,off": [True, False, False],
    "sample.x=euler,heun": ["euler", "heun"],
    'sample.x="a,b",c': ["a,b", "c"],
    "sample.x='1',1": ["1", 1],
    "sample.x='it''s, so',b": ["it's, so", "b"],
    "sample.x=/a/b.pt,~/c d.pt": ["/a/b.pt", "~/c d.pt"],
}


@pytest.mark.parametrize("override", LISTS)
def test_a_list_of_values_is_an_axis(override):
    axes, single = split_overrides(["train.max_steps=3", override])
    assert axes == [Axis(override.partition("=")[0][7:], tuple(LISTS[override]))] and single == ["train.max_steps=3"]
    assert [type(value) for value in axes[0].values] == [type(value) for value in LISTS[override]]


SINGLE = ('sample.x="a,b"', "sample.x=", "sample.x=3", "sample={a: 1, b: 2}", "sample.x={a: 1, b: 2}", "train.x=a,b")


@pytest.mark.parametrize("override", SINGLE)
def test_anything_else_is_an_override_as_elsewhere(override):
    axes, single = split_overrides(["sample.y=1,2", override])
    assert [axis.key for axis in axes] == ["y"] and single == [override]


REFUSED = {
    ("sample.cfg_scale=3",): "nothing is swept",
    ("sample.x=1,2,",): "no value stands behind the last comma",
    ("sample.x=1,,2",): "is not YAML",
    ("sample.x=1,2]",): "is not YAML",
    ("sample.x=1,!!int 2",): "is a tag in YAML",
    ("sample.x=1,2 # three",): "is a comment in YAML",
    ("sample.x=1,010",): "010 is a number in base 8",
    ("sample.x=[1,2],3",): r"\[1, 2\] is no single value; list them without brackets",
    ("sample.x=1,2", "sample.x=3,4"): "sample.x is given twice",
    ("sample.x=1,2", "sample.x=3"): "sample.x is given twice: as an axis and with one value",
    ("sample.fid_num=10,20",): "sample.fid_num cannot be swept: --samples says",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_what_is_no_axis_is_refused(overrides):
    with pytest.raises(ConfigError, match=REFUSED[overrides]):
        split_overrides(overrides)


def settings(config, *overrides, num_samples=None):
    axes, single = split_overrides(overrides)
    return load_settings(config, axes, single, num_samples)[1]


def test_settings_are_the_product_with_the_last_axis_fastest(config):
    found = settings(config, "sample.seed=1,2", "sample.cfg_scale=2,3", "sample.timestep_shift=0.5")
    values = [(each.sample.seed, each.sample.cfg_scale) for each in found]
    assert values == list(itertools.product((1, 2), (2.0, 3.0)))
    assert {each.sample.timestep_shift for each in found} == {0.5} and found[1].name == "seed=1, cfg_scale=3"
    assert len({each.key for each in found}) == 4


@pytest.mark.parametrize(("given", "in_file", "wanted"), [(None, 10, 10), (None, 50_000, 1000), (4000, 10, 4000)])
def test_the_number_of_samples_is_that_asked_for_or_few(config, given, in_file, wanted):
    found = settings(config, "sample.seed=1,2", f"sample.fid_num={in_file}", num_samples=given)
    assert {each.sample.fid_num for each in found} == {wanted}


def test_values_may_need_each_other(config):
    """The file itself, with a solver that SDEs do not have, is no setting of the sweep."""
    found = settings(config, "sample.mode=SDE", "sample.sampling_method=euler,heun", "sample.last_step=Mean,null")
    assert [each.sample.last_step for each in found] == ["Mean", None] * 2
    with pytest.raises(ConfigError, match="SDE has euler, heun"):
        settings(config, "sample.mode=ODE,SDE", "sample.sampling_method=heun3,euler")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("sample.cfg_scale=2,2.0",), "cfg_scale=2 and cfg_scale=2 are the same setting"),
        (("preset=paper", "sample.cfg_channels=null,3"), "cfg_channels=3 and cfg_channels=null are the same .*paper"),
        (("sample.cfg_scale=1,2", "train.max_steps=1,2"), "only keys of sample take several values"),
        (("sample.cfg_scale=0.5,2",), "sample.cfg_scale: must be at least 1"),
        (("sample.seed=0,1", "sample.likelihood=true", "sample.cfg_scale=1"), "no figure of it reads likelihoods"),
        (
            (f"sample.seed={','.join(map(str, range(101)))}", f"sample.cfg_scale={','.join(map(str, range(1, 101)))}"),
            "10,100",
        ),
    ],
)
def test_settings_that_are_not_allowed_or_the_same_are_refused(config, overrides, words):
    with pytest.raises(ConfigError, match=words):
        settings(config, *overrides)


def test_settings_without_guidance_are_told_to_be_equal_by_what_has_an_effect(config):
    def keys(*overrides):
        return [each.key for each in settings(config, *overrides)]

    assert len(set(keys("sample.cfg_scale=1,2", "sample.cfg_interval_start=0,0.2"))) == 3
    assert len(set(keys("sample.cfg_scale=1", "sample.cfg_channels=null,2"))) == 1
    assert len(set(keys("sample.cfg_scale=1", "sample.seed=1,2"))) == 2


def test_work_is_shared_evenly_and_each_setting_once(config):
    found = settings(config, "sample.num_sampling_steps=10,20,40,80", "sample.cfg_scale=1,3")
    for count in (1, 2, 3, 9):
        parts = shares(found, count)
        assert len(parts) == count and sorted(each.name for part in parts for each in part) == sorted(
            e.name for e in found
        )
        work = [sum(cost(each.sample) for each in part) for part in parts]
        if count <= 3:
            assert max(work) < 1.35 * sum(work) / count


def test_guidance_and_calls_cost():
    plain = SampleConfig(cfg_scale=1, num_sampling_steps=11)
    assert cost(plain) == 10
    assert cost(plain.model_copy(update={"cfg_scale": 2.0, "cfg_interval_start": 0.5})) == pytest.approx(15)
    assert cost(plain.model_copy(update={"sampling_method": "heun"})) == 20


@pytest.mark.parametrize("emptied", [[], ["sample={num_sampling_steps: 9}", "sample={}"]])
def test_the_best_setting_s_file_reads_as_the_command_line_did(config, tmp_path, emptied):
    given = ["train={max_steps: 7}", "train.exp_name='1e-4'", r'vae.model_name="é: \"x\""', "preset=paper", *emptied]
    axes = ["sample.diffusion_form=sigma,linear", "sample.timestep_shift=1e-05,0", "sample.cfg_channels=null,2"]
    best, *_ = settings(config, *given, *axes)
    sweep.write_best(tmp_path / "best.yaml", config, given, best, ["first: line", "second"])
    values = ["sample.diffusion_form=sigma", "sample.timestep_shift=1e-05", "sample.cfg_channels=null"]
    found, wanted = (
        load(tmp_path / "best.yaml", kind="lightningdit")[0],
        load(config, [*given, *values], kind="lightningdit")[0],
    )
    assert found == wanted and found.sample.num_sampling_steps == (250 if emptied else 4)
    text = (tmp_path / "best.yaml").read_text("utf-8")
    assert text.startswith("# first: line\n# second\n") and ("extends:" in text) == (not emptied)


def test_a_shipped_file_is_extended_by_its_name(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert report.run_file({}, [], extends=Path("digits.yaml")) == 'extends: "digits.yaml"\n'
    assert report.run_file({}, [], extends=Path("run.yaml")) == f'extends: "{config}"\n'


def test_a_picture_has_a_map_for_each_combination_of_further_axes(tmp_path, monkeypatch):
    axes = [Axis("a", (1, 2)), Axis("b", ("x", "y", "z")), Axis("c", (None, 3)), Axis("d", (True, False))]
    values = [float(i) for i in range(24)]
    points = [dict(zip("abcd", each, strict=True)) for each in itertools.product(*(axis.values for axis in axes))]
    rows = [
        report.Ranked(Setting(p, SampleConfig()), None, None if v == 5 else v)
        for p, v in zip(points, values, strict=True)
    ]
    drawn, real = [], picture._map
    monkeypatch.setattr(
        picture, "_map", lambda panel, part, *more: drawn.append((part, more[-1])) or real(panel, part, *more)
    )
    picture.draw(rows[::-1], axes, FIGURES["recall"], tmp_path / "maps.png")
    wanted = np.array(values).reshape(2, 3, 2, 2)
    assert len(drawn) == 4 and Image.open(tmp_path / "maps.png").format == "PNG"
    for (part, marked), (c, d) in zip(drawn, itertools.product(range(2), range(2)), strict=True):
        same = (part == wanted[:, :, c, d]) | ((wanted[:, :, c, d] == 5) & np.isnan(part))
        assert same.all() and marked == ((1, 2) if (c, d) == (1, 1) else None)
