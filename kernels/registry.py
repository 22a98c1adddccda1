"""`Op`, `Backend`, and `Ops`, the bundle with one callable for each op that a model is given. No device logic."""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from inspect import Signature, signature
from types import FunctionType, MappingProxyType
from typing import Any

import torch

from common.text import nearest
from kernels.forward_mode import taking_tangents

log = logging.getLogger(__name__)

#: Backend name → the file of an op's folder that holds it, as the module variable `BACKEND` ("emulated": `EMULATED`).
FILES = MappingProxyType(
    {
        "reference": "reference",
        "triton": "triton_impl",
        "cuda": "cuda_impl",
        "library": "library_impl",
        "emulated": "cuda_impl",
    }
)
#: The backend that computes with the library's own products, on any device. An op that has it needs no kernels.
LIBRARY = "library"
#: Order in which "auto" prefers backends, unless an op has its own.
ORDER = ("triton", "cuda", "reference")
ASKED = "asked for by name"
FLOATS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})


class BackendUnavailable(RuntimeError):
    """The backend asked for cannot serve an op: `op`, `backend` and the list `reasons` say why."""

    def __init__(self, op: str, backend: str, reasons: Iterable[str]):
        self.op, self.backend, self.reasons = op, backend, list(reasons)
        super().__init__(op, backend, self.reasons)

    def __str__(self) -> str:
        return f"{self.op}: backend {self.backend!r} cannot serve: {'; '.join(self.reasons)}"


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    Attributes:
        name: a key of `FILES`.
        run: the function, with exactly the parameters of the op's `check`, called after it.
        unavailable: reasons why it cannot run on this machine at all; none if it can.
        unsupported: called with a call's arguments, reasons why it cannot serve them. It runs in every call, so it
            looks at shapes, dtypes and devices only. None where the backend serves whatever the op allows.
        dtypes: input dtypes it serves on this machine, among those of the op.
        emulated: runs its kernels in an emulator: for tests, never what "auto" means.
        torch_ops: names of the operators it registers with `torch.library`, such as `"ldit::swiglu_fwd"`.
        configs: launch configurations by name, for benches and ahead-of-time compilation.
        min_capability: the lowest compute capability that its kernels are made for.
    """

    name: str
    run: Callable[..., Any]
    unavailable: Callable[[], list[str]] = list
    unsupported: Callable[..., list[str]] | None = None
    dtypes: frozenset[torch.dtype] = FLOATS
    emulated: bool = False
    torch_ops: tuple[str, ...] = ()
    configs: Mapping[str, Any] = field(default_factory=dict)
    min_capability: tuple[int, int] = (8, 0)

    def supports(self, *args: Any, **kwargs: Any) -> bool:
        """Whether it can serve a call with these arguments."""
        return self.unsupported is None or not self.unsupported(*args, **kwargs)


@dataclass(frozen=True)
class Op:
    """A named operation and the folder with its backends.

    Attributes:
        name: also the folder, the attribute of a bundle and the test id.
        check: validates the arguments for every backend; its parameters are the op's signature. Raises ValueError.
        differentiable: names of the arguments that gradients flow to, tensors or lists of them.
        mutates: names of the arguments changed in place.
        dtypes: dtypes of the main input that `check` lets through.
        order: backends in the order "auto" prefers them.
        save_when_checkpointing: activation checkpointing that computes only cheap operators again keeps its results: it
            takes long to compute for what they need in memory.
        forward_mode_of: the op whose results and tangents it computes, from arguments and their tangents; each tangent
            stands behind what it belongs to, arguments with the same name and "_tangent". Calls of that op with
            tangents come to this one (`kernels.forward_mode`).
        graph_pass: no model calls it; its `graph_pass.py` puts it in the place of nodes of a compiled graph
            (`kernels.compile.graph_passes`).
        package: import path of the folder, `kernels.<name>` if empty.
    """

    name: str
    check: Callable[..., None]
    differentiable: tuple[str, ...] = ()
    mutates: tuple[str, ...] = ()
    dtypes: frozenset[torch.dtype] = FLOATS
    order: tuple[str, ...] = ORDER
    save_when_checkpointing: bool = False
    forward_mode_of: str = ""
    graph_pass: bool = False
    package: str = ""

    def _module(self, name: str = "") -> str:
        return (self.package or f"kernels.{self.name}") + (name and f".{name}")

    @property
    def doc(self) -> str:
        """The docstring of the op's folder, which says what it computes."""
        return import_module(self._module()).__doc__ or ""

    @property
    def cases(self) -> tuple:
        """The `kernels.testing.cases.Case`s that tests and benches run."""
        return import_module(self._module("cases")).CASES

    def cost(self, **inputs):
        """The `kernels.testing.cases.Cost` of one call."""
        return import_module(self._module("cases")).cost(**inputs)

    @property
    def expectations(self):
        """The `kernels.testing.expectations.Expectations` that tests hold the op and its backends to."""
        return import_module(self._module("expectations")).EXPECTATIONS

    @property
    def backends(self) -> tuple[str, ...]:
        """Names of the backends this op has a file for."""
        return tuple(name for name, file in FILES.items() if find_spec(self._module(file)) is not None)

    def backend(self, name: str) -> Backend:
        """The backend of that name, able to run on this machine or not.

        Raises:
            BackendUnavailable: the op has no such file, or one of its imports is missing.
        """
        if name not in self.backends:
            raise BackendUnavailable(self.name, name, [f"this op has no {name} backend ({FILES[name]}.py)"])
        try:
            module = import_module(self._module(FILES[name]))
        except (ImportError, OSError) as error:  # OSError: a shared library that does not load
            raise BackendUnavailable(self.name, name, [f"import failed: {error}"]) from error
        return module.EMULATED if name == "emulated" else module.BACKEND

    def reasons(self, name: str) -> list[str]:
        """Why the backend of that name cannot run on this machine; empty if it can."""
        try:
            return self.backend(name).unavailable()
        except BackendUnavailable as error:
            return error.reasons

    def bind(self, backend: Backend, *others: Backend) -> Callable[..., Any]:
        """The function that models call: `check`, then the backend, or the first of `others` that serves the call."""
        check, run, unsupported = self.check, backend.run, backend.unsupported
        name, backend_name = self.name, backend.name

        def checked(*args, **kwargs):
            check(*args, **kwargs)
            return run(*args, **kwargs)

        def limited(*args, **kwargs):
            check(*args, **kwargs)
            reasons = unsupported(*args, **kwargs)
            if not reasons:
                return run(*args, **kwargs)
            for other in others:
                more = other.unsupported(*args, **kwargs) if other.unsupported is not None else []
                if not more:
                    return other.run(*args, **kwargs)
                reasons = [*reasons, f"nor {other.name}: {', '.join(more)}"]
            raise BackendUnavailable(name, backend_name, reasons)

        return self._named(checked if unsupported is None else limited)

    def resolve(self, *names: str, reason: str = ASKED) -> tuple[Callable[..., Any], dict[str, str]]:
        """The callable for a backend, or the first of several that serves a call, and its row of the bundle's table."""
        first, *rest = names
        reasons = self.reasons(first)
        if not reasons:
            others = [other for other in rest if not self.reasons(other)]
            reason += "".join(f"; {other} for calls that it cannot serve" for other in others)
            function = self.bind(self.backend(first), *map(self.backend, others))
            return function, {"backend": first, "reason": reason}

        def refuse(*args, **kwargs):
            raise BackendUnavailable(self.name, first, reasons)

        return self._named(refuse), {"backend": first, "reason": f"cannot serve: {'; '.join(reasons)}"}

    def auto(self) -> tuple[tuple[str, ...], str]:
        """The names that "auto" stands for on this machine, and why.

        The first backend of the order that can run, and the others with kernels for calls that it cannot serve. The
        reference is no such other: what is slower by far is not to be a matter of a call's arguments.
        """
        rejected: list[str] = []
        usable: list[str] = []
        for name in self.order:
            reasons = self.reasons(name)
            if not reasons and self.backend(name).emulated:
                reasons = ["it would run in an emulator"]
            if not reasons:
                usable.append(name)
            elif not usable:
                rejected.append(f"not {name}: {', '.join(reasons)}")
        if not usable:
            raise BackendUnavailable(self.name, "auto", rejected)
        limited = self.backend(usable[0]).unsupported is not None
        others = [name for name in usable[1:] if limited and name != "reference"]
        return (usable[0], *others), "; ".join(rejected) or "first choice"

    def _named(self, function: Callable[..., Any]) -> Callable[..., Any]:
        assert isinstance(function, FunctionType)
        function.__dict__["__signature__"] = signature(self.check).replace(return_annotation=Signature.empty)
        function.__name__ = function.__qualname__ = self.name
        # torch.compile (2.11) limits recompilations by code object, so each op gets one of its own. Otherwise
        # tests/test_kernels_registry.py::test_compiled_ops_do_not_share_a_limit_on_recompilations fails.
        function.__code__ = function.__code__.replace(co_name=self.name)
        function.__doc__ = self.doc
        return function


class Ops:
    """One callable for each op, under the op's name; immutable. Made by `kernels.select`.

    Copies and pickles name the backends that were chosen, so they compute the same: "auto" is not asked again. Where
    the first of an op cannot run, such a copy refuses calls of it.
    """

    _ops: Mapping[str, Op]
    _chosen: Mapping[str, tuple[str, ...]]
    _table: Mapping[str, dict[str, str]]

    def __init__(
        self,
        ops: Mapping[str, Op],
        chosen: Mapping[str, tuple[str, ...]],
        reasons: Mapping[str, str] = MappingProxyType({}),
    ):
        """chosen: op → its backends, of which each call takes the first that serves it; reasons: op → why the first."""
        resolved = {name: op.resolve(*chosen[name], reason=reasons.get(name, ASKED)) for name, op in ops.items()}
        functions = {name: function for name, (function, _) in resolved.items()}
        for jvp in ops.values():
            primal = ops.get(jvp.forward_mode_of)
            if primal is not None:
                plain = chosen[primal.name][0] == "reference"
                both = taking_tangents(
                    primal.check, functions[primal.name], jvp.check, functions[jvp.name], differentiable=plain
                )
                functions[primal.name] = primal._named(both)
        vars(self).update(functions)
        vars(self).update(_ops=ops, _chosen=dict(chosen), _table={name: row for name, (_, row) in resolved.items()})

    def table(self) -> dict[str, dict[str, str]]:
        """Op name → `{"backend": its name, "reason": why this one}`, for logs and checkpoints."""
        return {name: dict(row) for name, row in self._table.items()}

    def backend(self, name: str) -> Backend | None:
        """The backend chosen for an op, the first of several; None where that one cannot serve."""
        chosen = self._table[name]["backend"]
        return None if self._ops[name].reasons(chosen) else self._ops[name].backend(chosen)

    def saved_operators(self) -> list[torch._ops.OpOverload]:
        """The operators of ops with `save_when_checkpointing`, on the backends chosen for them."""
        backends = [
            op.backend(backend)
            for name, op in self._ops.items()
            if op.save_when_checkpointing
            for backend in self._chosen[name]
            if not op.reasons(backend)
        ]
        names = [name.split("::") for backend in backends for name in backend.torch_ops]
        return [getattr(getattr(torch.ops, namespace), name).default for namespace, name in names]

    def __getattr__(self, name: str) -> Callable[..., Any]:
        known = vars(self)["_ops"]
        raise AttributeError(f"no op is called {name!r}{nearest(name, known)}; known: {', '.join(known)}")

    def __setattr__(self, name: str, value: Any = None) -> None:
        raise AttributeError(f"a bundle of ops is immutable; use kernels.select(…, {name}=…) for another choice")

    __delattr__ = __setattr__

    def __copy__(self) -> "Ops":
        return self

    def __deepcopy__(self, memo) -> "Ops":
        return self

    def __reduce__(self):
        return Ops, (self._ops, self._chosen)

    def __repr__(self) -> str:
        return "Ops({})".format(", ".join(f"{name}={row['backend']!r}" for name, row in self._table.items()))


def load_ops(*names: str) -> dict[str, Op]:
    """Op name → the `OP` that the folder `kernels/<name>` declares."""
    return {name: import_module(f"kernels.{name}").OP for name in names}


def check_names(ops: Mapping[str, Op], backend: str, per_op: Mapping[str, str]) -> None:
    """Raise ValueError, giving the nearest known name, where an op or a backend is called what none is."""
    for name in per_op:
        if name not in ops:
            raise ValueError(f"no op is called {name!r}{nearest(name, ops)}; known: {', '.join(ops)}")
    choices = ("auto", *FILES)
    for value in (backend, *per_op.values()):
        if value not in choices:
            raise ValueError(
                f"no backend is called {value!r}{nearest(str(value), choices)}; known: {', '.join(choices)}"
            )


def choose(ops: Mapping[str, Op], backend: str, per_op: Mapping[str, str]) -> Ops:
    """The bundle of `ops` on `backend`, but for the ops named in `per_op`; see `kernels.select`.

    An op that has the backend `library` and lacks `backend` computes by the library.
    """
    check_names(ops, backend, per_op)
    for name, value in per_op.items():
        if ops[name].graph_pass and value != "auto" and (reasons := ops[name].reasons(value)):
            raise BackendUnavailable(name, value, reasons)
    chosen: dict[str, tuple[str, ...]] = {}
    why: dict[str, str] = {}
    for name, op in ops.items():
        value = per_op.get(name, backend)
        if value == "auto":
            chosen[name], why[name] = op.auto()
        elif name not in per_op and value not in op.backends and LIBRARY in op.backends:
            chosen[name], why[name] = (LIBRARY,), f"this op has no {value} backend"
        else:
            chosen[name] = (value,)
    bundle = Ops(dict(ops), chosen, why)
    if "auto" in (backend, *per_op.values()):
        _log_once(bundle.table())
    return bundle


_logged: set[str] = set()


def _log_once(table: dict[str, dict[str, str]]) -> None:
    text = "\n".join(f"  {name}: {row['backend']} ({row['reason']})" for name, row in table.items())
    if text not in _logged:
        _logged.add(text)
        log.info("ops:\n%s", text)
