"""What made the images that are measured: the JSON beside them, changed by `--set`, and whether they fit it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.files import read_json, sha256
from common.sections import short
from launch.config_files import parse_value
from launch.evaluation.encoded_images import EncodedImages
from launch.evaluation.image_source import ImageSource, beside
from launch.evaluation.npz_file import NpzImages


def labels_beside(images: Path) -> Path | None:
    """`labels.npy` beside the `samples.json` of a folder of images, as `sample` writes it; None where there is none."""
    described = beside(images) if images.is_dir() else None
    path = None if described is None else described.with_name("labels.npy")
    return path if path is not None and path.is_file() else None


def read_metadata(
    path: Path | None, images: Path | None, settings: Sequence[str], taken: frozenset[str]
) -> dict[str, Any]:
    """The facts in the JSON that was named or lies beside the images, changed by `settings`.

    Args:
        settings: `key=value`, the value as in a run file.
        taken: keys that a result has itself.

    Raises ValueError for a file or setting that is none.
    """
    named, path = path is not None, path or (None if images is None else beside(images))
    facts = {} if path is None else read_json(path)
    if not isinstance(facts, dict):
        raise ValueError(f"{path} holds {type(facts).__name__}, not a JSON object")
    if "metrics" in facts:
        if named:
            raise ValueError(f"{path} is a result of evaluate; --metadata takes what made the images")
        facts = {}  # written beside them by --output
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise ValueError(f"--set {short(setting)} is not of the form key=value")
        if key in taken:
            raise ValueError(f"--set {short(setting)}: {key} is what evaluate itself finds out")
        facts[key] = parse_value(value, f"--set {short(setting)}")
        try:
            json.dumps(facts[key], allow_nan=False)
        except ValueError as e:
            raise ValueError(f"--set {short(setting)} is nothing that JSON can hold: {e}") from None
    return facts


def require_promised(images: ImageSource, metadata: Mapping[str, Any], expected: int | None) -> None:
    """Raise ValueError where there are more or fewer images than `expected`, or else than the metadata promise, or the
    file has another size than they say."""
    promised = metadata.get("num_samples") if expected is None else expected
    if isinstance(promised, int) and promised != len(images):
        by = "--expect says" if expected is not None else "the metadata beside them promise"
        accept = "" if expected is not None else f" (--expect {len(images)} takes them as they are)"
        raise ValueError(f"{images.description} holds {len(images):,} images, {by} {promised:,}{accept}")
    entry = metadata.get("npz")
    if not isinstance(images, NpzImages) or not isinstance(entry, Mapping) or not isinstance(entry.get("bytes"), int):
        return
    if (size := images.path.stat().st_size) != entry["bytes"]:
        raise ValueError(
            f"{images.description} has {size:,} bytes, and its description says {entry['bytes']:,}: it is not the file "
            "that was described"
        )


def require_described(images: ImageSource, metadata: Mapping[str, Any]) -> None:
    """Raise ValueError where the file has another SHA-256 than the metadata say; it is read for that as a whole."""
    entry = metadata.get("npz")
    if not isinstance(images, NpzImages) or not isinstance(entry, Mapping) or entry.get("sha256") is None:
        return
    if (found := sha256(images.path)) != entry["sha256"]:
        raise ValueError(
            f"{images.description} has SHA-256 {found}, and its description says {entry['sha256']}: it is not the file "
            "that was described"
        )


def repeatable(images: ImageSource, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata that a result may repeat: without the hash of a folder's files, which nobody has compared."""
    described = isinstance(images, EncodedImages) and isinstance(metadata.get("images"), Mapping)
    return {key: value for key, value in metadata.items() if not (described and key == "images")}
