"""Imports read from the sources: of which modules, and whether at the top of a file or inside a function."""

import ast
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Imports:
    """Dotted names that one module imports, those of this tree resolved to modules."""

    at_top: set[str] = field(default_factory=set)
    late: set[str] = field(default_factory=set)  # inside a function
    typing: set[str] = field(default_factory=set)  # under `if TYPE_CHECKING`

    @property
    def all(self) -> set[str]:
        return self.at_top | self.late | self.typing


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph(root: Path, packages: Iterable[str]) -> dict[str, Imports]:
    """Module → its imports, for every file of the packages below `root`."""
    paths = {module_name(path, root): path for package in packages for path in sorted((root / package).rglob("*.py"))}
    return {name: _imports(ast.parse(path.read_text()), paths.keys()) for name, path in paths.items()}


def _imports(tree: ast.Module, modules: Iterable[str]) -> Imports:
    found = Imports()
    late = {id(node) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for node in ast.walk(f)}
    blocks = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    typing = {id(node) for block in blocks for node in block.body}
    for node in ast.walk(tree):
        names = found.late if id(node) in late else found.typing if id(node) in typing else found.at_top
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in modules else node.module for name in submodules}
    return found


def brought(module: str, graph: dict[str, Imports]) -> set[str]:
    """Everything that importing a module imports at the top of files, itself and the packages around it included."""
    found, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += [name.rpartition(".")[0]] if "." in name else []
            waiting += graph[name].at_top if name in graph else []
    return found
