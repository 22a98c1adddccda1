"""Files of tensors: reading without running code, strict loading into modules, writing safetensors.

Both models read the same kinds of file, told by their content and not by their name: safetensors, or what `torch.save`
wrote of tensors by name, at the top or under an entry such as `ema`, `model` or `state_dict`.
"""

import argparse
import datetime
import json
import pathlib
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy._core import multiarray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from common.file_types import LEGACY_TORCH, describe_content, is_safetensors
from common.files import FileError, HashingWriter, atomic_write, open_regular, refuse_placeholders

Tensors = dict[str, torch.Tensor]


def _fresh_dict(factory: Any = None) -> dict:
    """In place of a defaultdict, which torch makes and does not fill."""
    return {}


#: What other programs save beside tensors and that only holds values: command lines, paths, dates, NumPy's numbers.
_SAFE_GLOBALS: list[Any] = [
    argparse.Namespace,
    OrderedDict,
    (_fresh_dict, "collections.defaultdict"),
    *(set, frozenset, list, dict, tuple, int, float, bool, str, complex),
    pathlib.PosixPath,
    pathlib.PurePosixPath,
    datetime.date,
    datetime.datetime,
    datetime.timedelta,
    datetime.timezone,
    (pathlib.PosixPath, "pathlib._local.PosixPath"),
    np.dtype,
    np.ndarray,
    multiarray._reconstruct,
    (multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),
    (multiarray.scalar, "numpy.core.multiarray.scalar"),
    multiarray.scalar,
    *{type(np.dtype(kind)) for kind in "?bhilqBHILQefdFDUSMm"},
]
#: Names of the weights in a folder where diffusers keeps a model: the first that is there.
FOLDER_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
_WRAPPERS = ("module.", "_orig_mod.")  # of data-parallel wrapping and of torch.compile
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
#: Several numbers in one, or none: torch can do nothing with them.
_PACKED = {torch.float4_e2m1fn_x2, torch.bits8, torch.bits16, torch.bits1x8, torch.bits2x4, torch.bits4x2}
_MODEL_KEYS = {"LightningDiT": "x_embedder.proj.weight", "tokenizer": "encoder.conv_in.weight"}
_MAX_NAMED = 5  # keys in a message
_MAX_DEPTH = 4  # entries inside one another; a file may hold itself


class WeightsError(FileError):
    """A weights file that cannot be read, or does not fit; the message names it."""


def read_tensors(path: Path | str, entries: Iterable[str] = ("state_dict", "model", "ema")) -> Tensors:
    """The tensors of a weights file by name, on the CPU; prefixes left by wrappers are dropped.

    Args:
        path: `.safetensors`, or a file of `torch.save` in its present or its legacy (before 1.6) format; or a folder as
            `weights_file` takes it.
        entries: of a file that holds several mappings, the first of these that it has. A file that holds tensors by
            name itself has no entries.

    Raises:
        WeightsError: no such file, a broken one, one with objects other than tensors and plain values (nothing of it is
            run), or without tensors under any of `entries`.
    """
    return read_entry(path, entries)[1]


def weights_file(path: Path | str) -> Path:
    """The weights file that a path stands for: in a folder where diffusers keeps a model that model's, else `path`."""
    named = (Path(path) / name for name in FOLDER_WEIGHTS)
    return next((file for file in named if file.is_file()), Path(path))


def is_downloaded(url: str) -> bool:
    """Whether the folder where torch.hub keeps its downloads has what is at a URL."""
    return (Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]).is_file()


def read_entry(path: Path | str, entries: Iterable[str]) -> tuple[str | None, Tensors]:
    """As `read_tensors`, and which entry the tensors are of: None where the file holds them by name itself."""
    path, entries, entry = weights_file(path), tuple(entries), None
    found = content = _load(path)
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path} holds {type(content).__name__}, not tensors by name")
    for _ in range(_MAX_DEPTH):
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
        refuse_placeholders(path, begin)
    except FileError as e:
        raise WeightsError(str(e)) from None
    archive = zipfile.is_zipfile(path)
    by_torch = archive or LEGACY_TORCH in begin
    if is_safetensors(begin) or (path.suffix == ".safetensors" and not by_torch):
        return _load_safetensors(path, begin)
    try:
        if archive:
            _check_archive(path)
        with torch.serialization.safe_globals(_SAFE_GLOBALS), warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=archive or None)
    except WeightsError:
        raise
    except Exception as e:  # torch raises many kinds on a damaged file
        neither = "is damaged, or neither a safetensors file nor one that torch.save wrote"
        raise WeightsError(f"{path} {_why_unread(e, by_torch) or describe_content(begin) or neither}") from e


def _load_safetensors(path: Path, begin: bytes) -> Tensors:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as e:
        other = None if is_safetensors(begin) else describe_content(begin)
        raise WeightsError(f"{path} {other or f'is damaged or truncated: {e}'}") from None


def check_safetensors(path: Path) -> None:
    """Raise WeightsError where a file has no header of safetensors that fits its size; values are not read."""
    try:
        with safe_open(path, "pt"):
            pass
    except (SafetensorError, OSError) as e:
        raise WeightsError(f"{path} is damaged or truncated: {e}") from None


def _why_unread(error: Exception, by_torch: bool) -> str | None:
    """The reason in torch's error, without its advice to switch safety off; None where it has none."""
    if not by_torch:
        return None
    if not isinstance(error, pickle.UnpicklingError):
        return "is damaged"
    text = str(error)
    if found := re.search(r"(?:GLOBAL |got <class '|function <class '|function <function )([\w.]+)", text):
        return (
            f"holds an object of {found[1]}; only tensors and plain values are read, so that no code of a file is run"
        )
    if "DTensors" in text or "NJTs" in text:
        return "holds tensors that are spread over devices, or nested; only plain dense tensors are read"
    if "Unsupported operand" in text:
        return "is pickled by a protocol that is not read: torch.save(…, pickle_protocol=2) writes one that is"
    return "is damaged, or holds other than tensors and plain values"


def _check_archive(path: Path) -> None:
    """Refuse archives that torch.save did not write: it does not compress, so they never unpack to more bytes."""
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
    unpacked, size = sum(info.file_size for info in infos), path.stat().st_size
    if unpacked > size:
        raise WeightsError(f"{path} has {size:,} bytes and unpacks to {unpacked:,}: torch.save writes no such file")
    names = {info.filename.rpartition("/")[2] for info in infos}
    if "data.pkl" not in names:
        raise WeightsError(f"{path} is a ZIP archive that torch.save did not write; it holds {_some(sorted(names))}")
    if "constants.pkl" in names:
        raise WeightsError(f"{path} is a TorchScript archive, a program; only files of tensors are read")


def _unwrap(path: Path, tensors: Tensors) -> Tensors:
    unwrapped: Tensors = {}
    for name, value in tensors.items():
        key = name
        while key.startswith(_WRAPPERS):
            key = key.partition(".")[2]
        if key in unwrapped:
            raise WeightsError(f"{path} has {key} twice, once as {name}")
        odd = value.layout != torch.strided or value.is_quantized or value.dtype in _PACKED
        if odd or value.device.type != "cpu":
            raise WeightsError(
                f"{path}: {name} is {value.layout} of {value.dtype} on {value.device}; only plain dense "
                "tensors are read"
            )
        unwrapped[key] = value.detach()  # of a parameter
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
        "not finite": [key for key in fits if not (tensors[key].is_meta or _is_finite(tensors[key]))],
    }
    if any(problems.values()):
        parts = [f"{len(keys)} {what}: {_some(keys)}" for what, keys in problems.items() if keys]
        raise WeightsError(f"{source} does not fit: {'; '.join(parts)}")
    module.load_state_dict(tensors)


def _is_finite(value: torch.Tensor) -> bool:
    """torch's isfinite knows no float of 8 bits."""
    return bool(torch.isfinite(value.float() if value.is_floating_point() and value.itemsize == 1 else value).all())


def model_of(keys: Iterable[str]) -> str | None:
    """The model whose parameters have these names (without wrappers): "LightningDiT", "tokenizer" or None."""
    keys = set(keys)
    return next((model for model, key in _MODEL_KEYS.items() if key in keys), None)


def _some(keys: Iterable[str]) -> str:
    keys = list(keys)
    more = f" and {len(keys) - _MAX_NAMED} more" if len(keys) > _MAX_NAMED else ""
    return (", ".join(keys[:_MAX_NAMED]) or "nothing") + more


@dataclass(frozen=True)
class TensorInParts:
    """A tensor to write that is never whole in memory: `parts()` yields its values, flat, in order and of its dtype.

    A part is written before the next one is asked for, and may share its memory.
    """

    dtype: torch.dtype
    shape: torch.Size
    parts: Callable[[], Iterator[torch.Tensor]]

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.itemsize


Writable = Mapping[str, torch.Tensor] | Mapping[str, torch.Tensor | TensorInParts]


def write_tensors(path: Path | str, tensors: Writable, metadata: Mapping[str, str] | None = None) -> dict:
    """Write a `.safetensors` file, whole or not at all (see `common.files.atomic_write`) → its bytes and SHA-256, as
    `common.files.file_entry` gives them.

    metadata: default {"format": "pt"}, which other libraries look for. Equal tensors give equal files.
    """
    with atomic_write(path) as f:
        hashing = HashingWriter(f)
        write_safetensors(hashing, tensors, metadata)
    return hashing.entry()


class _Writer(Protocol):
    def write(self, content: bytes | memoryview, /) -> Any: ...


def write_safetensors(f: _Writer, tensors: Writable, metadata: Mapping[str, str] | None = None) -> None:
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
    for name, value in ordered:
        written = 0
        for part in value.parts() if isinstance(value, TensorInParts) else (value,):
            content = part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
            f.write(content)
            written += content.nbytes
        if written != value.nbytes:
            raise RuntimeError(f"the parts of {name} have {written:,} bytes where it has {value.nbytes:,}")


def save_pickled(path: Path | str, content: Any) -> None:
    """`torch.save`, whole or not at all."""
    with atomic_write(path) as f:
        torch.save(content, f)


def as_float32(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Copies on the CPU, contiguous, in float32."""
    return {name: value.detach().cpu().float().contiguous() for name, value in tensors.items()}
