"""Tars of samples for tests, packed and read back by Python's tarfile."""

import io
import tarfile
from pathlib import Path


def pack(path: Path, members, format=tarfile.PAX_FORMAT) -> Path:
    """A tar of (name, content); content is bytes, or changes that make another kind of member."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, dict):
                for key, value in content.items():
                    setattr(member, key, value)
                content = b""
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def sample(key: str, label=None, ending="jpg", size=700):
    """The members of one image, whose content no other has."""
    label = [] if label is None else [(f"{key}.cls", str(label).encode())]
    return [(f"{key}.{ending}", (f"{key}.{ending} " * size)[:size].encode()), *label]


def content(tar: Path, name: str) -> bytes:
    with tarfile.open(tar) as file:
        return file.extractfile(name).read()


def shards(folder: Path, count=3, each=4) -> list[Path]:
    """`s-000.tar` …; labels count from 0 over all images."""
    return [
        pack(
            folder / f"s-{shard:03d}.tar",
            [m for i in range(each) for m in sample(f"{shard}{i}", shard * each + i, size=500 + 100 * i)],
        )
        for shard in range(count)
    ]
