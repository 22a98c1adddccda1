"""Command lines: `key=value` anywhere, `~` in paths, notes of published files; no program does it otherwise."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from common.sections import short
from launch import evaluate, extract, sample, train
from launch.__main__ import main
from launch.arguments import local_path
from tests import toy
from tests.published import FILES
from vavae.config import StageConfig

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    path
    for package in ("common", "launch", "lightningdit", "vavae", "bench")
    for path in (ROOT / package).rglob("*.py")
)


@pytest.fixture
def run_files(tmp_path) -> dict[str, str]:
    data = {"data_path": str(tmp_path / "data")}
    contents = {"lightningdit": toy.LIGHTNINGDIT, "vavae": toy.VAVAE}
    return {
        kind: str(toy.write_run(tmp_path / f"{kind}.yaml", content, data=data)) for kind, content in contents.items()
    }


@pytest.fixture
def asked(monkeypatch) -> list:
    """What the programs were asked to do, in place of doing it."""
    calls: list = []
    monkeypatch.setattr(train, "run_training", lambda run, kind: calls.append(run) or (None, None))
    monkeypatch.setattr(train, "plan_run", lambda run, *_, **__: calls.append(run) or SimpleNamespace(lines=list))
    monkeypatch.setattr(sample, "generate", lambda run, *args, **kwargs: calls.append(run))
    monkeypatch.setattr(extract, "extract", lambda run, *args, **kwargs: calls.append(run))
    monkeypatch.setattr(
        evaluate,
        "_latents",
        lambda args: (
            calls.append(evaluate.load_run(args.config, args.overrides, "lightningdit"))
            or {"metrics": {}, "skipped": {}, "notes": []}
        ),
    )
    return calls


PROGRAMS = {
    "train": ("lightningdit", ["--dry-run", "--gpus", "2"]),
    "sample": ("lightningdit", ["--labels", "0,1"]),
    "extract": ("vavae", ["--output", "latents"]),
    "evaluate": ("lightningdit", ["--latents", "latents"]),
}


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("program", PROGRAMS)
def test_overrides_may_stand_anywhere_behind_the_run_file(run_files, asked, program, place):
    kind, options = PROGRAMS[program]
    first, last = "train.log_every=7", "train.ckpt_every=9"
    words = {
        0: [run_files[kind], first, last, *options],
        1: [run_files[kind], first, *options, last],
        2: [*options, run_files[kind], first, last],
    }[place]
    assert main([program, *(["lightningdit"] if program == "train" else []), *words]) == 0
    (run,) = asked
    assert (run.train.log_every, run.train.ckpt_every) == (7, 9)


def test_paths_on_the_command_line_know_the_home_directory(monkeypatch, tmp_path, run_files, asked):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_path("~/x") == tmp_path / "x"
    assert main(["sample", "~/lightningdit.yaml", "--output=~/x", "train.output_dir=~/runs", "ckpt_path=~/w.pt"]) == 0
    assert (asked[0].train.output_dir, asked[0].ckpt_path) == (str(tmp_path / "runs"), str(tmp_path / "w.pt"))


def test_a_home_directory_of_nobody_is_an_error(capsys):
    with pytest.raises(SystemExit):
        main(["sample", "~nobody-of-that-name/run.yaml"])
    assert "no home directory ~nobody-of-that-name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("", "a path is wanted"),
        ("a\0b", "not allowed in names and paths"),
        (256 * "a", "too long for a file system"),
    ],
)
def test_a_path_that_is_none_is_an_error(run_files, asked, capsys, path, words):
    for given in ([path], [run_files["lightningdit"], f"--output={path}"]):
        with pytest.raises(SystemExit):
            main(["sample", *given])
        assert words in capsys.readouterr().err and not asked


@pytest.mark.parametrize("labels", ["", ",", "1,", "1;2", "one", "1.0"])
def test_labels_are_numbers_or_an_error(run_files, asked, capsys, labels):
    assert main(["sample", run_files["lightningdit"], f"--labels={labels}"]) == 2
    assert f"--labels {labels!r}: give whole numbers separated by commas" in capsys.readouterr().err and not asked


def test_the_demo_has_labels_of_its_own(run_files, asked, capsys):
    with pytest.raises(SystemExit):
        main(["sample", run_files["lightningdit"], "--demo", "--labels=1"])
    assert "not allowed with argument" in capsys.readouterr().err and not asked


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("a={b: 1, b: 2}", "b was already given"),
        ("a=010", "base 8"),
        ("a=[1", "not YAML"),
        ("a", "form key=value"),
        ("a=b #c", "#c is a comment"),
        ("a=&b", "&b is an anchor"),
        ("a=" + 101 * "1", "101 characters"),
    ],
)
def test_facts_are_read_as_run_files_are(setting, words):
    given = evaluate._parse(["--samples", "x", "--set", setting])
    with pytest.raises(ValueError, match=words) as e:
        evaluate._metadata(given, None)
    assert f"--set {short(setting)}" in str(e.value)


def test_no_section_speaks_to_the_user_in_the_words_of_its_library(run_files, monkeypatch, capsys):
    monkeypatch.setattr(train, "run_training", lambda run, kind: StageConfig(epochs="two"))
    assert main(["train", "vavae", run_files["vavae"]]) == 2
    assert capsys.readouterr().err.startswith("error: epochs: a whole number is wanted (got 'two')\n")


@pytest.mark.parametrize("gpus", ["0", "-1"])
def test_a_plan_is_for_one_process_or_more(run_files, capsys, gpus):
    assert main(["train", "lightningdit", run_files["lightningdit"], "--dry-run", f"--gpus={gpus}"]) == 2
    assert f"--gpus must be at least 1, got {gpus}" in capsys.readouterr().err


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize(
    ("variables", "dots"),
    [
        ({"PYTHONIOENCODING": "ascii"}, b"?"),
        (ASCII, b"?"),
        ({"PYTHONIOENCODING": "latin-1"}, b"?"),
        ({"PYTHONIOENCODING": "utf-8"}, "…".encode()),
    ],
)
def test_a_terminal_that_lacks_characters_gets_others(variables, dots):
    command, env = [sys.executable, "-m", "launch"], os.environ | {"PYTHONPATH": str(ROOT)} | variables
    done = subprocess.run([*command, "--help"], env=env, capture_output=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith(b"usage: python -m launch PROGRAM " + dots), done.stderr
    done = subprocess.run([*command, "träin"], env=env, capture_output=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith(b"error: unknown program"), done.stderr


@pytest.mark.parametrize(("rank", "says"), [("0", True), (None, True), ("1", False)])
def test_the_main_process_says_what_was_ignored_of_a_published_file(tmp_path, monkeypatch, asked, capsys, rank, says):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    path = tmp_path / "vavae_f16d32.yaml"
    path.write_text(yaml.safe_dump(FILES["tokenizer/configs/vavae_f16d32.yaml"]))
    assert extract.main([str(path), "--output", "x"]) == 0
    assert ("ignored model.params.lossconfig.params.vf_loss_type" in capsys.readouterr().out) is says


@pytest.mark.parametrize(
    ("pattern", "only"),
    [
        (r"read_text\(\)", set()),  # in whatever encoding the machine has
        (r"type=Path\b", {"bench"}),  # the benches take no run files, and a shell expands their paths
        (r"\byaml\.(safe_)?load", {"launch/config_files.py"}),
        (r"(Config|Section)\(\*\*", {"lightningdit/config.py"}),
    ],
)
def test_nothing_reads_its_input_in_a_way_of_its_own(pattern, only):
    found = {str(path.relative_to(ROOT)) for path in SOURCES if re.search(pattern, path.read_text())}
    assert {name for name in found if name not in only and name.split("/")[0] not in only} == set()
