"""Shards of latents: a safetensors header, parsed and checked, and what the tensors of a shard hold.

A shard has `latents` and `latents_flip` (of the mirrored images) [N, S, H, W], both float32, float16 or bfloat16, and
`labels` [N] int64. S is the number of channels C; where the metadata say `store: moments`, it is 2·C: the posterior's
means, then its standard deviations.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, get_args

import numpy as np
import torch
from pydantic import TypeAdapter

from common.files import FileError, open_regular, refuse_placeholders
from common.records import Record
from lightningdit.latents import Count, LatentsError, Store

MAX_HEADER_BYTES = 2**20  # the header of a shard has some hundred
STORED = ("latents", "latents_flip")
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Shard:
    """A shard of `count` latents of `shape` (C, H, W); `offsets`: the byte in the file at which each tensor begins."""

    path: Path
    count: int
    shape: tuple[int, int, int]
    store: Store
    dtype: torch.dtype
    offsets: dict[str, int]

    @classmethod
    def read(cls, path: Path) -> "Shard":
        """Parse the safetensors header; raises LatentsError where the file is truncated or no shard of latents."""
        with open_shard(path) as f:
            size = os.fstat(f.fileno()).st_size
            begin = f.read(8)
            length = int.from_bytes(begin, "little")
            if size < 8 or 8 + length > size:
                refuse_placeholders(path, begin + f.read(100))
                raise LatentsError(f"{path} is truncated: {size:,} bytes do not hold its header")
            if length > MAX_HEADER_BYTES:
                raise LatentsError(f"{path} is not a latents shard: its header has {length:,} bytes")
            text = f.read(length)
        store, header = _parse_header(path, text)
        if size != (needed := 8 + length + max((entry.data_offsets[1] for entry in header.values()), default=0)):
            raise LatentsError(f"{path} is truncated or damaged: {size:,} bytes where its header asks for {needed:,}")
        return cls._of_header(path, store, header, 8 + length)

    @classmethod
    def _of_header(cls, path: Path, store: Store, header: "dict[str, HeaderEntry]", data: int) -> "Shard":
        """data: the byte of the file at which the tensors' begin."""
        found = {name: header[name].dtype if name in header else None for name in (*STORED, "labels")}
        stored = found["latents"]
        if stored not in _DTYPES or found != {"latents": stored, "latents_flip": stored, "labels": "I64"}:
            raise LatentsError(
                f"{path} holds {_describe(header)}; a latents shard has latents and latents_flip, both as "
                f"{', '.join(_DTYPES)}, and labels as I64"
            )
        if store not in get_args(Store):
            raise LatentsError(f"{path} stores {store!r} of each image; known are {', '.join(get_args(Store))}")
        dtype, entries = _DTYPES[stored], {name: header[name] for name in (*STORED, "labels")}
        offsets = {name: data + entry.data_offsets[0] for name, entry in entries.items()}
        shape, flipped, labels = (entry.shape for entry in entries.values())
        sizes = [end - start for start, end in (entry.data_offsets for entry in entries.values())]
        values = [dtype.itemsize * math.prod(shape), dtype.itemsize * math.prod(flipped), 8 * math.prod(labels)]
        if len(shape) != 4 or 0 in shape or shape != flipped or labels != shape[:1] or sizes != values:
            raise LatentsError(f"{path} holds {_describe(entries)}: these do not fit together")
        if any(offset % dtype.itemsize for offset in offsets.values()):
            raise LatentsError(
                f"{path} has tensors that begin at bytes {offsets}, not at multiples of {dtype.itemsize}: load and "
                "save it again with safetensors 0.3 or later"
            )
        channels, height, width = shape[1:]
        if store == "moments" and channels % 2:
            raise LatentsError(f"{path} has {channels} channels: means and standard deviations are as many of each")
        shape = (channels // parts_of(store), height, width)
        return cls(path, labels[0], shape, store, dtype, offsets)

    @property
    def row_bytes(self) -> int:
        """Bytes of what is stored of one image."""
        return self.dtype.itemsize * parts_of(self.store) * math.prod(self.shape)

    def stored(self, name: str = "latents") -> torch.Tensor:
        """`latents` or `latents_flip` as they are stored, [N, S, H, W], read into memory."""
        channels, *sides = self.shape
        content = self._content(name, self.count * self.row_bytes)
        return content.view(self.dtype).view(self.count, parts_of(self.store) * channels, *sides)

    def labels(self) -> torch.Tensor:
        """Labels [N] int64, read into memory."""
        return self._content("labels", 8 * self.count).view(torch.int64)

    def _content(self, name: str, size: int) -> torch.Tensor:
        with open_shard(self.path) as f:
            f.seek(self.offsets[name])
            return torch.from_numpy(np.fromfile(f, np.uint8, size))


def parts_of(store: Store) -> int:
    """Numbers that are stored for each of a latent: 2 of moments, else 1."""
    return 2 if store == "moments" else 1


def open_shard(path: Path) -> BinaryIO:
    """Open a shard for reading; raises LatentsError where it is no regular file."""
    try:
        return open_regular(path)
    except FileError as e:
        raise LatentsError(str(e)) from None


class HeaderEntry(Record):
    """A tensor in a safetensors header."""

    dtype: str
    shape: tuple[Count, ...]
    data_offsets: tuple[Count, Count]


_HEADER = TypeAdapter(dict[str, HeaderEntry])


def _parse_header(path: Path, text: bytes) -> "tuple[Store, dict[str, HeaderEntry]]":
    """What is stored, of the metadata, and the tensors; published metadata do not say the former: samples."""
    try:
        content = json.loads(text)
        metadata = content.pop("__metadata__", None) or {}
        return metadata.get("store", "sample"), _HEADER.validate_json(json.dumps(content))
    except (ValueError, RecursionError, AttributeError):
        raise LatentsError(f"{path} is damaged: its safetensors header cannot be read") from None


def _describe(entries: "dict[str, HeaderEntry]") -> str:
    return ", ".join(f"{name} {e.dtype} {list(e.shape)}" for name, e in entries.items()) or "no tensors"
