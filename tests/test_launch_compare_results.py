"""Results side by side: figures, what differs, and what is not comparable."""

import json

import pytest

from launch.__main__ import main
from launch.comparison.results import read_result

BASE = {
    "metrics": {"fid": 2.5, "recall": 0.6},
    "samples": 1000,
    "samples_sha256": "a" * 64,
    "reference": {"path": "/data/real.npz", "images": 10000, "sha256": "b" * 64},
    "features": "inception",
    "networks": [{"name": "inception", "sha256": "1" * 64, "resize": "299 × 299", "weights": "/w/inception.pth"}],
    "solver": "ODE euler, 250 points",
    "settings": {"cfg_scale": 10.0, "cfg_channels": 3, "seed": 0},
    "hashes": {"model": "c" * 64},
    "skipped": {},
    "notes": ["a note"],
    "classes": ["cat", "dog"],
}


def written(path, **changes):
    """A result as JSON; `a__b` changes b of a, None takes it out."""
    content = json.loads(json.dumps(BASE))
    for name, value in changes.items():
        *sections, last = name.split("__")
        inner = content
        for section in sections:
            inner = inner[section]
        inner.pop(last, None)
        if value is not None:
            inner[last] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def compared(capsys, *paths) -> dict:
    assert main(["compare-results", *map(str, paths), "--format", "json"]) == 0
    return json.loads(capsys.readouterr().out)


def text_of(capsys, *paths) -> str:
    assert main(["compare-results", *map(str, paths)]) == 0
    return capsys.readouterr().out


def test_figures_stand_side_by_side_with_what_differs(tmp_path, capsys):
    a = written(tmp_path / "a.json")
    changes = {"metrics__fid": 2.0, "metrics__kid": 0.01, "settings__cfg_scale": 6.7, "hashes__model": "d" * 64}
    b = written(tmp_path / "b.json", **changes, samples_sha256="e" * 64, notes=[], classes=[])
    text = text_of(capsys, a, b)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert ["fid", "2.5", "2 (-20.0%)"] in rows and ["recall", "0.6", "0.6 (+0.0%)"] in rows
    assert ["kid", "–", "0.01"] in rows and ["settings.cfg_scale", "10", "6.7"] in rows
    assert ["hashes.model", "c" * 12, "d" * 12] in rows
    assert f"* A: {a}" in text and "WARNING" not in text and "the same images" not in text
    found = compared(capsys, a, b)
    assert found["differences"] == {
        "settings.cfg_scale": {"A": 10.0, "B": 6.7},
        "hashes.model": {"A": "c" * 64, "B": "d" * 64},
    }
    assert found["figures"]["kid"] == {"A": None, "B": 0.01} and found["warnings"] == []


def test_equal_results_differ_in_nothing(tmp_path, capsys):
    a, b = written(tmp_path / "a.json"), written(tmp_path / "b.json")
    text = text_of(capsys, a, b, a)
    assert "No setting differs." in text and "A, B, C: the same images" in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"samples": 50_000}, "another N: samples is A 1000, B 50000"),
        ({"features": "foundation"}, "another features: features is A inception, B foundation"),
        ({"reference__sha256": "f" * 64}, "another reference: reference.sha256 is A bbbbbbbbbbbb, B ffffffffffff"),
        ({"networks": [{"name": "inception", "sha256": "2" * 64}]}, "another features: networks.0.sha256 is A 111"),
        ({"networks": [BASE["networks"][0] | {"resize": "224"}]}, "another resize rule: networks.0.resize is A 299"),
        ({"crop": "center", "image_size": 256}, "another resize rule: crop is A –, B center"),
        ({"resize": {"rule": "bicubic"}}, "another resize rule: resize.rule is A –, B bicubic"),
        ({"reference__sha256": None, "reference__path": "/x"}, "perhaps not comparable: another path of the reference"),
    ],
)
def test_figures_that_are_not_comparable_are_warned_of(tmp_path, capsys, changes, words):
    a, b = written(tmp_path / "a.json"), written(tmp_path / "b.json", **changes)
    found = compared(capsys, a, b)["warnings"]
    assert any(words in text for text in found) and f"WARNING: {found[0]}" in text_of(capsys, a, b)


@pytest.mark.parametrize(
    "changes",
    [
        {"features_sha256": {"inception": "1"}},
        {"reference__sha256": None},
        {"reference__path": "/moved"},
        {"step": 3},
        {"networks": [BASE["networks"][0] | {"weights": "/moved"}]},
    ],
)
def test_what_only_one_states_or_no_figure_depends_on_is_no_warning(tmp_path, capsys, changes):
    a, b = written(tmp_path / "a.json"), written(tmp_path / "b.json", **changes)
    found = compared(capsys, a, b)
    assert found["warnings"] == [] and len(found["differences"]) == 1


def test_directories_of_samples_and_sweeps_are_results(tmp_path, capsys):
    written(tmp_path / "swept" / "results.json")
    (tmp_path / "swept" / "sweep.json").write_text("{}")
    made = {"num_samples": 1000, "labels": "index modulo", "settings": {"cfg_scale": 10.0}, "npz": {"bytes": 3}}
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "samples.json").write_text(json.dumps(made))
    found = compared(capsys, tmp_path / "swept", tmp_path / "samples")
    assert found["results"] == {"A": f"{tmp_path}/swept/results.json", "B": f"{tmp_path}/samples/samples.json"}
    assert found["figures"]["fid"] == {"A": 2.5, "B": None} and "samples" not in found["differences"]
    assert "settings.cfg_scale" not in found["differences"] and found["warnings"] == []
    written(tmp_path / "samples" / "evaluation.json")
    assert read_result(tmp_path / "samples").path.name == "evaluation.json"
    both = text_of(capsys, tmp_path / "samples" / "samples.json", tmp_path / "samples" / "samples.json")
    assert "None of them has figures." in both


def refused(capsys, *paths) -> str:
    assert main(["compare-results", *map(str, paths)]) == 2
    return capsys.readouterr().err


def test_what_is_no_result_is_named(tmp_path, capsys):
    a = written(tmp_path / "a.json")
    assert "1 results: give 2 to 26" in refused(capsys, a)
    assert "x.json does not exist" in refused(capsys, a, tmp_path / "x.json")
    (tmp_path / "list.json").write_text("[1]")
    assert "list.json holds list, not a result" in refused(capsys, a, tmp_path / "list.json")
    (tmp_path / "other.json").write_text('{"metrics": 3}')
    assert "other.json is no result of evaluate, sample or sweep" in refused(capsys, a, tmp_path / "other.json")
    (tmp_path / "text.json").write_text('{"metrics": {"fid": "low"}}')
    assert "text.json is damaged: figure 'fid' is 'low'" in refused(capsys, a, tmp_path / "text.json")
    (tmp_path / "empty").mkdir()
    assert "empty holds no result" in refused(capsys, a, tmp_path / "empty")
    for name in ("one", "two"):
        written(tmp_path / "several" / f"{name}.json")
    assert "several results; name one: one.json, two.json" in refused(capsys, a, tmp_path / "several")
