"""Weights files of every kind people have: what is read, what is refused and how, and what is written."""

import argparse
import collections
import datetime
import fractions
import gzip
import json
import logging
import os
import pickle
import stat
import zipfile
from functools import partial
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
    "numpy texts and dates": {
        "name": np.str_("a"),
        "raw": np.bytes_(b"a"),
        "day": np.datetime64("2026-01-31"),
        "took": np.timedelta64(3, "s"),
        "names": np.array(["a", "bc"]),
    },
    "numpy arrays": {"curve": np.arange(4.0), "waves": np.array([1j]), "small": np.array([1], np.complex64)},
    "dates": {
        "at": datetime.datetime.now(datetime.UTC),
        "day": datetime.date(2026, 1, 31),
        "took": datetime.timedelta(seconds=3),
    },
    "dictionaries": {
        "counts": collections.defaultdict(int, {"a": 1}),
        "lists": collections.defaultdict(list, a=[1]),
        "empty": collections.defaultdict(float),
        "letters": collections.Counter("aab"),
        "kinds": [int, str],
        "names": frozenset({"a"}),
    },
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


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.bin", "w"])
@pytest.mark.parametrize("save", [torch.save, partial(torch.save, _use_new_zipfile_serialization=False), save_file])
def test_a_file_is_what_it_holds_whatever_its_name(tmp_path, name, save):
    save(STATE, tmp_path / name)
    assert same(read_tensors(tmp_path / name))


# --- what is refused: in one sentence that names the file, and without torch's advice to switch safety off


def _fifo(path):
    os.mkfifo(path)


def _cut(path):
    torch.save(STATE, path)
    path.write_bytes(path.read_bytes()[:-200])


def _cut_legacy(path):
    torch.save(STATE, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-20])


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
    "web page with a mark": (lambda p: p.write_text("<!DOCTYPE html><html></html>", "utf-8-sig"), "web page"),
    "web page of 16 bits": (lambda p: p.write_text("<html></html>", "utf-16"), "web page"),
    "web page without its head": (lambda p: p.write_text("<!-- cached --><body>"), "web page"),
    "XML page": (lambda p: p.write_text('<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>'), "or XML"),
    "text": (lambda p: p.write_text("Entry not found"), "is text, no file of tensors: it begins with 'Entry not f"),
    "long text": (lambda p: p.write_text("é" * 500), "is text"),
    "JSON": (lambda p: p.write_text('{"error": "gone"}'), "is text, .*gone"),
    "empty": (lambda p: p.write_bytes(b""), "is empty"),
    "noise": (lambda p: p.write_bytes(np.random.default_rng(0).bytes(300)), "is damaged"),
    "compressed by gzip": (lambda p: p.write_bytes(gzip.compress(bytes(9))), "gzip: unpack it"),
    "HDF5": (lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)), "an HDF5 file"),
    "npz": (lambda p: np.savez(p.open("wb"), a=np.zeros(3)), r"that torch.save did not write; it holds a\.npy"),
    "cut short": (_cut, "damaged"),
    "compressed": (_compressed, "unpacks to 10,000,000"),
    "other archive": (_zip, "damaged"),
    "program": (_script, "TorchScript"),
    "plain pickle": (lambda p: p.write_bytes(pickle.dumps(STATE)), "a pickle that torch.save did not write"),
    "old plain pickle": (lambda p: p.write_bytes(pickle.dumps(STATE, 2)), "a pickle that torch.save did not write"),
    "later protocol": (lambda p: torch.save(STATE, p, pickle_protocol=4), "by a protocol that is not read"),
    "legacy, cut short": (_cut_legacy, "is damaged"),
    "list": (lambda p: torch.save([1, 2], p), "holds list, not tensors by name"),
    "nothing": (lambda p: torch.save({}, p), "it has nothing"),
    "no tensors": (lambda p: torch.save({"opt": {"lr": 1}}, p), "it has 'opt'"),
    "object": (lambda p: torch.save({"m": STATE, "x": fractions.Fraction(1)}, p), "an object of fractions.Fraction"),
    "formatter": (lambda p: torch.save({"m": STATE, "x": logging.Formatter()}, p), "an object of logging.Formatter"),
    "numpy objects": (lambda p: torch.save({"m": STATE, "x": np.array([{}])}, p), "an object of numpy.dtypes.ObjectD"),
    "class": (lambda p: torch.save({"m": STATE, "x": fractions.Fraction}, p), "an object of fractions.Fraction"),
    "twice": (lambda p: torch.save({"a": torch.ones(1), "module.a": torch.ones(1)}, p), "has a twice"),
    "sparse": (lambda p: torch.save({"a": torch.eye(3).to_sparse()}, p), "a is torch.sparse_coo"),
    "packed": (lambda p: torch.save({"a": torch.zeros(2, dtype=torch.bits2x4)}, p), "a is .*torch.bits2x4"),
    "packed floats": (lambda p: torch.save({"a": torch.empty(2, dtype=torch.float4_e2m1fn_x2)}, p), "a is .*float4"),
}


@pytest.mark.filterwarnings("ignore:.*TorchScript")
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize("kind", REFUSED)
def test_refused(tmp_path, kind, name, recwarn):
    make, why = REFUSED[kind]
    make(tmp_path / name)
    recwarn.clear()
    with pytest.raises(WeightsError, match=why) as error:
        read_tensors(tmp_path / name)
    assert name in str(error.value) and "weights_only" not in str(error.value) and "\n" not in str(error.value)
    assert not recwarn.list


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


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{",
        b"\xff",
        b"[" * 10_000,
        b'{"a":{"dtype":"F32","shape":[3]}}',
        b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,99]}}',
    ],
)
def test_a_damaged_safetensors_header_is_named(tmp_path, header):
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(WeightsError, match=r"w\.safetensors is damaged or truncated"):
        read_tensors(tmp_path / "w.safetensors")


# --- strict loading


def layer() -> torch.nn.Module:
    return torch.nn.BatchNorm1d(2)


@pytest.mark.parametrize(
    "change, what",
    [
        ({"weight": torch.tensor([1.0, float("nan")])}, "1 not finite: weight"),
        ({"running_var": torch.tensor([float("inf"), 1.0])}, "1 not finite: running_var"),
        ({"weight": torch.ones(3)}, r"1 of another shape: weight \[3\] where the model has \[2\]"),
        ({"bias": torch.ones(2, dtype=torch.int8)}, r"1 of another dtype: bias torch\.int8"),
        ({"bias": torch.ones(2, dtype=torch.complex64)}, r"1 of another dtype: bias torch\.complex64"),
        ({"extra": torch.ones(1)}, "1 unexpected: extra"),
        ({"weight": None}, "1 missing: weight"),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(change, what):
    module = layer()
    state = {k: v for k, v in (module.state_dict() | change).items() if v is not None}
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(WeightsError, match=f"these weights does not fit: {what}"):
        load_strict(module, state, "these weights")
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


SMALL = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, *SMALL.values()])
def test_another_real_dtype_is_converted(tmp_path, dtype):
    module = layer()
    torch.save({"w": torch.tensor([0.5, 2.0]).to(dtype)}, tmp_path / "w.pt")
    load_strict(module, module.state_dict() | {"weight": read_tensors(tmp_path / "w.pt")["w"]}, "x")
    assert module.weight.tolist() == [0.5, 2.0] and module.weight.dtype == torch.float32
    spoilt = torch.tensor([0.5, float("nan")]).to(dtype)
    with pytest.raises(WeightsError, match="1 not finite: weight"):
        load_strict(module, module.state_dict() | {"weight": spoilt}, "x")


@pytest.mark.parametrize("name", SMALL)
def test_floats_of_8_bits_of_a_safetensors_file_are_read(tmp_path, name):
    bits = torch.tensor([0.5, 2.0]).to(SMALL[name]).view(torch.uint8).numpy().tobytes()
    header = json.dumps({"a": {"dtype": name, "shape": [2], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bits)
    assert read_tensors(tmp_path / "w.safetensors")["a"].float().tolist() == [0.5, 2.0]


# --- what is written


def test_written_files_are_read_by_the_library(tmp_path):
    tensors = STATE | {
        "half": torch.randn(3, 5).half(),
        "b": torch.randn(7).bfloat16(),
        "flags": torch.tensor([True]),
        "empty": torch.zeros(0, 4),
        "view": torch.arange(12.0).view(3, 4).t(),
    }
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
