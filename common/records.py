"""JSON files as typed records, validated when they are read, with a checksum over themselves where that matters."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from common.files import FileError, read_json, write_json
from common.sections import describe_problem

_CHECKSUM_KEY = "checksum"


class Record(BaseModel):
    """A part of a JSON file of ours, checked when it is read. Keys it does not know are kept: later versions add."""

    model_config = ConfigDict(frozen=True, strict=True, extra="allow", allow_inf_nan=False)


class FileRecord(Record):
    """A file as a manifest lists it."""

    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise ValueError("two classes of one name")
    return names


#: Names of classes, by label.
ClassNames = Annotated[tuple[str, ...], AfterValidator(_distinct)]
SomeRecord = TypeVar("SomeRecord", bound=Record)


def write_checksummed(path: Path | str, content: dict[str, Any]) -> None:
    """Write JSON with a checksum over itself, which `read_record` compares; see `common.files.atomic_write`."""
    write_json(path, content | {_CHECKSUM_KEY: _checksum(content)})


def _checksum(content: dict[str, Any]) -> str:
    text = json.dumps({key: value for key, value in content.items() if key != _CHECKSUM_KEY}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_record(path: Path | str, record: type[SomeRecord]) -> SomeRecord:
    """A JSON file as a record; raises FileError, naming the file and the key, where it does not validate.

    Where it was written by `write_checksummed`, every value is as it was written.
    """
    content = read_json(path)
    if isinstance(content, dict) and _CHECKSUM_KEY in content and content.pop(_CHECKSUM_KEY) != _checksum(content):
        raise FileError(
            f"{path} is damaged, or was edited: its checksum is another (take {_CHECKSUM_KEY!r} out after editing)"
        )
    try:
        # From JSON, where a list may stand for a tuple; strict otherwise.
        return record.model_validate_json(json.dumps(content))
    except (ValidationError, ValueError) as e:
        raise FileError(f"{path} is damaged: {_first_problem(e)}") from None


class _Kind(Record):
    kind: str


def require_kind(path: Path | str, kind: str) -> None:
    """Raise FileError where the JSON beside weights is not of this kind: "lightningdit", "vavae" or "foundation"."""
    if (found := read_record(path, _Kind).kind) != kind:
        raise FileError(f"{path} is of kind {found!r}, not {kind!r}: the weights beside it are another model's")


def _first_problem(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    problem = error.errors(include_url=False)[0]
    return ("" if problem["loc"] else "its content: ") + describe_problem(problem)
