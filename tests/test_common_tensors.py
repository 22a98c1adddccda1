"""Weights files of every kind people have: what is read, what is refused and how, and what is written."""

import argparse
import fractions
import logging
import os
import pickle
import stat
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from common.tensors import WeightsError, load_strict, read_entry, read_tensors, write_tensors

STATE = {"a.weight": torch.arange(6.0).view(3, 2), "a.bias": torch.tensor([1.0, -2.0, 0.5]), "n": torch.tensor(3)}
BESIDE = {
    "a command line": {"args": argparse.Namespace(lr=1e-4, path=Path("/data"))},
    "numpy scalars": {"best": np.float64(1.5), "step": np.int64(3), "flag": np.bool_(True)},
    "a numpy array": {"curve": np.arange(4.0)},
    "an optimizer": {"opt": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4}]}},
    "plain values": {"epoch": 3, "names": ["a"], "shape": (1, 2), "seen": {1, 2}, "size": torch.Size([2])},
    "a tensor": {"steps": torch.tensor(7)},
}
PREFIXES = ("", "module.", "_orig_mod.", "module._orig_mod.")


def same(found: dict) -> bool:
    return found.keys() == STATE.keys() and all(torch.equal(found[k], STATE[k]) for k in STATE)


class Payload:
    """Pickles to a call that would leave a trace."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return open, (str(self.trace), "w")


# --- what is read


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("wrap", [None, "state_dict", "model", "ema"])
def test_layouts(tmp_path, wrap, prefix, legacy):
    state = {prefix + key: value for key, value in STATE.items()}
    content = state if wrap is None else {wrap: state}
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)
    entry, found = read_entry(tmp_path / "w.pt", ("state_dict", "model", "ema"))
    assert entry == wrap and same(found)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("beside", BESIDE)
def test_what_other_programs_save_beside_tensors(tmp_path, beside, legacy):
    path = tmp_path / "w.ckpt"
    torch.save({"model": STATE, **BESIDE[beside]}, path, _use_new_zipfile_serialization=not legacy)
    assert same(read_tensors(path))


def test_the_first_entry_asked_for_is_taken(tmp_path):
    torch.save({"model": {k: v + 1 for k, v in STATE.items()}, "ema": STATE}, tmp_path / "w.pt")
    assert same(read_tensors(tmp_path / "w.pt", ("ema", "model")))
    assert not same(read_tensors(tmp_path / "w.pt", ("model", "ema")))


@pytest.mark.parametrize("prefix", PREFIXES)
def test_safetensors(tmp_path, prefix):
    save_file({prefix + key: value for key, value in STATE.items()}, tmp_path / "w.safetensors")
    assert same(read_tensors(tmp_path / "w.safetensors"))


# --- what is refused: in one sentence that names the file, and without torch's advice to switch safety off


def _fifo(path):
    os.mkfifo(path)


def _cut(path):
    torch.save(STATE, path)
    path.write_bytes(path.read_bytes()[:-200])


def _compressed(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**7))


def _zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"x")


def _script(path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(path)


REFUSED = {
    "absent": (lambda path: None, "does not exist"),
    "pipe": (_fifo, "named pipe"),
    "folder": (Path.mkdir, "a directory"),
    "LFS pointer": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "Git LFS"),
    "web page": (lambda p: p.write_text("\n<!DOCTYPE html><html></html>"), "web page"),
    "text": (lambda p: p.write_text("hello"), "damaged, or no file that torch.save wrote"),
    "empty": (lambda p: p.write_bytes(b""), "damaged"),
    "cut short": (_cut, "damaged"),
    "compressed": (_compressed, "unpacks to 10,000,000"),
    "other archive": (_zip, "damaged"),
    "program": (_script, "TorchScript"),
    "plain pickle": (lambda p: p.write_bytes(pickle.dumps(STATE)), "damaged|holds"),
    "list": (lambda p: torch.save([1, 2], p), "holds list, not tensors by name"),
    "nothing": (lambda p: torch.save({}, p), "it has nothing"),
    "no tensors": (lambda p: torch.save({"opt": {"lr": 1}}, p), "it has 'opt'"),
    "object": (lambda p: torch.save({"m": STATE, "x": fractions.Fraction(1)}, p), "an object of fractions.Fraction"),
    "formatter": (lambda p: torch.save({"m": STATE, "x": logging.Formatter()}, p), "an object of logging.Formatter"),
    "twice": (lambda p: torch.save({"a": torch.ones(1), "module.a": torch.ones(1)}, p), "has a twice"),
    "sparse": (lambda p: torch.save({"a": torch.eye(3).to_sparse()}, p), "a is torch.sparse_coo"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*TorchScript")
@pytest.mark.parametrize("kind", REFUSED)
def test_refused(tmp_path, kind):
    make, why = REFUSED[kind]
    make(tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=why) as error:
        read_tensors(tmp_path / "w.pt")
    assert "w.pt" in str(error.value) and "weights_only" not in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_holds_itself_is_refused(tmp_path):
    content = {"epoch": 3}
    content["model"] = content
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r"w\.pt has no tensors by name"):
        read_tensors(tmp_path / "w.pt")


def test_keys_that_are_no_names_are_left_out(tmp_path):
    torch.save({"model": {1: torch.zeros(1)} | STATE}, tmp_path / "w.pt")
    assert same(read_tensors(tmp_path / "w.pt"))


@pytest.mark.parametrize("legacy", [False, True])
def test_no_code_of_a_file_is_run(tmp_path, legacy):
    for number, content in enumerate(({"model": STATE, "x": Payload(tmp_path / "trace")}, Payload(tmp_path / "trace"))):
        path = tmp_path / f"{number}.pt"
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(WeightsError, match="no code of a file is run"):
            read_tensors(path)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Payload(tmp_path / "trace")))
    with pytest.raises(WeightsError):
        read_tensors(tmp_path / "bare.pt")
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("header", [b"[]", b"{", b"\xff", b"[" * 10_000, b'{"a":{"dtype":"F32","shape":[3]}}',
                                    b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,99]}}'])  # fmt: skip
def test_a_damaged_safetensors_header_is_named(tmp_path, header):
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(WeightsError, match=r"w\.safetensors is damaged or truncated"):
        read_tensors(tmp_path / "w.safetensors")


# --- strict loading


def layer() -> torch.nn.Module:
    return torch.nn.BatchNorm1d(2)


@pytest.mark.parametrize("change, what", [
    ({"weight": torch.tensor([1.0, float("nan")])}, "1 not finite: weight"),
    ({"running_var": torch.tensor([float("inf"), 1.0])}, "1 not finite: running_var"),
    ({"weight": torch.ones(3)}, r"1 of another shape: weight \[3\] where the model has \[2\]"),
    ({"bias": torch.ones(2, dtype=torch.int8)}, r"1 of another dtype: bias torch\.int8"),
    ({"bias": torch.ones(2, dtype=torch.complex64)}, r"1 of another dtype: bias torch\.complex64"),
    ({"extra": torch.ones(1)}, "1 unexpected: extra"),
    ({"weight": None}, "1 missing: weight"),
])  # fmt: skip
def test_what_does_not_fit_is_named_and_changes_nothing(change, what):
    module = layer()
    state = {k: v for k, v in (module.state_dict() | change).items() if v is not None}
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(WeightsError, match=f"these weights does not fit: {what}"):
        load_strict(module, state, "these weights")
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_another_real_dtype_is_converted(dtype):
    module = layer()
    load_strict(module, module.state_dict() | {"weight": torch.tensor([0.5, 2.0], dtype=dtype)}, "x")
    assert module.weight.tolist() == [0.5, 2.0] and module.weight.dtype == torch.float32


# --- what is written


def test_written_files_are_read_by_the_library(tmp_path):
    tensors = STATE | {"half": torch.randn(3, 5).half(), "b": torch.randn(7).bfloat16(), "flags": torch.tensor([True]),
                       "empty": torch.zeros(0, 4), "view": torch.arange(12.0).view(3, 4).t()}  # fmt: skip
    before = os.umask(0o022)
    try:
        write_tensors(tmp_path / "w.safetensors", tensors)
    finally:
        os.umask(before)
    found = load_file(tmp_path / "w.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in tensors.items())
    with safe_open(tmp_path / "w.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt"}
    assert stat.S_IMODE((tmp_path / "w.safetensors").stat().st_mode) == 0o644


def test_equal_tensors_give_equal_files(tmp_path):
    for name in ("a", "b"):
        write_tensors(tmp_path / name, STATE, {"z": "1", "y": "2", "x": "3"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
