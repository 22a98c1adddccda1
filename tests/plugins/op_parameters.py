"""Op, case and dtype of a test, from its parameters."""

from typing import NamedTuple

import pytest
import torch

from kernels.registry import Op
from kernels.testing.cases import Case


class OpParameters(NamedTuple):
    op: Op
    case: Case
    dtype: torch.dtype


def op_parameters(item: pytest.Item) -> OpParameters | None:
    """Those of a test that has all three; None for other tests."""
    params = getattr(item, "callspec", None) and item.callspec.params
    found = [params.get(name) for name in OpParameters._fields] if params else []
    fits = found and all(isinstance(v, t) for v, t in zip(found, OpParameters.__annotations__.values(), strict=True))
    return OpParameters(*found) if fits else None
