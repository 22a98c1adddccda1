"""Tensors in files: read without running code, loaded strictly, written so that others can read them.

Both models read the same kinds of file: `.safetensors`, or what `torch.save` wrote (`.pt`, `.pth`, `.ckpt`) of tensors
by name, at the top or under an entry such as `ema`, `model` or `state_dict`.
"""

import argparse
import json
import pathlib
import pickle
import re
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from common.files import FileError, open_regular, refuse_stand_ins, replacing

Tensors = dict[str, torch.Tensor]

#: What other programs save beside tensors and that only holds values: command lines, paths, NumPy's numbers.
_HARMLESS = [
    argparse.Namespace, OrderedDict, defaultdict, set, pathlib.PosixPath, pathlib.PurePosixPath,
    (pathlib.PosixPath, "pathlib._local.PosixPath"), np.dtype, np.ndarray,
    np._core.multiarray._reconstruct, (np._core.multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"), np._core.multiarray.scalar,
    *{type(np.dtype(kind)) for kind in "?bhilqBHILQefd"},
]  # fmt: skip
_WRAPPERS = ("module.", "_orig_mod.")  # of data-parallel wrapping and of torch.compile
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_NAMED = 5  # keys in a message
_DEEPEST = 4  # entries inside one another; a file may hold itself


class WeightsError(FileError):
    """A weights file that cannot be read, or does not fit; the message names it."""


def read_tensors(path: Path | str, entries: Iterable[str] = ("state_dict", "model", "ema")) -> Tensors:
    """The tensors of a weights file by name, on the CPU; prefixes left by wrappers are dropped.

    Args:
        path: `.safetensors`, or a file of `torch.save` in its present or its legacy (before 1.6) format.
        entries: of a file that holds several mappings, the first of these that it has. A file that holds tensors by
            name itself has no entries.

    Raises:
        WeightsError: no such file, a broken one, one with objects other than tensors and plain values (nothing of it is
            run), or without tensors under any of `entries`.
    """
    return read_entry(path, entries)[1]


def read_entry(path: Path | str, entries: Iterable[str]) -> tuple[str | None, Tensors]:
    """As `read_tensors`, and which entry the tensors are of: None where the file holds them by name itself."""
    path, entries, entry = Path(path), tuple(entries), None
    found = content = _load(path)
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path} holds {type(content).__name__}, not tensors by name")
    for _ in range(_DEEPEST):
        inner = next((e for e in entries if isinstance(found.get(e), Mapping)), None)
        if inner is None:
            break
        entry, found = inner, found[inner]
    tensors = {key: value for key, value in found.items() if isinstance(key, str) and isinstance(value, torch.Tensor)}
    if not tensors:
        wanted = ", ".join(map(repr, entries))
        raise WeightsError(f"{path} has no tensors by name, nor an entry {wanted}; it has {_some(map(repr, found))}")
    return entry, _unwrap(path, tensors)


def _load(path: Path) -> Any:
    try:
        with open_regular(path) as f:
            begin = f.read(100)
        refuse_stand_ins(path, begin)
    except FileError as e:
        raise WeightsError(str(e)) from None
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        archive = zipfile.is_zipfile(path)
        if archive:
            _check_archive(path)
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=archive or None)
    except WeightsError:
        raise
    except pickle.UnpicklingError as e:
        if found := re.search(r"GLOBAL ([\w.]+)", str(e)):
            raise WeightsError(f"{path} holds an object of {found[1]}; only tensors and plain values are read, so that "
                               "no code of a file is run") from None
        raise WeightsError(f"{path} is damaged, or no file that torch.save wrote") from e
    except SafetensorError as e:
        raise WeightsError(f"{path} is damaged or truncated: {e}") from None
    except Exception as e:  # torch raises many kinds on a damaged file
        raise WeightsError(f"{path} is damaged, or no file that torch.save wrote") from e


def _check_archive(path: Path) -> None:
    """torch.save compresses nothing, so a file that unpacks to more than it has is none of its making."""
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
    unpacked, size = sum(info.file_size for info in infos), path.stat().st_size
    if unpacked > size:
        raise WeightsError(f"{path} has {size:,} bytes and unpacks to {unpacked:,}: torch.save writes no such file")
    if any(info.filename.endswith("/constants.pkl") for info in infos):
        raise WeightsError(f"{path} is a TorchScript archive, a program; only files of tensors are read")


def _unwrap(path: Path, tensors: Tensors) -> Tensors:
    unwrapped: Tensors = {}
    for name, value in tensors.items():
        key = name
        while key.startswith(_WRAPPERS):
            key = key.partition(".")[2]
        if key in unwrapped:
            raise WeightsError(f"{path} has {key} twice, once as {name}")
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            raise WeightsError(f"{path}: {name} is {value.layout} on {value.device}; only plain dense tensors are read")
        unwrapped[key] = value
    return unwrapped


def load_strict(module: nn.Module, tensors: Mapping[str, torch.Tensor], source: Path | str) -> None:
    """Load tensors that must be exactly the module's, and finite; `source` says whose they are in messages.

    Raises:
        WeightsError: naming `source` and the keys that are missing, unexpected, of another shape or dtype (whole or
            complex numbers for real ones), or hold NaN or infinity.
    """
    own = module.state_dict()
    both = [key for key in own if key in tensors]
    shapes = [key for key in both if tensors[key].shape != own[key].shape]
    fits = [key for key in both if tensors[key].shape == own[key].shape]
    kinds = [key for key in fits if own[key].is_floating_point() and not tensors[key].is_floating_point()]
    problems = {
        "missing": [key for key in own if key not in tensors],
        "unexpected": [key for key in tensors if key not in own],
        "of another shape": [f"{k} {list(tensors[k].shape)} where the model has {list(own[k].shape)}" for k in shapes],
        "of another dtype": [f"{k} {tensors[k].dtype} where the model has {own[k].dtype}" for k in kinds],
        "not finite": [key for key in fits if not (tensors[key].is_meta or torch.isfinite(tensors[key]).all())],
    }
    if any(problems.values()):
        parts = [f"{len(keys)} {what}: {_some(keys)}" for what, keys in problems.items() if keys]
        raise WeightsError(f"{source} does not fit: {'; '.join(parts)}")
    module.load_state_dict(tensors)


def _some(keys: Iterable[str]) -> str:
    keys = list(keys)
    more = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
    return (", ".join(keys[:_NAMED]) or "nothing") + more


def write_tensors(path: Path | str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None):
    """Write a `.safetensors` file, whole or not at all (see `common.files.replacing`).

    metadata: default {"format": "pt"}, which other libraries look for. Equal tensors give equal files.
    """
    with replacing(path) as f:
        write_safetensors(f, tensors, metadata)


def write_safetensors(f: BinaryIO, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None):
    """Write tensors (of any device) and metadata, in the given order, as a safetensors file; see `write_tensors`.

    The package's own writer shuffles metadata, makes files that only their owner can read, and does not say which file
    it could not write.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} if metadata is None else dict(metadata)}
    ordered, end = sorted(tensors.items(), key=lambda item: -item[1].itemsize), 0  # keeps every tensor aligned
    for name, value in ordered:
        start, end = end, end + value.nbytes
        header[name] = {"dtype": _DTYPES[value.dtype], "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    f.write(len(text).to_bytes(8, "little") + text)
    for _, value in ordered:
        f.write(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def save_pickled(path: Path | str, content: Any) -> None:
    """`torch.save`, whole or not at all."""
    with replacing(path) as f:
        torch.save(content, f)


def as_float32(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Copies on the CPU, contiguous, in float32."""
    return {name: value.detach().cpu().float().contiguous() for name, value in tensors.items()}

