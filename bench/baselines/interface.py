"""Interface of providers: an implementation of an op, ours or a library's, that a row states times of."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kernels.testing.tolerance import Inputs, Tensors


@dataclass(frozen=True)
class Adapter:
    """An implementation of an op.

    Attributes:
        run: called with what `arrange` returns, returns what the op returns. All of it is timed.
        arrange: the op's arguments → those of `run`, before the clock starts: what a user has ready anyway, such as
            another memory layout or an optimizer object.
        differentiable: names of `run`'s arguments that gradients flow to; None for those of the op.
        merge: gradients by those names → gradients by the op's names, to be checked; not timed. Those of a list are by
            "name[0]", "name[1]", …
    """

    run: Callable[..., Any]
    arrange: Callable[..., Inputs] = lambda **inputs: inputs
    differentiable: tuple[str, ...] | None = None
    merge: Callable[[Tensors], Tensors] = dict


@dataclass(frozen=True)
class Provider:
    """An implementation that can be compared with others.

    Attributes:
        name: in rows and on the command line.
        load: imports what it takes and returns the adapter. An ImportError or OSError says that it is not installed,
            `kernels.BackendUnavailable` why it cannot serve here.
        unsupported: called with a call's arguments, reasons why it cannot serve them.
        includes: what its time covers, and how it rounds, where that is not plain.
        package: the distribution whose version the row states.
        overwrites: it writes to its arguments, which therefore are its own and are put back between rounds.
        also_compiled: it takes part a second time under torch.compile.
    """

    name: str
    load: Callable[[], Adapter]
    unsupported: Callable[..., list[str]] = lambda **inputs: []
    includes: str = ""
    package: str = "torch"
    overwrites: bool = False
    also_compiled: bool = False
