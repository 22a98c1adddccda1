"""Run files that extend others: what they come to, which file a mistake is in, and what is no base."""

import json
import os
from pathlib import Path

import pytest
import yaml

from launch.__main__ import main
from launch.config import ConfigError, load, stored_run
from launch.config_files import SHIPPED
from launch.extends import FILES_LIMIT, Layer, merged, read_layers
from launch.training import checkpoint
from tests import toy
from tests.published import LIGHTNINGDIT_YAML, TOKENIZER_YAML
from vavae.config import AutoencoderConfig

FOUNDATION = {"model_name": "vit_tiny_patch16_224", "model_args": {"depth": 2}}
LIGHTNINGDIT = {**toy.LIGHTNINGDIT, "data": {**toy.LIGHTNINGDIT["data"], "data_path": "latents"}}
VAVAE = {
    **toy.VAVAE,
    "foundation": FOUNDATION,
    "loss": {**toy.VAVAE["loss"], "use_vf": True},
    "stages": [{"epochs": 1, "loss": {"vf_weight": 0.5}}, {"epochs": 2}],
}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes files of a folder that is the working directory: name → mapping or text."""
    monkeypatch.chdir(tmp_path)

    def write(files: dict[str, dict | str]) -> None:
        for name, content in files.items():
            (path := Path(name)).parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))

    return write


def same_as(document: dict, path: str, kind: str) -> bool:
    Path("written_out.yaml").write_text(yaml.safe_dump(document))
    return load(path, kind=kind)[0] == load("written_out.yaml", kind=kind)[0]


def refusal(path: str, *overrides: str, kind: str = "lightningdit") -> str:
    with pytest.raises(ConfigError) as e:
        load(path, overrides, kind=kind)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_a_file_says_what_differs_from_its_base(write):
    write({"base.yaml": VAVAE})
    changed = {
        "train": {"max_steps": 9, "exp_name": "other"},
        "foundation": {"model_args": {"num_heads": 4}},
        "stages": [{"epochs": 7}],
        "kernels": {"default": "reference"},
    }
    write({"run.yaml": {"extends": "base.yaml", **changed}})
    expected = {
        **VAVAE,
        "train": {**VAVAE["train"], "max_steps": 9, "exp_name": "other"},
        "foundation": {**FOUNDATION, "model_args": {"depth": 2, "num_heads": 4}},
        "stages": [{"epochs": 7}],
        "kernels": {"default": "reference"},
    }
    assert same_as(expected, "run.yaml", "vavae") and not same_as(VAVAE, "run.yaml", "vavae")


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"foundation": None, "loss": {"use_vf": False}}, {"foundation": None, "loss": toy.VAVAE["loss"]}),
        ({"stages": []}, {"stages": []}),
        ({"foundation": {"model_args": {}}}, {"foundation": {"model_name": FOUNDATION["model_name"]}}),
        ({"foundation": {}}, {"foundation": {}}),
        ({"train": {"exp_name": None}}, {"train": {**VAVAE["train"], "exp_name": None}}),
    ],
)
def test_null_and_empty_values_take_the_place_of_the_bases(write, changed, expected):
    write({"base.yaml": VAVAE, "run.yaml": {"extends": "base.yaml", **changed}})
    assert same_as({**VAVAE, **expected}, "run.yaml", "vavae")


def test_a_base_extends_a_file_in_its_turn_each_from_its_own_folder(write, tmp_path):
    write(
        {
            "runs/run.yaml": {"extends": "../mine/base.yaml", "train": {"max_steps": 1}},
            "mine/base.yaml": {"extends": "deep/first.json", "train": {"max_steps": 2, "log_every": 2}},
            "mine/deep/first.json": json.dumps(LIGHTNINGDIT, indent="\t"),
        }
    )
    run, notes = load("runs/run.yaml", kind="lightningdit")
    assert (run.train.max_steps, run.train.log_every, run.train.ckpt_every) == (1, 2, 3)
    middle, first = Path("runs/../mine/base.yaml"), Path("runs/../mine/deep/first.json")
    assert notes == [f"extends {middle}", f"{middle} extends {first}"]
    assert load(tmp_path / "runs/run.yaml", kind="lightningdit")[0] == run


def test_a_base_may_be_named_from_the_root_or_home(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    write({"home/base.yaml": LIGHTNINGDIT})
    for named in (f"{tmp_path}/home/base.yaml", "~/base.yaml"):
        write({"runs/run.yaml": {"extends": named}})
        assert same_as(LIGHTNINGDIT, "runs/run.yaml", "lightningdit"), named


def test_a_mere_name_that_is_not_beside_the_file_is_that_of_a_shipped_one(write):
    write({"runs/run.yaml": {"extends": "digits.yaml", "train": {"max_steps": 3}}})
    run, notes = load("runs/run.yaml", kind="lightningdit")
    shipped, _ = load(SHIPPED / "digits.yaml", ["train.max_steps=3"], kind="lightningdit")
    assert run == shipped and notes == [f"extends digits.yaml: not here, so the one in {SHIPPED}"]
    write({"digits.yaml": "no config"})  # not beside it
    assert load("runs/run.yaml", kind="lightningdit")[0] == run
    write({"runs/digits.yaml": LIGHTNINGDIT})
    run, notes = load("runs/run.yaml", kind="lightningdit")
    assert run.vae.model_name == "toy" and notes == [f"extends digits.yaml: the one here, not that in {SHIPPED}"]
    write({"runs/run.yaml": {"extends": "./digits.yml"}})
    assert "digits.yml does not exist" in refusal("runs/run.yaml")


def test_files_in_a_circle_are_listed(write):
    write({"a.yaml": {"extends": "b.yaml"}, "b.yaml": {"extends": "c.yaml"}, "c.yaml": {"extends": "./b.yaml"}})
    assert refusal("a.yaml").startswith("a.yaml extends b.yaml extends c.yaml extends b.yaml: files that extend one an")
    write({"own.yaml": {"extends": "own.yaml"}})
    assert refusal("own.yaml").startswith("own.yaml extends own.yaml: ")
    os.symlink("own.yaml", "link.yaml")
    assert refusal("link.yaml").startswith("link.yaml extends own.yaml: files that extend one another in a circle")


def test_a_chain_is_followed_for_so_long(write):
    write({f"{i}.yaml": {"extends": f"{i + 1}.yaml"} for i in range(FILES_LIMIT)})
    write({f"{FILES_LIMIT}.yaml": LIGHTNINGDIT})
    assert same_as(LIGHTNINGDIT, "1.yaml", "lightningdit")
    assert f"more than {FILES_LIMIT} files that extend one another" in refusal("0.yaml")


WRONG_BASES = {
    "absent.yaml": "a.yaml extends absent.yaml: cannot read config: absent.yaml does not exist",
    "twice.yaml": "a.yaml extends twice.yaml: twice.yaml, line 2: b was already given in line 1",
    "pointer.yaml": "a.yaml extends pointer.yaml: cannot read config: pointer.yaml",
    "latin.yaml": "a.yaml extends latin.yaml: latin.yaml, line 1: byte 0xf6 is not UTF-8",
    "folder": "a.yaml extends folder: cannot read config: folder",
    "list.yaml": "list.yaml holds list, not a mapping",
    "misspelt.yaml": "a.yaml extends misspelt.yaml: unknown key 'extend' (did you mean 'extends'?)",
    "chained.yaml": "a.yaml extends chained.yaml extends twice.yaml: twice.yaml, line 2: b",
    "~nowhere/x.yaml": "a.yaml: extends: ~nowhere/x.yaml: there is no home directory ~nowhere",
    "": "a.yaml: extends: the path of one file is wanted (got '')",
    "a\tb": "a.yaml: extends: 'a\\tb' holds what is not allowed",
}


@pytest.mark.parametrize("base", WRONG_BASES)
def test_what_is_no_base_is_named_with_the_file_that_extends_it(write, base):
    write(
        {
            "a.yaml": {"extends": base},
            "twice.yaml": "b: 1\nb: 2",
            "pointer.yaml": "version https://git-lfs.github.com/spec/v1\noid sha256:0d71\nsize 27\n",
            "folder/file": "",
            "list.yaml": "- 1",
            "misspelt.yaml": {"extend": "b.yaml"},
            "chained.yaml": {"extends": "twice.yaml"},
        }
    )
    Path("latin.yaml").write_bytes(b"a: \xf6")
    assert WRONG_BASES[base] in refusal("a.yaml")


@pytest.mark.parametrize("base", [["b.yaml", "c.yaml"], 3, True, {"a": "b.yaml"}, None])
def test_one_base_is_wanted(write, base):
    write({"a.yaml": {"extends": base}})
    assert refusal("a.yaml").startswith("a.yaml: extends: the path of one file is wanted (got ")


def test_a_base_of_the_other_model_is_named(write):
    write({"v.yaml": VAVAE, "l.yaml": LIGHTNINGDIT, "p.yaml": TOKENIZER_YAML})
    for base, kind, is_one in (("v", "lightningdit", "tokenizer"), ("l", "vavae", "LightningDiT")):
        write({"a.yaml": {"extends": f"{base}.yaml", "train": {"max_steps": 3}}})
        expected = f"a.yaml (extends {base}.yaml): {base}.yaml: this is a {is_one} run file (it has "
        assert refusal("a.yaml", kind=kind).startswith(expected)
    write({"a.yaml": {"extends": "p.yaml"}})
    assert refusal("a.yaml").startswith(
        "a.yaml (extends p.yaml): p.yaml: this is a tokenizer run file (it has lightning"
    )
    write({"a.yaml": {"extends": "v.yaml", "sample": {"cfg_scale": 2.0}}})
    assert refusal("a.yaml", kind="vavae").startswith("a.yaml (extends v.yaml): this is a LightningDiT run file")


def test_what_both_models_share_may_be_a_base_of_both(write):
    shared = {"train": {"precision": "float32", "max_steps": 11}, "preset": "default"}
    write({"shared.yaml": shared})
    for kind, content in (("vavae", VAVAE), ("lightningdit", LIGHTNINGDIT)):
        write({"a.yaml": {**content, "extends": "shared.yaml", "train": {"global_batch_size": 8}}})
        run, _ = load("a.yaml", kind=kind)
        assert (run.train.max_steps, run.train.precision) == (11, "float32"), kind


def test_a_published_tokenizer_is_extended_in_our_keys(write):
    write({"published.yaml": TOKENIZER_YAML})
    write({"a.yaml": {"extends": "published.yaml", "loss": {"vf_weight": 0.5}, "train": {"max_epochs": 3}}})
    run, notes = load("a.yaml", kind="vavae")
    published, converted = load("published.yaml", ["loss.vf_weight=0.5", "train.max_epochs=3"], kind="vavae")
    assert run == published and run.preset == "paper" and run.loss.disc_start == 2501
    assert notes == ["extends published.yaml", *(f"published.yaml: {note}" for note in converted)]
    write({"b.yaml": {"extends": "a.yaml", "preset": "default"}})
    assert load("b.yaml", kind="vavae")[0].preset == "default"
    write({"published.yaml": TOKENIZER_YAML.replace("use_vf: dinov2", "use_vf: dino")})
    assert refusal("b.yaml", kind="vavae").startswith(
        "b.yaml (extends a.yaml, published.yaml): published.yaml: model.params.use_vf: 'dino' is not one of "
    )


def test_a_size_takes_the_place_of_the_fields_of_one(write):
    sized = AutoencoderConfig(size="f16d64")
    write({"published.yaml": TOKENIZER_YAML, "a.yaml": {"extends": "published.yaml", "model": {"size": "f16d64"}}})
    assert load("a.yaml", kind="vavae")[0].model == sized
    assert load("published.yaml", ["model.size=f16d64"], kind="vavae")[0].model == sized
    assert load("published.yaml", ["model={size: f16d64, ch: 64}"], kind="vavae")[0].model.ch == 64
    write({"b.yaml": {"extends": "a.yaml", "model": {"embed_dim": 4, "z_channels": 4}}})
    assert load("b.yaml", kind="vavae")[0].model == sized.model_copy(update={"embed_dim": 4, "z_channels": 4})
    assert load("b.yaml", ["model.size=f16d64"], kind="vavae")[0].model == sized
    write(
        {
            "c.yaml": {"extends": "a.yaml", "model": {"size": "sd-f8d4"}},
            "d.yaml": {"extends": "c.yaml", "model": {"ch": 64}},
        }
    )
    assert load("d.yaml", kind="vavae")[0].model == AutoencoderConfig(size="sd-f8d4", ch=64)
    named = {"extends": "toy.yaml", "model": {"model_type": "LightningDiT-B/2"}}
    write({"toy.yaml": LIGHTNINGDIT, "e.yaml": named, "f.yaml": {"extends": "e.yaml", "model": {"use_rope": False}}})
    network = load("f.yaml", kind="lightningdit")[0].network()
    assert (network.hidden_size, network.depth, network.use_swiglu, network.use_rope) == (768, 12, True, False)
    write({"g.yaml": {"extends": "toy.yaml", "model": {"model_type": None}}})
    assert same_as(LIGHTNINGDIT, "g.yaml", "lightningdit")


def test_a_published_tokenizer_extends_none(write):
    write({"v.yaml": VAVAE, "published.yaml": {"extends": "v.yaml", **yaml.safe_load(TOKENIZER_YAML)}})
    refused = (
        "a file with the keys of a published tokenizer (model.params, lightning) can be extended, but extends none"
    )
    assert refusal("published.yaml", kind="vavae").startswith(f"published.yaml (extends v.yaml): {refused}")
    write({"a.yaml": {"extends": "published.yaml"}})
    expected = f"a.yaml (extends published.yaml, v.yaml): published.yaml: {refused}"
    assert refusal("a.yaml", kind="vavae").startswith(expected)


def test_the_merged_document_decides_on_the_preset(write):
    write({"published.yaml": LIGHTNINGDIT_YAML, "a.yaml": {"extends": "published.yaml", "optimizer": {"lr": 1e-5}}})
    run, _ = load("a.yaml", kind="lightningdit")
    assert run.preset == "paper" and run.sampling().cfg_channels == 3 and run.optimizer.lr == 1e-5
    write({"b.yaml": {"extends": "a.yaml", "preset": "default"}})
    assert load("b.yaml", kind="lightningdit")[0].sampling().cfg_channels is None
    del (bare := dict(VAVAE))["preset"]
    write({"v.yaml": bare, "a.yaml": {"extends": "v.yaml"}})
    assert "preset: is missing" in refusal("a.yaml", kind="vavae")
    write({"a.yaml": {"extends": "v.yaml", "preset": "paper"}})
    assert load("a.yaml", kind="vavae")[0].preset == "paper"


# Sections of the top, middle and last file; overrides; what is said.
MISTAKES = [
    ({}, {"train": {"log_every": "x"}}, {}, [], "in mid.yaml, train.log_every: a whole number is wanted (got 'x')"),
    ({"train": {"log_every": 2}}, {"train": {"log_every": "x"}}, {}, [], None),
    ({"train": {"log_every": "y"}}, {"train": {"log_every": 2}}, {}, [], "in top.yaml, train.log_every: a whole"),
    ({}, {}, {"train": {"log_evry": 1}}, [], "in last.yaml, train: unknown key 'log_evry' (did you mean 'log_every'?)"),
    ({"train": {"a": 1}}, {}, {"train": {"b": 2}}, [], "in last.yaml and top.yaml, train: unknown key 'b', 'a'; known"),
    ({}, {"sampel": {}}, {}, [], "in mid.yaml, unknown key 'sampel'"),
    ({"optimizer": {"lr": -1}}, {"optimizer": {"beta2": 2}}, {}, [], "in top.yaml, optimizer.lr: must be above 0"),
    ({"optimizer": {"lr": -1}}, {"optimizer": {"beta2": 2}}, {}, [], "; in mid.yaml, optimizer.beta2: must be below 1"),
    ({"kernels": 3}, {}, {}, [], "in top.yaml, kernels: a backend's name"),
    ({}, {"sample": None}, {}, [], "in mid.yaml, sample: a section of keys is wanted"),
    ({}, {"train": {"max_epochs": 2}}, {}, [], "): train: max_steps 6 and max_epochs 2 both given"),
    ({"train": {"max_epochs": 2}}, {"train": None}, {}, [], None),
    ({}, {"train": {"log_every": 2}}, {}, ["train.log_every=x"], "): train.log_every: a whole number is wanted"),
    ({}, {"train": {"log_every": 2}}, {}, ["train={log_evry: 1}"], "): train: unknown key 'log_evry'"),
    ({}, {"train": {"log_every": 2}}, {}, ["train.log_every"], "): override 'train.log_every' is not of the form"),
    ({}, {}, {}, ["extends=last.yaml"], "override 'extends=last.yaml': extends stands in a file"),
    ({}, {}, {"data": None}, [], "in last.yaml, data: a section of keys is wanted"),
    ({}, {}, {"data": {"data_pth": "x"}}, [], "in last.yaml, data: unknown key 'data_pth' (did you mean 'data_path'?)"),
    (
        {"vae": {"downsample_ratio": 4}},
        {},
        {"model": {"patch_size": 3}},
        [],
        "): data.image_size 16 makes latents of 4 × 4",
    ),
]


@pytest.mark.parametrize(("top", "middle", "last", "overrides", "said"), MISTAKES)
def test_a_wrong_value_is_said_with_the_file_it_stands_in(write, top, middle, last, overrides, said):
    base = {**LIGHTNINGDIT, **{k: {**LIGHTNINGDIT[k], **v} if v else v for k, v in last.items()}}
    write(
        {
            "top.yaml": {"extends": "mid.yaml", **top},
            "mid.yaml": {"extends": "last.yaml", **middle},
            "last.yaml": base,
        }
    )
    if said is None:
        load("top.yaml", overrides, kind="lightningdit")
        return
    message = refusal("top.yaml", *overrides)
    assert message.startswith("top.yaml (extends mid.yaml, last.yaml): ") and said in message, message


def test_a_wrong_value_in_a_list_is_said_with_the_file_of_the_list(write):
    wrong = [{"epochs": 1}, {"epochs": 2, "loss": {"vf_weight": -1}}]
    write({"base.yaml": VAVAE, "a.yaml": {"extends": "base.yaml", "stages": wrong}})
    assert "): in a.yaml, stages.1.loss.vf_weight: must be at least 0" in refusal("a.yaml", kind="vavae")
    write({"base.yaml": {**VAVAE, "stages": wrong}, "a.yaml": {"extends": "base.yaml", "stages": wrong[:1]}})
    assert len(load("a.yaml", kind="vavae")[0].stages) == 1


def test_a_file_that_extends_none_is_named_once(write):
    write({"a.yaml": {**LIGHTNINGDIT, "train": {"log_every": "x"}}})
    assert refusal("a.yaml") == "a.yaml: train.log_every: a whole number is wanted (got 'x')"


def test_overrides_come_last(write):
    write({"base.yaml": VAVAE, "a.yaml": {"extends": "base.yaml", "train": {"max_steps": 9}}})
    run, _ = load("a.yaml", ["train.max_steps=1", "train={log_every: 7}", "foundation={}"], kind="vavae")
    assert (run.train.max_steps, run.train.log_every, run.train.ckpt_every) == (1, 7, 2)
    assert run.foundation.model_fields_set == set()


def test_no_layer_is_changed_by_those_above_it(write):
    write(
        {"base.yaml": "train: &t {a: {b: 1}}\nother: *t", "a.yaml": {"extends": "base.yaml", "train": {"a": {"c": 2}}}}
    )
    layers, _ = read_layers("a.yaml")
    assert merged(layers) == {"train": {"a": {"b": 1, "c": 2}}, "other": {"a": {"b": 1}}}
    assert layers[0] == Layer("base.yaml", {"train": {"a": {"b": 1}}, "other": {"a": {"b": 1}}})


def test_a_run_says_what_it_read_and_stores_the_merged_file(write, tmp_path, capsys):
    toy.write_latents(tmp_path / "latents")
    write(
        {
            "base.yaml": LIGHTNINGDIT,
            "a.yaml": {
                "extends": "base.yaml",
                "train": {"max_steps": 2, "output_dir": "out"},
                "optimizer": {"lr": 0.5},
            },
        }
    )
    assert main(["train", "lightningdit", "a.yaml", "train.global_seed=3"]) == 0
    assert "a.yaml: extends base.yaml\n" in capsys.readouterr().out
    state = checkpoint.newest(tmp_path / "out/run/checkpoints").state
    assert "extends" not in json.dumps(state)
    run, _ = load("a.yaml", ["train.global_seed=3"], kind="lightningdit")
    assert stored_run(state["config"], "state.json", kind="lightningdit") == run and run.optimizer.lr == 0.5
