"""Detects packages of other projects under the names of this project's, without importing any.

`kernels` is also the name of a public package. Installing that one overwrites files of ours, and where a folder with it
comes first on Python's path, it is what `import kernels` gives.
"""

from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("kernels", "common", "lightningdit", "vavae")
#: Package → a line of its `__init__.py` that no other package of that name has.
MARKS = {"kernels": b'__project__ = "lightningdit"'}


def foreign_packages() -> dict[str, str]:
    """Package → a sentence that says which file was found in its place and what to do; empty if all are ours."""
    sentences = {name: _stranger(name, find_spec(name)) for name in PACKAGES}
    return {name: sentence for name, sentence in sentences.items() if sentence}


def _stranger(name: str, spec: ModuleSpec | None) -> str:
    ours = ROOT / name / "__init__.py"
    if spec is None or spec.origin is None:  # None: a folder without __init__.py
        return f"this project's {ours} is gone; {_restore(name)}"
    found = Path(spec.origin).resolve()
    if found != ours:
        return f"`import {name}` gives {found}, which is not this project's {ours}; {_let_ours_come_first(name, found)}"
    try:
        content = found.read_bytes()
    except OSError as e:
        return f"this project's {found} cannot be read: {e.strerror}"
    if MARKS.get(name, b"") not in content:
        return f"{found} is not this project's: another package of that name has overwritten it; {_restore(name)}"
    return ""


def _let_ours_come_first(name: str, found: Path) -> str:
    if _is_installed(found):
        return f"uninstall that one (pip uninstall {name}), or install this project in an environment of its own"
    folder = found.parent.parent if found.stem == "__init__" else found.parent
    return f"start from a folder other than {folder}, and take that off PYTHONPATH"


def _restore(name: str) -> str:
    if _is_installed(ROOT):
        return f"uninstall the other (pip uninstall {name}) and install this project again, or use a fresh environment"
    return "restore it from the repository"


def _is_installed(path: Path) -> bool:
    return not {"site-packages", "dist-packages"}.isdisjoint(path.parts)
