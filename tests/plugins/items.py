"""What a test is about, read from its parameters."""

from typing import NamedTuple

import pytest
import torch

from kernels.registry import Op
from kernels.testing.cases import Case


class Subject(NamedTuple):
    op: Op
    case: Case
    dtype: torch.dtype


def subject(item: pytest.Item) -> Subject | None:
    """The op, case and dtype of a test that has such parameters."""
    params = getattr(item, "callspec", None) and item.callspec.params
    found = [params.get(name) for name in Subject._fields] if params else []
    fits = found and all(isinstance(v, t) for v, t in zip(found, Subject.__annotations__.values(), strict=True))
    return Subject(*found) if fits else None
