"""`python -m launch doctor`: what this machine has, what each op would run on and why, and what is wrong.

Packages are looked up, not imported (torch aside), so that a broken optional one cannot break the doctor. Ends with 1
where a required package is missing or is not the pinned version, else with 0.
"""

import argparse
import base64
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement

from launch.runtime.packages import ROOT, foreign_packages

DISTRIBUTION = "lightningdit"
NAMESAKE = "kernels"  # a public distribution whose package has the name of one of ours
# Found at run time, never required: module → (distributions that bring it, what it would be used for).
OPTIONAL = {
    "flash_attn": (("flash-attn",), "peer of rope_attention"),
    "apex": (("apex",), "peer of the norms and the optimizer"),
    "liger_kernel": (("liger-kernel", "liger-kernel-nightly"), "peer of the norms and swiglu"),
    "quack": (("quack-kernels",), "peer of the norms"),
}
#: Decoder → distributions that bring it.
DECODERS = {
    "dali": ("nvidia-dali-cuda130",),
    "torchvision": ("torchvision",),
    "pil": ("pillow",),
}
NOT_BUILT_NOTE = "it is built where the source distribution or a checkout is installed with --no-build-isolation"
CUDA_HEADERS = ("cuda_runtime.h", "cublas_v2.h", "cusparse.h", "cusolverDn.h")  # what torch's own headers include


@dataclass(frozen=True)
class Row:
    """One finding. `ok` None: for information; False: what makes the doctor end with 1."""

    name: str
    value: str
    note: str = ""
    ok: bool | None = None


def requirements() -> list[Requirement]:
    """The pinned packages this platform needs: from the installed distribution, or a source tree's pyproject.toml."""
    try:
        texts = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        texts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]
    environment = {**default_environment(), "extra": ""}
    parsed = (Requirement(text) for text in texts)
    return [r for r in parsed if r.marker is None or r.marker.evaluate(environment)]


def installed(*distributions: str) -> str | None:
    """Version of the first of these distributions that is installed."""
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def findable(module: str) -> bool:
    """Whether `module` could be imported; nothing but its parent packages is."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def package_rows() -> list[Row]:
    """Python and the required packages, each against its pin."""
    rows = [Row("python", platform.python_version(), ok=sys.version_info >= (3, 11))]
    for requirement in requirements():
        version = installed(requirement.name)
        if version is None:
            rows.append(Row(requirement.name, "missing", f"needs {requirement.specifier}", ok=False))
        elif not requirement.specifier.contains(version, prereleases=True):
            rows.append(Row(requirement.name, version, f"wrong version: needs {requirement.specifier}", ok=False))
        else:
            rows.append(Row(requirement.name, version, ok=True))
    return rows


def own_rows() -> list[Row]:
    """Whether the packages imported are this project's, and unchanged since they were installed."""
    rows = [Row(name, "not ours", sentence, ok=False) for name, sentence in foreign_packages().items()]
    if altered := altered_files():
        note = f"not as {DISTRIBUTION} installed them; install it again: {', '.join(altered)}"
        rows.append(Row("files", f"{len(altered)} altered", note, ok=False))
    rows = rows or [Row("packages", "ours", str(ROOT), ok=True)]
    if version := installed(NAMESAKE):
        note = "has a package of the same name as ours: libraries that look for it get whichever comes first (README)"
        rows.append(Row(f"the other {NAMESAKE}", version, note))
    return rows


def altered_files() -> list[str]:
    """Files of this installed distribution that are missing, unreadable or altered."""
    try:
        files = metadata.distribution(DISTRIBUTION).files or []
    except metadata.PackageNotFoundError:
        return []
    here = [(file, Path(file.locate())) for file in files if file.hash and file.hash.mode == "sha256"]
    return [str(file) for file, path in here if path.is_relative_to(ROOT) and _sha256(path) != file.hash.value]


def _sha256(path: Path) -> str:
    """As a wheel's RECORD writes it; empty where there is no file that can be read."""
    try:
        digest = hashlib.sha256(path.read_bytes()).digest()
    except OSError:
        return ""
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")


def optional_rows() -> list[Row]:
    """Packages that nothing here requires."""
    rows = []
    for module, (distributions, use) in OPTIONAL.items():
        found, version = findable(module), installed(*distributions)
        value = (version or "found, no version recorded") if found else "not found"
        broken = f"; {version} is installed but its module is not importable" if version and not found else ""
        rows.append(Row(module, value, use + broken))
    return rows


def device_rows() -> list[Row]:
    """Processors, memory, GPUs with their driver."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows = [Row("cpu", f"{cores} cores", platform.machine())]
    if hasattr(os, "sysconf"):
        rows.append(Row("memory", f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"))
    driver = run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    rows.append(Row("nvidia driver", driver.splitlines()[0] if driver else "not found"))
    return rows + gpu_rows()


def gpu_rows() -> list[Row]:
    """The GPUs that torch sees."""
    try:
        import torch
    except (ImportError, OSError) as e:
        return [Row("torch", "does not import", str(e), ok=False)]
    if not torch.cuda.is_available():
        built = torch.version.cuda
        return [Row("gpu", "none", f"torch is built for CUDA {built}" if built else "torch is built without CUDA")]
    rows = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        note = f"{p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor}, {p.multi_processor_count} multiprocessors"
        rows.append(Row(f"gpu {i}", p.name, note))
    return rows


def compiler_rows() -> list[Row]:
    """The tools that building the CUDA extension takes, and whether they are all there."""
    tools = {
        "g++": shutil.which(os.environ.get("CXX", "g++")),
        "nvcc": _nvcc(),
        "ninja": shutil.which("ninja") or shutil.which(str(Path(sys.executable).parent / "ninja")),
    }
    rows = [Row(name, _version(path) if path else "not found", path or "") for name, path in tools.items()]
    folder, lacking = cuda_headers()
    rows.append(Row("cuda headers", str(folder or "not found"), f"lacks {', '.join(lacking)}" if lacking else ""))
    missing = [name for name, path in tools.items() if not path] + (["CUDA library headers"] if lacking else [])
    return [*rows, extension_row(missing)]


def extension_row(missing: list[str]) -> Row:
    """Whether the CUDA extension can be built with what is here; without its sources, whether it is installed."""
    if not (ROOT / "csrc").is_dir():
        found = next((ROOT / "kernels").glob("_cuda*.so"), None)
        return Row("cuda extension", "installed" if found else "not installed", str(found or NOT_BUILT_NOTE))
    verdict = f"cannot be built: no {', '.join(missing)}" if missing else "can be built"
    return Row("cuda extension", verdict, "" if not missing else "the other backends serve instead, see ops")


def cuda_headers() -> tuple[Path | None, list[str]]:
    """The folder with most of `CUDA_HEADERS` (torch's wheels first, then the toolkits) and those it lacks."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(p) / "cu13" / "include" for p in (spec.submodule_search_locations if spec else [])]
    folders += [home / "include" for home in _cuda_homes()]
    lacks = {f: [h for h in CUDA_HEADERS if not (f / h).is_file()] for f in folders if f.is_dir()}
    best = min(lacks, key=lambda f: len(lacks[f]), default=None)
    return (best, lacks[best]) if best else (None, list(CUDA_HEADERS))


def _cuda_homes() -> list[Path]:
    named = [os.environ[v] for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    return [Path(p) for p in [*named, "/usr/local/cuda"]]


def _nvcc() -> str | None:
    spec = importlib.util.find_spec("nvidia")
    wheels = [Path(p) / "cu13" for p in (spec.submodule_search_locations if spec else [])]
    beside = [str(home / "bin" / "nvcc") for home in [*_cuda_homes(), *wheels]]
    return next(filter(None, map(shutil.which, ["nvcc", *beside])), None)


def run(*command: str) -> str:
    """Standard output of a program, stripped; empty where it is absent or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _version(program: str) -> str:
    text = run(program, "--version")
    nvcc = re.search(r"release [\d.]+, V([\d.]+)", text)  # its version is on the fourth line, others' on the first
    numbers = [nvcc[1]] if nvcc else re.findall(r"\d+(?:\.\d+)+", text.partition("\n")[0])
    return numbers[-1] if numbers else "--version fails"


def op_rows(backend: str = "auto") -> list[Row]:
    """The backend each op would use here, and the reason."""
    if "kernels" in foreign_packages():
        return [Row("ops", "not loaded", "kernels is not this project's")]
    try:
        import kernels

        table = kernels.select(backend).table()
    except Exception as e:  # any reason why the ops do not load is a finding
        return [Row("ops", "do not load", f"{type(e).__name__}: {e}", ok=False)]
    return [Row(name, row["backend"], row["reason"]) for name, row in table.items()]


def decoder_rows() -> list[Row]:
    """The decoders of images: which are here, what each lacks, which one `data.decoder: auto` takes."""
    try:
        import torch

        from vavae.decoders import choice

        device = "cuda" if torch.cuda.is_available() else "cpu"
        taken, reason = choice.choose_decoder("auto", device)
        lacking = {name: choice.lacking(name, device) for name in choice.NAMES}
    except Exception as e:  # any reason why they do not load is a finding
        return [Row("decoders", "do not load", f"{type(e).__name__}: {e}", ok=False)]
    rows = []
    for name, packages in DECODERS.items():
        notes = [f"auto takes it: {reason}"] if name == taken else []
        if name != "pil" and device == "cpu":
            notes.append("no GPU: decodes on the CPU")
        note = lacking[name] or "; ".join(notes)
        rows.append(Row(name, installed(*packages) or "not found", note))
    return rows


def examine() -> dict[str, list[Row]]:
    """All findings by section."""
    return {
        "this project": own_rows(),
        "required packages": package_rows(),
        "devices": device_rows(),
        "compilers": compiler_rows(),
        "optional packages": optional_rows(),
        "image decoders": decoder_rows(),
        "ops (backend that auto takes, and why)": op_rows(),
    }


def as_text(findings: dict[str, list[Row]]) -> str:
    """Aligned columns under a heading for each section, problems repeated at the end."""
    everything = [row for rows in findings.values() for row in rows]
    name_width = max(len(row.name) for row in everything)
    lines = []
    for title, rows in findings.items():
        lines += [title, "-" * len(title)]
        values = max((len(row.value) for row in rows if row.note), default=0)
        for row in rows:
            mark = {None: " ", True: "✓", False: "✗"}[row.ok]
            lines.append(f"{mark} {row.name:<{name_width}}  {row.value:<{values}}  {row.note}".rstrip())
        lines.append("")
    bad = [row for row in everything if row.ok is False]
    lines += [f"✗ {row.name}: {row.value} {row.note}".rstrip() for row in bad]
    return "\n".join([*lines, f"{len(bad)} problem{'s' * (len(bad) != 1)}" if bad else "everything required is here"])


def main(argv: list[str]) -> int:
    """Print the findings, as text or JSON; 1 where something required is missing or wrong."""
    parser = argparse.ArgumentParser(prog="python -m launch doctor", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    arguments = parser.parse_args(argv)
    findings = examine()
    if arguments.json:
        sections = {title: [vars(row) for row in rows] for title, rows in findings.items()}
        print(json.dumps(sections, indent=1, ensure_ascii=False))
    else:
        print(as_text(findings))
    return int(any(row.ok is False for rows in findings.values() for row in rows))
