"""What an installation holds and how it runs: the files of sdist and wheel, and every program away from a checkout."""

from pathlib import Path

import pytest

from launch.config import ConfigError, load
from launch.config_files import SHIPPED

KINDS = {path.name: "vavae" if "vavae" in path.name else "lightningdit" for path in SHIPPED.glob("*.yaml")}


@pytest.mark.parametrize("name", KINDS)
def test_a_shipped_config_is_found_by_its_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, notes = load(name, kind=KINDS[name])
    assert (run, []) == load(SHIPPED / name, kind=KINDS[name])
    assert notes == [f"not here, so the one in {SHIPPED}"]


def test_a_file_of_that_name_here_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("digits.yaml").write_text((SHIPPED / "digits.yaml").read_text().replace("max_steps: ", "max_steps: 1"))
    run, notes = load("digits.yaml", kind="lightningdit")
    assert run.train.max_steps > load(SHIPPED / "digits.yaml", kind="lightningdit")[0].train.max_steps and not notes


@pytest.mark.parametrize("path", ["no_such.yaml", "./digits.yaml", "configs/digits.yaml", "/digits.yaml", ""])
def test_a_path_is_looked_for_where_it_says(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="cannot read config"):
        load(path, kind="lightningdit")
