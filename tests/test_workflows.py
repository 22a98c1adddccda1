"""Files that GitHub reads: workflows and what they call, issue forms, the citation."""

import re
import shlex
import subprocess
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from bench import regress

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
EXPRESSION = re.compile(r"\$\{\{.*?\}\}")


def loaded(name: str) -> dict:
    return yaml.load((ROOT / ".github" / "workflows" / name).read_text(), yaml.BaseLoader)  # "on" is a key, not true


def steps(workflow: dict) -> list[dict]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def commands(workflow: dict) -> list[list[str]]:
    """The words of every line that is run."""
    lines = [line for step in steps(workflow) for line in step.get("run", "").splitlines()]
    return [shlex.split(line, comments=True) for line in lines]


def test_there_is_one_for_a_cpu_and_one_for_a_gpu():
    assert [path.name for path in WORKFLOWS] == ["cpu.yml", "gpu.yml"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_it_is_a_workflow(path):
    workflow = loaded(path.name)
    assert workflow["name"] == path.stem and {"push"} <= set(workflow["on"])
    for job in workflow["jobs"].values():
        assert job["runs-on"] and int(job["timeout-minutes"]) > 0
    for step in steps(workflow):
        assert ("uses" in step) != ("run" in step)
        assert re.fullmatch(r"actions/[\w-]+@v\d+", step.get("uses", "actions/x@v1"))
        assert set(step) <= {"name", "uses", "with", "run", "if", "shell", "env", "id"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_what_it_calls_is_here(path):
    called = 0
    for words in commands(loaded(path.name)):
        if words[:1] in (["bash"], ["source"]):
            assert (ROOT / words[1]).is_file()
            called += 1
        if "-m" in words:
            assert find_spec(words[words.index("-m") + 1])
            called += 1
    assert called


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_its_scripts_are_bash_and_take_no_text_from_outside(path):
    for step in steps(loaded(path.name)):
        if script := step.get("run"):
            subprocess.run(["bash", "-n", "-c", script], check=True)
            assert not EXPRESSION.search(script), "an expression in a script lets a branch's name run commands"


def test_the_cpu_one_runs_what_lands_a_change():
    assert ["bash", ".ci/run"] in commands(loaded("cpu.yml"))


def test_the_gpu_one_measures_gates_and_keeps_the_rows():
    workflow = loaded("gpu.yml")
    (job,) = workflow["jobs"].values()
    assert job["runs-on"] == ["self-hosted", "gpu"] and workflow["concurrency"]["group"] == "gpu"
    words = commands(workflow)
    (bench,) = (line for line in words if line[:2] == ["bash", "bench/gpu.sh"])
    (gate,) = (line for line in words if "bench.regress" in line)
    arguments = gate[gate.index("bench.regress") + 1 : gate.index("|")]
    assert regress.parse(arguments).arguments == ["--quick"]
    (kept,) = (step for step in steps(workflow) if "upload-artifact" in step.get("uses", ""))
    assert kept["with"]["path"] == bench[2] and kept["if"] == "${{ !cancelled() }}", "rows of a failing run too"
    assert set(re.findall(r"inputs\.(\w+)", (ROOT / ".github/workflows/gpu.yml").read_text())) == set(
        workflow["on"]["workflow_dispatch"]["inputs"]
    )


FORMS = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_it_is_an_issue_form(path):
    form = yaml.safe_load(path.read_text())
    assert form["name"] and form["description"]
    assert len({field["id"] for field in form["body"]}) == len(form["body"])
    for field in form["body"]:
        assert field["type"] in ("textarea", "input", "dropdown") and field["attributes"]["label"]


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["cff-version"] == "1.2.0" and citation["message"] and citation["authors"]
    assert [citation[key] for key in ("title", "version", "license")] == [
        project[k] for k in ("name", "version", "license")
    ]
