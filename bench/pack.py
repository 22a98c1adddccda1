"""Packs wheels and the CUDA extension for a CUDA machine without a network, and prints the lines that install them.

    bash bench/pack.sh DIR [--python 3.12] [--with torch-fidelity] [--headers FOLDER]

DIR gets the wheels that an image with torch and CUDA usually lacks, for its Python on x86-64 Linux, and the CUDA
extension for that Python and for sm_90a (LIGHTNINGDIT_CUDA_ARCHS names others). Versions are those pinned in
pyproject.toml; their own dependencies come in the versions installed here, where those are allowed. Files in DIR that
are right are neither fetched nor compiled again: a second run needs no network. DIR is outside the tree, or in a folder
that git ignores, and together with the tracked tree has at most 64 MB.

An extension is built with nothing of a Python but its headers: of one that is installed (pythonX.Y-dev, pyenv, uv), or
those of --headers. Without them, or without nvcc, only wheels are packed. Ends with 1 if a wheel could not be
had, if the extension does not compile, or if all is too large.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections import deque
from collections.abc import Iterable
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any
from zipfile import Path as ZipPath

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import NormalizedName, canonicalize_name, parse_wheel_filename
from packaging.version import Version

from bench.measure.rows import ROOT, revision

LIMIT_MB = 64
#: Never packed, and neither are their dependencies: an image for torch and CUDA has them, and most are large.
IN_IMAGE = frozenset(
    {
        "torch",
        "torchvision",
        "triton",
        "timm",
        "torchdiffeq",
        "safetensors",
        "numpy",
        "pillow",
        "pyyaml",
        "scipy",
        "scikit-learn",
        "matplotlib",
        "tensorboard",
        "ninja",
        "setuptools",
        "pybind11",
    }
)
#: Pinned, but imported by nothing that is measured: packed if named.
OPTIONAL = frozenset({"torch-fidelity", "jinja2", "markupsafe", "plotly"})
#: Published as source alone, with compiled parts only on demand.
SOURCE_ONLY = frozenset({"deepspeed"})
#: torch's own wheels ask for glibc 2.28.
PLATFORMS = [
    *(f"manylinux_2_{minor}_x86_64" for minor in range(28, 4, -1)),
    "manylinux2014_x86_64",
    "manylinux2010_x86_64",
    "manylinux1_x86_64",
]


def pinned(root: Path, named: Iterable[NormalizedName]) -> list[Requirement]:
    """The dependencies of pyproject.toml that an image lacks, and those that were named, of its extras too."""
    project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]
    texts = chain(project["dependencies"], *project.get("optional-dependencies", {}).values())
    known = {canonicalize_name(r.name): r for r in map(Requirement, texts)}
    if unknown := sorted(set(named) - known.keys()):
        raise ValueError(f"--with {unknown[0]} is not pinned in pyproject.toml; allowed: {', '.join(sorted(known))}")
    names = [canonicalize_name(Requirement(text).name) for text in project["dependencies"]]
    lacked = [name for name in names if name not in IN_IMAGE | OPTIONAL]
    return [known[name] for name in dict.fromkeys([*lacked, *named])]


class Wheels:
    """The wheels in a folder for a Python on x86-64 Linux; pip brings those that are missing."""

    def __init__(self, folder: Path, python: str):
        self.folder, self.python = folder, python
        release = tuple(map(int, python.split(".")))
        abi = f"cp{python.replace('.', '')}"
        self._tags: set[Tag] = {*cpython_tags(release, [abi], PLATFORMS), *compatible_tags(release, abi, PLATFORMS)}
        linux = {"os_name": "posix", "sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"}
        self._environment: dict[str, Any] = {
            **default_environment(),
            **linux,
            "python_version": python,
            "python_full_version": f"{python}.0",
        }

    def find(self, requirement: Requirement) -> Path | None:
        for path in sorted(self.folder.glob("*.whl")):
            name, version, _, tags = parse_wheel_filename(path.name)
            if (
                name == canonicalize_name(requirement.name)
                and requirement.specifier.contains(version, True)
                and tags & self._tags
            ):
                return path
        return None

    def get(self, requirement: Requirement) -> Path:
        """Raises RuntimeError, with pip's reason, where it cannot be had."""
        wanted = tested(requirement)
        if found := self.find(wanted):
            return found
        if canonicalize_name(wanted.name) in SOURCE_ONLY:
            command = ["wheel", "--no-build-isolation", "--wheel-dir", str(self.folder)]
        else:
            command = [
                "download",
                "--only-binary=:all:",
                "--python-version",
                self.python,
                "--implementation",
                "cp",
                *(f"--platform={name}" for name in PLATFORMS),
                "--dest",
                str(self.folder),
            ]
        command += ["--no-deps", "--disable-pip-version-check", "--retries=1", f"{wanted.name}{wanted.specifier}"]
        done = subprocess.run(
            [sys.executable, "-m", "pip", *command],
            capture_output=True,
            text=True,
            env=os.environ | {"DS_BUILD_OPS": "0"},
        )
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
            errors = [line for line in lines if line.startswith("ERROR: ")] or lines
            raise RuntimeError(errors[-1].removeprefix("ERROR: "))
        if found := self.find(wanted):
            return found
        raise RuntimeError(f"the wheel that pip made is not for Python {self.python} on x86-64 Linux")

    def needs(self, wheel: Path, extras: Iterable[str]) -> list[Requirement]:
        """The dependencies of a wheel on that machine."""
        name, version = wheel.name.split("-")[:2]
        listed = metadata.PathDistribution(ZipPath(wheel, f"{name}-{version}.dist-info/")).requires or []
        environments = [self._environment | {"extra": extra} for extra in ("", *extras)]
        return [
            r
            for r in map(Requirement, listed)
            if r.marker is None or any(r.marker.evaluate(environment) for environment in environments)
        ]


def tested(requirement: Requirement) -> Requirement:
    """The same in the version that is installed here, which the tests ran with, if that is allowed."""
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return requirement
    if not requirement.specifier.contains(version, prereleases=True):
        return requirement
    return Requirement(f"{requirement.name}=={version}")


def select(wanted: list[Requirement], wheels: Wheels) -> tuple[list[Path], list[str]]:
    """Wheels of these and of all their dependencies, and those that could not be had, with the reason.

    The first to ask for a package decides its version: pinned ones come first.
    """
    chosen: dict[str, Path | None] = {}
    lacking, queue = [], deque(wanted)
    while queue:
        requirement = queue.popleft()
        name = canonicalize_name(requirement.name)
        if name not in chosen:
            try:
                chosen[name] = wheel = wheels.get(requirement)
            except RuntimeError as error:
                chosen[name] = None
                lacking.append(f"{requirement.name}{requirement.specifier} ({error})")
                continue
            needs = wheels.needs(wheel, requirement.extras)
            queue.extend(need for need in needs if canonicalize_name(need.name) not in IN_IMAGE)
        elif (path := chosen[name]) and not requirement.specifier.contains(parse_wheel_filename(path.name)[1], True):
            lacking.append(f"{requirement.name}{requirement.specifier} (a package needs it, another took {path.name})")
    return [path for path in chosen.values() if path], lacking


def version_of(headers: Path) -> str:
    """Such as "3.12", of the Python whose headers these are; empty if they are none."""
    file = headers / "patchlevel.h"
    numbers = dict(re.findall(r"#define PY_(M\w+)_VERSION\s+(\d+)", file.read_text("utf-8"))) if file.is_file() else {}
    whole = numbers.keys() >= {"MAJOR", "MINOR"} and (headers / "Python.h").is_file()
    return f"{numbers['MAJOR']}.{numbers['MINOR']}" if whole else ""


def find_headers(python: str) -> Path | None:
    """From an interpreter on the PATH, pyenv, uv, or the usual places."""
    program = shutil.which(f"python{python}")
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    prefixes = [
        Path(sys.base_prefix),
        *([Path(program).resolve().parents[1]] if program else []),
        *sorted(pyenv.glob(f"versions/{python}[.-]*"), reverse=True),
        *sorted(Path.home().glob(f".local/share/uv/python/cpython-{python}[.-]*"), reverse=True),
        Path("/usr/local"),
        Path("/usr"),
    ]
    folders = (prefix / "include" / f"python{python}" for prefix in prefixes)
    return next((folder for folder in folders if version_of(folder) == python), None)


def build_extension(root: Path, headers: Path, python: str, target: Path) -> tuple[Path | None, str]:
    """The extension in `target`, or None and why there is none; raises RuntimeError if it does not compile.

    Objects stay in build/pack. Only the binding is compiled again for another Python: no kernel knows of one.
    """
    suffix = f".cpython-{python.replace('.', '')}-x86_64-linux-gnu.so"
    work = root / "build" / "pack"
    built, packed = work / "lib" / "kernels" / f"_cuda{suffix}", target / f"_cuda{suffix}"
    built.unlink(missing_ok=True)
    # Put before the headers of the interpreter that builds, in the commands for C++ alone.
    flags = f"-I{headers} {os.environ.get('CPPFLAGS', '')}".strip()
    environment = os.environ | {
        "CPPFLAGS": flags,
        "SETUPTOOLS_EXT_SUFFIX": suffix,
        "LIGHTNINGDIT_CUDA_ARCHS": architectures(),
    }
    command = [
        sys.executable,
        "setup.py",
        "--quiet",
        "build_ext",
        "--build-temp",
        str(work / "temp"),
        "--build-lib",
        str(work / "lib"),
    ]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the CUDA extension does not compile:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    if not built.exists():
        reason = re.search(r"no CUDA extension, because (.*); the package", done.stderr)
        return None, reason[1] if reason else "setup.py built none"
    shutil.copyfile(built, packed)
    if strip := shutil.which("strip"):  # the binding's; line numbers of kernels are in the device code, and stay
        subprocess.run([strip, "--strip-debug", str(packed)], check=True)
    return packed, ""


def architectures() -> str:
    return os.environ.get("LIGHTNINGDIT_CUDA_ARCHS", "sm_90a")


def libraries_asked_for(file: Path) -> str:
    """The versions of glibc and libstdc++ that an extension refers to, the newest of each."""
    found = re.findall(rb"\0(GLIBC|GLIBCXX)_([0-9.]+)(?=\0)", file.read_bytes())
    versions = {name: [Version(v.decode()) for n, v in found if n == name] for name in (b"GLIBC", b"GLIBCXX")}
    return ", ".join(f"{name.decode()} {max(newer)}" for name, newer in versions.items() if newer) or "nothing"


def tracked(root: Path) -> list[Path]:
    """The files that git tracks, as far as they are there."""
    done = subprocess.run(["git", "-C", str(root), "ls-files", "-z"], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{root} is no checkout of git, which would tell how large the tree is")
    return [file for file in (root / name for name in done.stdout.split("\0") if name) if file.is_file()]


def check_place(root: Path, target: Path) -> None:
    """Raises ValueError for a folder in which git would see new files."""
    command = ["git", "-C", str(root), "check-ignore", "--quiet", str(target / "wheels")]
    if target.is_relative_to(root) and subprocess.run(command).returncode:
        raise ValueError(f"DIR is {target}, in the tree; allowed: outside, or where git ignores files, as in build")


def use(root: Path, target: Path, extension: Path | None) -> list[str]:
    """The lines for the other machine, in the tree's folder there."""
    within = target.is_relative_to(root)
    lines = [
        f"pack={shlex.quote(str(target.relative_to(root) if within else target))}"
        + ("" if within else "  # or where it was copied to"),
        'site="$(mktemp -d)"',
        'python3 -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$pack"/wheels/*.whl',
        f'cp "$pack"/{extension.name} kernels/' if extension else "",
        f'GIT_REVISION={revision(root)} PYTHONPATH="$site" bash bench/gpu.sh OUT 8',
    ]
    return list(filter(None, lines))


def megabytes(*files: Path) -> float:
    return sum(file.stat().st_size for file in files) / 1e6


def parse(argv: list[str] | None) -> argparse.Namespace:
    def minor(text: str) -> str:
        if not re.fullmatch(r"3\.\d+", text):
            raise argparse.ArgumentTypeError(f"{text!r} is no version such as 3.12")
        return text

    parser = argparse.ArgumentParser(
        prog="bash bench/pack.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", metavar="DIR", type=Path, help="made if it does not exist")
    parser.add_argument("--python", type=minor, default="3.12", help="that of the other machine (default 3.12)")
    parser.add_argument(
        "--with",
        dest="named",
        metavar="NAME",
        action="append",
        default=[],
        type=canonicalize_name,
        help="also this package of pyproject.toml, such as liger-kernel; repeatable",
    )
    parser.add_argument("--headers", type=Path, help="folder of that Python's Python.h (default: found)")
    return parser.parse_args(argv)


def pack(root: Path, target: Path, python: str, wanted: list[Requirement], headers: Path | None) -> None:
    """Fills the folder and prints its content; raises RuntimeError where a wheel lacks, or it is too large."""
    tree = megabytes(*tracked(root))
    wheels = Wheels(target / "wheels", python)
    wheels.folder.mkdir(parents=True, exist_ok=True)
    chosen, lacking = select(wanted, wheels)
    if not lacking:
        for path in set(wheels.folder.glob("*.whl")) - set(chosen):
            path.unlink()  # other versions, for other Pythons, or no longer needed
    print(f"wheels for Python {python} on x86-64 Linux:")
    for path in sorted(chosen):
        print(f"  {megabytes(path):6.2f} MB  {path.name}")

    extension, reason = None, f"there are no headers of Python {python} here (python{python}-dev, pyenv or --headers)"
    if headers:
        extension, reason = build_extension(root, headers, python, target)
    for path in set(target.glob("_cuda.*.so")) - {extension}:
        path.unlink()
    if extension:
        asks = libraries_asked_for(extension)
        print(f"extension for {architectures()} and torch {metadata.version('torch')}, which asks for {asks}:")
        print(f"  {megabytes(extension):6.2f} MB  {extension.name}")
    else:
        print(f"no extension, because {reason}; there, it takes nvcc and python setup.py build_ext --inplace")

    packed = megabytes(*chosen, *([extension] if extension else []))
    whole = packed + tree
    print(f"{packed:.1f} MB packed, {whole:.1f} MB with the tracked tree, of {LIMIT_MB} MB allowed")
    print(f"\nOn the other machine, with Python {python}, in the tree's folder:\n")
    print("".join(f"    {line}\n" for line in use(root, target, extension)))
    if lacking:
        raise RuntimeError(f"not packed: {'; '.join(lacking)}")
    if whole > LIMIT_MB:
        raise RuntimeError(f"{whole:.1f} MB are more than {LIMIT_MB}: leave out a --with, or an architecture")


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    options = parse(argv)
    target, python = options.target.resolve(), options.python
    headers = options.headers or find_headers(python)
    try:
        if headers and version_of(headers) != python:
            raise ValueError(f"--headers is {headers}, which has no Python.h of Python {python}")
        check_place(root, target)
        wanted = pinned(root, options.named)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        pack(root, target, python, wanted, headers)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
