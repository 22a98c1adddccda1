"""`Section`, the base of every config section, the types of its fields, and validation errors in plain words.

Whole numbers have upper limits far above what anybody trains, so that a typing mistake is an error and not an endless
run. Needs no torch.
"""

import os
import re
from collections.abc import Collection, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from common.text import nearest, printable

# YAML 1.1 reads 1e-4 as text, as it lacks the dot of 1.0e-4. Run files are read so that it is a number already
# (`launch.config_files`); this is for values from elsewhere, and in quotes.
_DOTLESS_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


NAME_LIMIT, PATH_LIMIT = 255, 4095  # bytes, of Linux


class UnknownKeyError(ValueError):
    """`keys` that a section does not have, with the nearest of those that it has."""

    def __init__(self, keys: Sequence[Any], known: Collection[str]):
        hints = ", ".join(f"{key!r}{nearest(str(key), known)}" for key in keys)
        super().__init__(f"unknown key {hints}; known: {', '.join(known)}")
        self.keys = tuple(keys)


class SectionError(ValueError):
    """Values that do not validate as a section; names the keys, the values got and what is allowed."""


def plain_text(text: str) -> str:
    """`text`; raises ValueError for control characters, what is not UTF-8, and what is too long for a name or path."""
    if printable(text) != text:
        raise ValueError(f"{short(text)} holds what is not allowed in names and paths: control characters, or no UTF-8")
    if max(map(len, text.encode().split(b"/"))) > NAME_LIMIT or len(text.encode()) > PATH_LIMIT:
        raise ValueError(f"{short(text)} is too long for a file system: {NAME_LIMIT} bytes a name, {PATH_LIMIT} a path")
    return text


def expand_home(path: str) -> str:
    """`path` with `~` or `~user` at its start replaced by that home; raises ValueError where there is no such home."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError(f"{path}: there is no home directory {path.split('/')[0]}; a folder of that name is ./{path}")
    return expanded


def _read_float(value: Any) -> Any:
    return float(value) if isinstance(value, str) and _DOTLESS_EXPONENT.fullmatch(value) else value


def _sequence(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Float = Annotated[float, BeforeValidator(_read_float), Field(allow_inf_nan=False)]
NonNegative = Annotated[Float, Field(ge=0)]
Positive = Annotated[Float, Field(gt=0)]
Probability = Annotated[Float, Field(ge=0, lt=1)]
#: Steps, images, epochs.
Count = Annotated[int, Field(ge=1, le=10**9)]
CountFrom0 = Annotated[int, Field(ge=0, le=10**9)]
#: Labels.
Classes = Annotated[int, Field(ge=1, le=10**7)]
#: Channels, widths, pixels along a side, images at once.
Size = Annotated[int, Field(ge=1, le=65_536)]
#: Convolutions that halve an image, and blocks between two of them.
Levels = Annotated[int, Field(ge=1, le=16)]
#: Blocks, heads, processes.
SmallCount = Annotated[int, Field(ge=1, le=1_000)]
SmallCountFrom0 = Annotated[int, Field(ge=0, le=1_000)]
Sizes = Annotated[tuple[Size, ...], BeforeValidator(_sequence)]
#: A name.
Text = Annotated[str, AfterValidator(plain_text)]
#: A file or directory, with `~` expanded.
PathText = Annotated[Text, AfterValidator(expand_home)]


def _recompute(value: Any) -> Any:
    if isinstance(value, bool) or value == "pointwise":
        return value
    raise ValueError(f"allowed are false, true and 'pointwise' (got {value!r})")


def _recompute_blocks(value: Any) -> Any:
    if isinstance(value, bool) or value == "pointwise":
        return value
    if isinstance(value, int) and 1 <= value <= 1_000:
        return True if value == 1 else value
    raise ValueError(
        "allowed are false, true, 'pointwise' and k, a whole number from 1 to 1000, for every k-th block "
        f"(got {value!r})"
    )


#: Activation checkpointing: none, of whole blocks, or of the norms and activations between matrix products.
Recompute = Annotated[bool | Literal["pointwise"], BeforeValidator(_recompute)]
#: The same, or k for every k-th block of a transformer as a whole; 1 is read as true.
RecomputeBlocks = Annotated[bool | int | Literal["pointwise"], BeforeValidator(_recompute_blocks)]


class Section(BaseModel):
    """A frozen group of keys: nothing is coerced except whole numbers to floats, nothing unknown is let through.

    A wrong value raises pydantic's ValidationError, a ValueError; `describe` says it in plain words.

    Attributes:
        shorthands: keys that stand for several fields, which the section's own validator puts in their place.
    """

    shorthands: ClassVar[tuple[str, ...]] = ()

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_keys(cls, values: Any) -> Any:
        unknown = [key for key in values if key not in cls.model_fields] if isinstance(values, dict) else []
        if unknown:
            raise UnknownKeyError(unknown, (*cls.shorthands, *cls.model_fields))
        return values

    @classmethod
    def read(cls, values: Any, where: str) -> Self:
        """The section that `values` say; raises SectionError, which begins with `where`."""
        try:
            return cls.model_validate(values)
        except ValidationError as e:
            raise SectionError(f"{where}: {describe(e)}") from None


_WANTED = {
    "int_type": "a whole number is wanted",
    "float_type": "a number is wanted",
    "finite_number": "a finite number is wanted",
    "bool_type": "true or false is wanted",
    "string_type": "text is wanted",
    "tuple_type": "a list is wanted",
    "dict_type": "a mapping of keys to values is wanted",
    "model_type": "a section of keys is wanted",
    "invalid-json-value": "a plain value is wanted",
    "literal_error": "must be {expected}",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "multiple_of": "must be a multiple of {multiple_of}",
    "too_short": "must have at least {min_length} entries",
    "too_long": "must have at most {max_length} entries",
    "missing": "is missing",
    "string_pattern_mismatch": "must be of the form {pattern}",
}


def describe(error: ValidationError) -> str:
    """Every problem of a validation as `key: what is wanted (got …)`."""
    return "; ".join(describe_problem(item) for item in error.errors(include_url=False))


def describe_problem(item: Any) -> str:
    """One of `ValidationError.errors()`, in the same way."""
    kind, got, path = item["type"], item["input"], list(item["loc"])
    if kind == "value_error":
        message = str(item["ctx"]["error"])
    elif path[-1:] == ["[key]"]:
        path, message = path[:-2], "the names in it are text"
    else:
        message = _WANTED[kind].format(**item.get("ctx", {})) if kind in _WANTED else item["msg"]
    if kind == "string_type" and isinstance(got, bool | int | float):
        message += ", in quotes where YAML reads something else"
    key = ".".join(map(str, path))
    shown = "" if kind in ("value_error", "missing") else f" (got {short(got)})"
    return (f"{key}: " if key else "") + message + shown


def short(value: Any, limit: int = 100) -> str:
    """A value as messages show it: `repr`, cut to `limit` characters."""
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
