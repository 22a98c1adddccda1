"""Format, lint, types and links of the whole tree. The tools' settings: pyproject.toml, .clang-format."""

import json
import re
import shlex
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from tests import type_errors

ROOT = Path(__file__).parents[1]
#: Packages whose public modules have no type errors.
TYPED = ("common", "kernels", "lightningdit", "vavae")


SCRIPTS = Path(sysconfig.get_path("scripts"))


def passes(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command[-3:])}:\n{done.stdout[-5000:]}{done.stderr[-5000:]}"


@pytest.mark.parametrize("command", ["check", "format --check"])
def test_ruff_has_nothing_to_say(command):
    passes(sys.executable, "-m", "ruff", *command.split(), "--quiet", ".")


def test_cuda_sources_are_formatted():
    sources = sorted(str(path) for kind in ("cu", "h", "cpp") for path in (ROOT / "csrc").rglob(f"*.{kind}"))
    assert len(sources) > 20
    passes(str(SCRIPTS / "clang-format"), "--dry-run", "-Werror", *sources)


def headings(document: str) -> set[str]:
    """The fragments by which GitHub links to a document's headings: small letters, no punctuation, hyphens."""
    outside = re.sub(r"^```.*?^```", "", document, flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ +(.+?) *$", outside, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_between_documents_lead_somewhere():
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    documents = {path: path.read_text("utf-8") for path in (ROOT / line for line in listed.splitlines())}
    found = [(path, link) for path, text in documents.items() for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    lost, local = [], [(path, link) for path, link in found if "://" not in link]
    for path, link in local:
        name, _, fragment = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists() or (fragment and fragment not in headings(target.read_text("utf-8"))):
            lost.append(f"{path.relative_to(ROOT)}: {link}")
    assert not lost and len(local) > 30
    assert headings("# A B: `c` (d)\n```\n# no\n```\n## e-f, g") == {"a-b-c-d", "e-f-g"}


def test_hooks_before_a_commit_call_tools_that_are_pinned():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    for hook in repository["hooks"]:
        program, *words = shlex.split(hook["entry"])
        assert hook["language"] == "system"  # the environment's, whose versions pyproject.toml has
        assert find_spec(words[1]) if program == "python" else (SCRIPTS / program).exists(), hook["entry"]


def test_types_have_no_error_beyond_the_baseline():
    lines, fewer = type_errors.differences(type_errors.type_errors(), json.loads(type_errors.BASELINE.read_text()))
    assert not lines, "\n".join(lines)
    assert not fewer, f"fewer errors than the baseline bears: run `python -m tests.type_errors --shrink` ({fewer})"


def test_the_baseline_bears_no_error_of_the_libraries():
    assert not [file for file in json.loads(type_errors.BASELINE.read_text()) if file.split("/")[0] in TYPED]


def test_an_error_is_shown_and_the_baseline_only_shrinks():
    errors = [{"file": file, "line": n, "message": "m", "code": "c"} for file, n in (("a", 1), ("a", 2), ("b", 3))]
    lines, fewer = type_errors.differences(errors, {"a": 1, "b": 2, "c": 1})
    assert lines == ["a:1: m  [c]", "a:2: m  [c]", "a: 2 errors, of which 1 are borne"]
    assert fewer == {"b": 1, "c": 0} and type_errors.shrunk({"a": 1, "b": 2, "c": 1}, fewer) == {"a": 1, "b": 1}


def test_mypy_is_asked(tmp_path):
    (tmp_path / "pyproject.toml").write_text('[tool.mypy]\nfiles = ["a.py"]\n')
    (tmp_path / "a.py").write_text("x: int = ''\n")
    (error,) = type_errors.type_errors(tmp_path)
    assert (error["file"], error["line"], error["code"]) == ("a.py", 1, "assignment")
    (tmp_path / "pyproject.toml").write_text('[tool.mypy]\nfiles = ["absent.py"]\n')
    with pytest.raises(RuntimeError, match="absent"):
        type_errors.type_errors(tmp_path)
