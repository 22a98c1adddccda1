"""Replacements in torch and Triton, by which a process with the device of `runtime.c` runs compiled code without a GPU.

Inductor lowers, schedules and writes code as for the device. What it wrote is then called with fake tensors: buffers
are fake, products and operators give shapes, launches of its kernels are counted. So a step runs from end to end in
the order and with the buffers of a real one, and computes nothing.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._inductor import async_compile, compile_fx, config, graph
from torch._inductor.fx_passes import joint_graph
from torch._inductor.virtualized import V
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

#: "poi", "red", "per" …: what Inductor calls kinds of kernels in their names.
KIND = re.compile(r"triton_([a-z]+)_")


class Offline:
    """What Triton asks of a driver to compile for sm_90; it has no device to load a kernel on."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self):
        return torch.cuda


class OnHost(TorchDispatchMode):
    """Makes on the CPU what is asked for on the device: constants that the compiler folds."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        return func(*args, **kwargs)


@dataclass
class Graph:
    """One graph that Inductor compiled: how many nodes it had, and why it cannot be a CUDA graph, if so."""

    backward: bool
    nodes: int
    no_cudagraph: str | None


@dataclass
class Compilations:
    """What was compiled and, since `forget`, launched.

    Attributes:
        sources: generated kernel → its source.
        launches: generated kernel → how often it was launched.
        moved: bytes of the tensors that these launches were given.
        cudagraphs: functions that would have been captured as CUDA graphs.
    """

    graphs: list[Graph] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)
    launches: dict[str, int] = field(default_factory=dict)
    moved: int = 0
    cudagraphs: int = 0

    def forget(self) -> None:
        self.launches, self.moved = {}, 0

    def kinds(self) -> dict[str, int]:
        """Kind → how many generated kernels."""
        found = [KIND.match(name)[1] for name in self.sources]
        return {kind: found.count(kind) for kind in sorted(set(found))}


class Kernel:
    """Stands for a generated kernel: counts its launches."""

    def __init__(self, name: str, compilations: Compilations):
        self._name, self._compilations = name, compilations

    def run(self, *args: Any, stream: int, **kwargs: Any) -> None:
        found = self._compilations
        found.launches[self._name] = found.launches.get(self._name, 0) + 1
        found.moved += sum(a.numel() * a.element_size() for a in args if isinstance(a, torch.Tensor))


@contextmanager
def compiling() -> Iterator[Compilations]:
    """Within the context Inductor's code is recorded, and runs on fake tensors. One context a process."""
    found = Compilations()
    driver.set_active(Offline())
    # Nothing can be timed, so nothing is chosen by timing; and what was compiled before says nothing about now.
    config.deterministic, config.shape_padding, config.force_disable_caches = True, False, True

    def save_output_code(code: str) -> None:
        lowered = V.graph
        found.graphs.append(Graph(lowered.is_backward, len(lowered.graph.nodes), lowered.disable_cudagraphs_reason))

    def triton(self, name: str, source: str, device_str: str = "cuda") -> Kernel:
        name = name if found.sources.setdefault(name, source) == source else f"{name}_{len(found.sources)}"
        found.sources[name] = source
        return Kernel(name, found)

    def cudagraphify(model, *args, **kwargs):
        found.cudagraphs += 1
        return model

    compile_fx.cudagraphify = cudagraphify
    graph.GraphLowering.save_output_code = staticmethod(save_output_code)
    async_compile.AsyncCompile.triton = triton
    async_compile.AsyncCompile.wait = lambda self, scope: None
    guards = torch._C._dynamo.guards
    guards._empty_strided_cuda = lambda size, stride, dtype: torch.empty_strided(
        size, stride, dtype=dtype, device="cuda"
    )
    guards._reinterpret_tensor = lambda tensor, size, stride, offset=0: torch.as_strided(
        tensor, size, stride, tensor.storage_offset() + offset
    )
    deduce = joint_graph.UniformValueConstantFolder._deduce_value

    def deduce_on_host(self, node):
        with OnHost():
            return deduce(self, node)

    joint_graph.UniformValueConstantFolder._deduce_value = deduce_on_host
    yield found


def on_device(module: torch.nn.Module) -> torch.nn.Module:
    """A module made on the device "meta", with its parameters and buffers as fake tensors on the GPU."""
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                part._parameters[name] = torch.nn.Parameter(like(p), requires_grad=p.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = like(buffer)
    return module


def like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
