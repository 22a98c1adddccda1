"""Print the requirements pinned in a pyproject.toml, with the named extras, that are not installed, one a line.

Needs nothing but the standard library: it runs before anything is installed.
"""

import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path


def missing(pyproject: Path, extras: list[str]) -> list[str]:
    """Requirements that the running interpreter does not meet; only the names count, versions are the user's choice."""
    project = tomllib.loads(pyproject.read_text())["project"]
    wanted = list(project["dependencies"])
    for extra in extras:
        wanted += project["optional-dependencies"][extra]
    absent = []
    for requirement in wanted:
        try:
            importlib.metadata.version(re.split(r"[=<>;\[ ]", requirement, maxsplit=1)[0])
        except importlib.metadata.PackageNotFoundError:
            absent.append(requirement)
    return absent


if __name__ == "__main__":
    print("\n".join(missing(Path(sys.argv[1]), sys.argv[2:])))
