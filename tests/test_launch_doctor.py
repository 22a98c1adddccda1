"""`launch doctor`, on machines made up for the purpose and on this one."""

import base64
import hashlib
import json
import subprocess
import sys
from importlib import metadata

import pytest
from packaging.requirements import Requirement

from launch import doctor


@pytest.fixture
def empty_machine(tmp_path, monkeypatch):
    """No compiler, no toolkit, no header; returns a folder on PATH to put programs into."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    for name in ("CUDA_HOME", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(doctor.sys, "executable", str(programs / "python"))
    monkeypatch.setattr(doctor, "_cuda_homes", lambda: [tmp_path / "old", tmp_path / "cuda"])
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    return programs


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n/bin/cat <<'END'\n{text}\nEND\n")
    path.chmod(0o755)


def rows(found):
    return {row.name: row for row in found}


def test_pins_are_read_from_the_installed_distribution():
    pins = {r.name: str(r.specifier) for r in doctor.requirements()}
    assert pins["torch"] == "==2.11.0" and "pytest" not in pins  # extras are not requirements
    assert ("triton" in pins) == sys.platform.startswith("linux")


def test_pins_without_an_installed_distribution(monkeypatch):
    want = {str(r) for r in doctor.requirements()}
    monkeypatch.setattr(doctor, "DISTRIBUTION", "no-such-distribution")
    assert {str(r) for r in doctor.requirements()} == want


def test_missing_and_wrong_packages_are_said_and_end_with_1(monkeypatch, capsys):
    pins = [Requirement("numpy==0.0.1"), Requirement("no-such-package==1.0"), Requirement("pyyaml")]
    monkeypatch.setattr(doctor, "requirements", lambda: pins)
    found = rows(doctor.package_rows())
    assert (found["numpy"].ok, found["numpy"].value) == (False, metadata.version("numpy"))
    assert "needs ==0.0.1" in found["numpy"].note
    assert (found["no-such-package"].ok, found["no-such-package"].value) == (False, "missing")
    assert found["pyyaml"].ok and found["python"].ok

    monkeypatch.setattr(doctor, "op_rows", list)
    assert doctor.main([]) == 1
    out = capsys.readouterr().out
    assert out.rstrip().endswith("2 problems") and out.count("no-such-package") == 2


def test_packages_of_this_project_are_this_projects():
    (row,) = [row for row in doctor.own_rows() if row.ok is not None]
    assert row == doctor.Row("packages", "ours", str(doctor.ROOT), ok=True)


def test_another_package_called_kernels_is_a_problem_and_is_not_imported(monkeypatch, tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "kernels")
    assert str(tmp_path / "kernels" / "__init__.py") in (row := rows(doctor.own_rows())["kernels"]).note
    assert row.ok is False and [row.value for row in doctor.op_rows()] == ["not loaded"]


def installation(folder, distribution, files):
    """A distribution installed in `folder`: its files, with their hashes in a RECORD."""
    info = folder / f"{distribution.replace('-', '_')}-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
    record = []
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
        record.append(f"{name},sha256={digest},{len(content)}")
    (info / "RECORD").write_text("\n".join([*record, f"{info.name}/RECORD,,"]))


@pytest.fixture
def site(monkeypatch, tmp_path):
    """A folder that this project is installed in, as `installation` does it."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(doctor, "DISTRIBUTION", "ldit-installed")
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    installation(tmp_path, "ldit-installed", {"kernels/__init__.py": b"ours", "launch/x.py": b"x", "vavae/y.py": b"y"})
    return tmp_path


def test_files_that_are_not_as_they_were_installed_are_a_problem(site, monkeypatch):
    assert doctor.altered_files() == []
    (site / "kernels/__init__.py").write_text("theirs")
    (site / "vavae/y.py").unlink()
    row = rows(doctor.own_rows())["files"]
    assert row.ok is False and row.value == "2 altered"
    assert "kernels/__init__.py" in row.note and "vavae/y.py" in row.note and "launch/x.py" not in row.note
    monkeypatch.setattr(doctor, "ROOT", site / "checkout")  # that installation is not what runs
    assert doctor.altered_files() == []


def test_the_public_distribution_of_that_name_is_mentioned(site, monkeypatch):
    assert f"the other {doctor.NAMESAKE}" not in rows(doctor.own_rows())
    monkeypatch.setattr(doctor, "NAMESAKE", "ldit-namesake")
    installation(site / "theirs", "ldit-namesake", {})
    monkeypatch.syspath_prepend(site / "theirs")
    row = rows(doctor.own_rows())["the other ldit-namesake"]
    assert row.value == "1.2" and row.ok is None and "same name" in row.note


def test_an_installation_without_sources_has_the_extension_or_not(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    (tmp_path / "kernels").mkdir()
    row = doctor.extension_row([])
    assert row.value == "not installed" and "setup.py" not in row.note and "--no-build-isolation" in row.note
    extension = tmp_path / "kernels" / "_cuda.cpython-311-x86_64-linux-gnu.so"
    extension.touch()
    assert doctor.extension_row(["nvcc"]) == doctor.Row("cuda extension", "installed", str(extension))


def test_optional_packages_are_found_without_being_imported(tmp_path, monkeypatch):
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("raise RuntimeError('imported')")
    info = tmp_path / "flash_attn-9.8.7.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn\nVersion: 9.8.7\n")
    quack = tmp_path / "quack_kernels-1.2.dist-info"  # installed, its module gone
    quack.mkdir()
    (quack / "METADATA").write_text("Metadata-Version: 2.1\nName: quack-kernels\nVersion: 1.2\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(doctor, "findable", lambda name: name == "flash_attn" and _really_findable(name))
    found = rows(doctor.optional_rows())
    assert found["flash_attn"].value == "9.8.7" and "flash_attn" not in sys.modules
    assert found["quack"].value == "not found" and "1.2 is installed but" in found["quack"].note
    assert all(row.ok is None for row in found.values())  # none is required


_really_findable = doctor.findable


def test_findable():
    assert doctor.findable("json.decoder")
    assert not doctor.findable("no_such_module") and not doctor.findable("no_such_package.module")


def test_no_compilers(empty_machine):
    found = rows(doctor.compiler_rows())
    assert {found[name].value for name in ("g++", "nvcc", "ninja", "cuda headers")} == {"not found"}
    assert found["cuda extension"].value == "cannot be built: no g++, nvcc, ninja, CUDA library headers"


def test_all_compilers(empty_machine, tmp_path):
    program(empty_machine / "g++", "g++ (Debian 12.2.0-14) 12.2.0\nCopyright (C) 2022")
    program(empty_machine / "ninja", "1.13.2.git.kitware")
    nvcc = "nvcc: NVIDIA (R) Cuda\nCuda compilation tools, release 13.0, V13.0.88\nBuild cuda_13.0.r13.0/compiler.1"
    program(tmp_path / "cuda" / "bin" / "nvcc", nvcc)  # not on PATH
    (tmp_path / "old" / "include").mkdir(parents=True)  # holds none of the headers
    headers = tmp_path / "cuda" / "include"
    headers.mkdir()
    for name in doctor.CUDA_HEADERS[1:]:
        (headers / name).touch()
    found = rows(doctor.compiler_rows())
    assert [found[name].value for name in ("g++", "nvcc", "ninja")] == ["12.2.0", "13.0.88", "1.13.2"]
    assert found["cuda headers"].note == f"lacks {doctor.CUDA_HEADERS[0]}"
    assert found["cuda extension"].value == "cannot be built: no CUDA library headers"
    (headers / doctor.CUDA_HEADERS[0]).touch()
    assert rows(doctor.compiler_rows())["cuda extension"].value == "can be built"


def test_ops_rows_are_the_table_and_a_broken_registry_is_a_problem(monkeypatch):
    import kernels

    table = {"swiglu": {"backend": "reference", "reason": "not cuda: no GPU"}}
    bundle = type("Bundle", (), {"table": lambda self: table})()
    monkeypatch.setattr(kernels, "select", lambda backend: bundle, raising=False)
    assert doctor.op_rows() == [doctor.Row("swiglu", "reference", "not cuda: no GPU")]

    def broken(backend):
        raise ValueError("no such thing")

    monkeypatch.setattr(kernels, "select", broken)
    (row,) = doctor.op_rows()
    assert row.ok is False and "ValueError: no such thing" in row.note


def test_text_is_aligned_and_json_is_complete(capsys, monkeypatch):
    findings = {"a": [doctor.Row("x", "1", "one"), doctor.Row("longer", "22", "two", ok=True)], "b": []}
    monkeypatch.setattr(doctor, "examine", lambda: findings)
    assert doctor.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].index("one") == lines[3].index("two") and lines[3].startswith("✓ longer")
    assert lines[-1] == "everything required is here"
    assert doctor.main(["--json"]) == 0
    read = json.loads(capsys.readouterr().out)
    assert read == {"a": [vars(row) for row in findings["a"]], "b": []}


def test_on_this_machine_nothing_heavy_is_imported():
    """The real thing, in its own process: DeepSpeed and its like are looked up, never imported."""
    script = """
import sys
from launch.doctor import main
code = main(["--json"])
heavy = {"deepspeed", "timm", "torchvision", "sklearn", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
sys.exit(code)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=doctor.ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    findings = json.loads(done.stdout)
    assert {"torch", "deepspeed"} <= {row["name"] for row in findings["required packages"]}
    ops = findings["ops (backend that auto takes, and why)"]
    assert ops and all(row["value"] in ("reference", "library", "triton", "cuda") and row["note"] for row in ops)


def test_decoders_are_said_with_what_each_lacks(monkeypatch):
    found = rows(doctor.decoder_rows())
    assert list(found) == ["dali", "torchvision", "pil"] and all(row.ok is None for row in found.values())
    assert found["torchvision"].note == "auto takes it: the fastest without a GPU; no GPU: decodes on the CPU"
    assert found["pil"].value == metadata.version("pillow")
    monkeypatch.setattr("vavae.decoders.choice._dali_is_installed", lambda: False)
    missing = rows(doctor.decoder_rows())["dali"]
    assert "pip install 'lightningdit[dali]'" in missing.note
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    found = rows(doctor.decoder_rows())
    assert found["torchvision"].note.startswith("it does not decode on cuda: ")  # as there is none
    assert found["pil"].note.startswith("auto takes it: dali: nvidia-dali-cuda130 is not installed")
