"""setup.py: when there is an extension, for which architectures, and what happens when a source does not compile."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from kernels.backends import device

ROOT = Path(__file__).parents[1]
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


@pytest.fixture
def setup(monkeypatch):
    """The module, on a machine whose environment says nothing of CUDA."""
    for name in ("LIGHTNINGDIT_CUDA", "LIGHTNINGDIT_CUDA_ARCHS", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("project_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("text", "want"), [("sm_80 sm_90a", ["80", "90a"]), ("80;100f", ["80", "100f"]), (" 90a, sm_120 ", ["90a", "120"])]
)
def test_architectures_by_name(setup, text, want):
    assert setup.architectures(text) == want


@pytest.mark.parametrize("text", ["", "hopper", "9.0", "sm_90a+ptx"])
def test_other_architectures_are_refused(setup, text):
    with pytest.raises(ValueError, match="LIGHTNINGDIT_CUDA_ARCHS is"):
        setup.architectures(text)


def test_architectures_of_the_gpus_that_are_here(setup, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert setup.architectures(None) == ["90a"]
    found = [(9, 0), (8, 0), (9, 0)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: found[i])
    assert setup.architectures(None) == ["80", "90a"]


def test_reasons_for_no_extension(setup, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(setup, "find_nvcc", lambda: None)
    assert setup.build() == {} and "there is no nvcc; the package is pure Python" in capsys.readouterr().err
    monkeypatch.setattr(setup, "find_nvcc", lambda: tmp_path / "bin" / "nvcc")
    assert setup.why_not() == ""
    monkeypatch.setattr(setup, "wheel_folder", lambda: tmp_path)
    for name, file in setup.WHEELS_BESIDE_NVCC.items():
        assert name in setup.why_not()
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    assert setup.why_not() == ""
    monkeypatch.setenv("LIGHTNINGDIT_CUDA", "0")
    assert setup.build() == {} and "LIGHTNINGDIT_CUDA is 0" in capsys.readouterr().err
    monkeypatch.delenv("LIGHTNINGDIT_CUDA")
    monkeypatch.setattr(setup, "find_spec", lambda name: None)
    assert "torch is not installed" in setup.why_not()


def test_nvcc_of_the_toolkit_that_is_named_then_of_the_path_then_of_the_wheel(setup, monkeypatch, tmp_path):
    def program(folder):
        path = tmp_path / folder / "bin" / "nvcc"
        path.parent.mkdir(parents=True)
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
        return path

    named, on_path, wheel = program("named"), program("path"), program("wheel")
    monkeypatch.setattr(setup, "wheel_folder", lambda: tmp_path / "wheel")
    monkeypatch.setenv("PATH", str(on_path.parent))
    assert setup.find_nvcc() == on_path
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "named"))
    assert setup.find_nvcc() == named
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", "")
    which = setup.shutil.which
    monkeypatch.setattr(setup.shutil, "which", lambda name: None if name.startswith("/usr/local") else which(name))
    assert setup.find_nvcc() == wheel


def test_the_extra_has_each_wheel_that_nvcc_needs(setup):
    text = (ROOT / "pyproject.toml").read_text()
    extra = tomllib.loads(text)["project"]["optional-dependencies"]["nvcc"]
    pinned = dict(requirement.split("==") for requirement in extra)
    assert pinned.keys() == {"nvidia-cuda-nvcc", *setup.WHEELS_BESIDE_NVCC}
    assert {version.rsplit(".", 1)[0] for version in pinned.values()} == {"13.0"}, "one release of CUDA"


def project(folder: Path, source: str) -> Path:
    """This project with one .cu and a binding that needs nothing of it."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    (folder / "csrc").mkdir()
    (folder / "kernels").mkdir()
    (folder / "kernels" / "__init__.py").touch()
    (folder / "csrc" / "one.cu").write_text(source)
    (folder / "csrc" / "binding.cpp").write_text(
        '#include <pybind11/pybind11.h>\nint answer();\nPYBIND11_MODULE(LDIT_MODULE, m) { m.def("answer", &answer); }\n'
    )
    return folder


def build(folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    environment = os.environ | {"LIGHTNINGDIT_CUDA_ARCHS": "sm_90a"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
def test_a_build_a_rebuild_of_one_file_and_a_failure(tmp_path):
    kernel = "__global__ void nothing() {}\nint answer() { return %s; }\n"
    folder = project(tmp_path, kernel % "42")
    done = build(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    program = "import torch, kernels._cuda as c; print(c.answer())"
    answer = [sys.executable, "-c", program]
    run = subprocess.run(answer, cwd=folder, capture_output=True, text=True)
    assert run.stdout.strip() == "42", run.stderr
    binding = next(folder.rglob("binding.o")).stat().st_mtime_ns
    (folder / "csrc" / "one.cu").write_text(kernel % "43")
    assert build(folder).returncode == 0
    assert subprocess.run(answer, cwd=folder, capture_output=True, text=True).stdout.strip() == "43"
    assert next(folder.rglob("binding.o")).stat().st_mtime_ns == binding, "the other file was compiled again"
    (folder / "csrc" / "one.cu").write_text(kernel % "no_such_name")
    failed = build(folder)
    assert failed.returncode and "no_such_name" in failed.stdout + failed.stderr


def test_the_extension_that_is_not_built_is_a_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(device, "find_spec", lambda name: None)
    assert "the CUDA extension is not built (python setup.py build_ext --inplace" in device.extension_reasons()[0]
    monkeypatch.setattr(device, "SOURCES", tmp_path / "csrc")  # as in an installed wheel
    assert "the CUDA extension is not built (this installation has none" in device.extension_reasons()[0]


@pytest.mark.skipif(importlib.util.find_spec(device.EXTENSION) is None, reason="the CUDA extension is not built")
def test_the_extension_refuses_what_is_on_the_cpu():
    with pytest.raises(ValueError, match="swiglu_fwd: gate_up is not on a CUDA device"):
        device.extension().swiglu_fwd(torch.ones(2, 4), None, torch.ones(2, 2), 4)
