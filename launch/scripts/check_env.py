"""Print the requirements pinned in a pyproject.toml, with the named extras, that are not installed, one a line.

A public package that has the name of one of this project's is mentioned on stderr. Needs nothing but the
standard library: it runs before anything is installed.
"""

import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path


def missing(pyproject: Path, extras: list[str]) -> list[str]:
    """Requirements that the running interpreter does not meet; only the names count, versions are the user's choice."""
    project = tomllib.loads(pyproject.read_text("utf-8"))["project"]
    wanted = list(project["dependencies"])
    for extra in extras:
        wanted += project["optional-dependencies"][extra]
    absent = []
    for requirement in wanted:
        if installed(re.split(r"[=<>;\[ ]", requirement, maxsplit=1)[0]) is None:
            absent.append(requirement)
    return absent


def installed(distribution: str) -> str | None:
    """The version that the running interpreter has."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    if version := installed("kernels"):
        print(
            f"[setup] kernels {version} is installed here, a public package with the name of one of ours: libraries "
            "that use it fail beside this project, see the README",
            file=sys.stderr,
        )
    print("\n".join(missing(Path(sys.argv[1]), sys.argv[2:])))
