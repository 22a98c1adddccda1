"""Imports, read from the sources: downwards only, in no circle, late only where that saves time."""

import ast
import re
import subprocess
import sys
import tomllib
from graphlib import CycleError, TopologicalSorter
from importlib import metadata
from pathlib import Path

import pytest

from tests.import_graph import Imports, brought, import_graph

ROOT = Path(__file__).parent.parent
PACKAGES = ("common", "kernels", "lightningdit", "vavae", "launch")
ALLOWED = {
    "common": {"common"},
    "kernels": {"kernels", "common"},
    "lightningdit": {"lightningdit", "kernels", "common"},
    "vavae": {"vavae", "kernels", "common"},
    "launch": {"launch", "lightningdit", "vavae", "kernels", "common"},
}
# Package → the only place it may be imported in.
HOME = {
    "triton": "kernels/",
    "deepspeed": "launch/training/engine.py",
    "timm": "vavae/foundation/",
    "wandb": "launch/training/wandb_writer.py",
    "nvidia": "vavae/decoders/dali_decoder.py",  # DALI
    "diffusers": "launch/exporting/lightningdit_pipeline.py",  # which exports hold, and no program runs
    "huggingface_hub": "launch/hub.py",
}
COMPUTED = "(computed)"  # in place of a name that an import by string gets at run time
# Peers, measured where they are found.
NEVER_REQUIRED = {"flash_attn", "flash_attn_interface", "apex", "liger_kernel", "quack"}
#: Takes a second or hundreds of modules to import: what a function may import when it is called.
SLOW = {
    "torch",
    "torch._inductor",
    "torchvision",
    "triton",
    "deepspeed",
    "timm",
    "lpips",
    "torchdiffeq",
    "torch_fidelity",
    "sklearn",
    "scipy",
    "matplotlib",
    "PIL",
    "tensorboard",
    "pydantic",
    "nvidia.dali",
    "wandb",
    "huggingface_hub",
}
#: Module → why its functions may import at will.
LATE = {
    "launch.__main__": "asks first whose packages the names `common` and `kernels` find",
    "bench.workloads.training": "benches of ops and GPU tests start where only torch, Triton and pytest are installed",
}


def imported(path: Path) -> set[str]:
    """Top-level names of every import in a file, at any depth of nesting, of names in strings too."""
    tree, names = ast.parse(path.read_text()), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(path.relative_to(ROOT).parts[0] if node.level else node.module.split(".")[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            names.add(named(node.args[0], tree))
    return names


def named(argument: ast.expr, tree: ast.Module) -> str:
    """Top-level name in what an import by string is given: text, text that begins so, or a constant of the file."""
    if isinstance(argument, ast.Name):
        assigned = [(t, node.value) for node in tree.body if isinstance(node, ast.Assign) for t in node.targets]
        constants = {t.id: value for t, value in assigned if isinstance(t, ast.Name)}
        argument = constants.get(argument.id, argument)
    if isinstance(argument, ast.JoinedStr):
        argument = argument.values[0]
    text = argument.value if isinstance(argument, ast.Constant) else COMPUTED
    return text.split(".")[0]


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_downwards_only(package):
    packages = {*PACKAGES, "bench", "tests"}
    wrong = {str(p.relative_to(ROOT)): imported(p) & packages - ALLOWED[package] for p in sources(package)}
    assert sources(package)
    assert not {path: names for path, names in wrong.items() if names}


def reached(module: str) -> set[str]:
    """Names of a module's imports, whole, and of those of all modules of its package that it imports."""
    package, found, waiting = module.partition(".")[0], set(), {module}
    while waiting:
        path = ROOT / (waiting.pop().replace(".", "/") + ".py")
        for node in ast.walk(ast.parse(path.read_text())) if path.is_file() else ():
            names = {alias.name for alias in node.names} if isinstance(node, ast.Import | ast.ImportFrom) else set()
            if isinstance(node, ast.ImportFrom):
                names = {node.module, *(f"{node.module}.{name}" for name in names)}
            waiting |= {name for name in names - found if name.startswith(f"{package}.")}
            found |= names
    return found


def test_the_trainer_imports_no_model():
    """Nor does what it imports of `launch`: a model comes to it through `launch.training.task` alone."""
    names = reached("launch.training.trainer")
    assert {"launch.training.task", "launch.training.restore", "launch.config_files"} <= names
    assert not [name for name in names if name.startswith(("lightningdit", "vavae"))]
    assert "lightningdit.task" in reached("launch.training.build")  # one that does is seen


@pytest.mark.parametrize("library", HOME)
def test_a_library_is_imported_in_its_one_place(library):
    users = [str(p.relative_to(ROOT)) for package in PACKAGES for p in sources(package) if library in imported(p)]
    assert all(user.startswith(HOME[library]) for user in users), users


def cycle(graph: dict[str, Imports]) -> list[str]:
    """Modules that import each other in a circle, at the top of files, in functions or for types; empty if none do."""
    try:
        TopologicalSorter({name: imports.all & graph.keys() for name, imports in graph.items()}).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def needless_late_imports(graph: dict[str, Imports]) -> dict[str, set[str]]:
    """Module → what its functions import though it would bring nothing slow that the module has not already."""
    found = {}
    for module, imports in graph.items():
        slow = SLOW - brought(module, graph)
        quick = {name for name in imports.late if not brought(name, graph) & slow}
        found[module] = {name for name in quick if name.split(".")[0] not in NEVER_REQUIRED}
    return {module: names for module, names in found.items() if names and module not in LATE}


def test_no_imports_form_a_circle():
    assert cycle(import_graph(ROOT, (*PACKAGES, "bench", "tests"))) == []


def test_functions_import_only_what_is_slow():
    assert needless_late_imports(import_graph(ROOT, (*PACKAGES, "bench"))) == {}


def test_circles_and_late_imports_are_seen(tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p/__init__.py").touch()
    (tmp_path / "p/a.py").write_text("import json\ndef f():\n    import torch\n    from p import b\n")
    (tmp_path / "p/b.py").write_text("import torch\nif TYPE_CHECKING:\n    from p.c import C\n")
    (tmp_path / "p/c.py").write_text("import torch\ndef f():\n    import json, torch\n    import quack\n")
    graph = import_graph(tmp_path, ["p"])
    assert needless_late_imports(graph) == {"p.c": {"json", "torch"}} and cycle(graph) == []
    (tmp_path / "p/c.py").write_text("def f():\n    from p.a import f\n")
    assert set(cycle(import_graph(tmp_path, ["p"]))) == {"p.a", "p.b", "p.c"}


def test_imports_by_string_are_seen(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "file.py"
    path.write_text("""
NAME = "vavae.model"
importlib.import_module("launch.train")
import_module(NAME)
def f(x):
    import_module(f"bench.{x}")
    __import__("deepspeed")
    import_module(x)
""")
    assert imported(path) == {"launch", "vavae", "bench", "deepspeed", COMPUTED}


def test_only_the_registry_computes_what_it_imports():
    """Of its own package, by construction; a name no reader of imports can see would escape every rule here."""
    users = {str(p.relative_to(ROOT)) for package in PACKAGES for p in sources(package) if COMPUTED in imported(p)}
    assert users == {"kernels/registry.py"}


@pytest.mark.parametrize(
    "packages, extras", [(PACKAGES, ("dali", "wandb", "hub", "diffusers")), (("bench", "tests"), ("test",))]
)
def test_imported_packages_are_pinned(packages, extras):
    """Whatever is imported comes with Python, is of this repository, or has its one version in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = [*project["dependencies"], *(r for extra in extras for r in project["optional-dependencies"][extra])]
    pinned = {distribution(r.split("==")[0]) for r in listed if "==" in r}
    assert len(pinned) == len(listed)
    known = {*sys.stdlib_module_names, *PACKAGES, "bench", "tests", "setup", COMPUTED, *NEVER_REQUIRED}
    used = set().union(*(imported(p) for package in packages for p in sources(package))) - known
    brought = metadata.packages_distributions()
    assert {name for name in used if not pinned & set(map(distribution, brought.get(name, [name])))} == set()


def distribution(name: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def test_versions_are_pinned_in_one_place():
    """No other tracked file names a version of a pinned distribution."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no checkout of git, which would tell what is tracked")
    listed = subprocess.run(
        ["git", "ls-files", "*.sh", "*.py", "*.yml", "*.txt", "*.cfg"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=True,
    ).stdout.split()
    assert not [
        f
        for f in listed
        if (ROOT / f).exists() and "torch==2" in (ROOT / f).read_text() and f != __name__ and not f.startswith("tests/")
    ]


def test_the_packages_under_test_are_these():
    """`kernels` is also the name of a public distribution."""
    for package in PACKAGES:
        assert Path(__import__(package).__file__).parent == ROOT / package


def test_the_way_from_command_to_loss_in_the_readme_is_there():
    """Each line names a file and a function in it, a method by its class."""
    section = (ROOT / "README.md").read_text().partition("### From command to loss")[2].partition("\n## ")[0]
    lines = re.findall(r"^ {4}(\S+\.py) +(\S+) +\S", section, re.MULTILINE)
    assert len(lines) >= 8
    for path, name in lines:
        scope = ast.parse((ROOT / path).read_text()).body
        for part in name.split("."):
            found = [n for n in scope if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == part]
            assert found, f"{path} has no {name}"
            scope = found[0].body
