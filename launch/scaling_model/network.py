"""Networks of GPUs, and what ring collectives send over them and take.

Volumes are those of ring algorithms (Patarasuk and Yuan, J. Parallel Distrib. Comput. 69, 2009), whose factors NCCL's
documentation of its bandwidth tests states as well (nccl-tests, doc/PERFORMANCE.md): of a buffer of S bytes on n GPUs
each sends 2 (n − 1)/n · S in an all-reduce, and (n − 1)/n · S in a reduce-scatter or an all-gather.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from common.text import nearest
from launch.config_files import ConfigError

Operation = Literal["all_reduce", "reduce_scatter", "all_gather"]
#: How often each of the two phases, reducing and gathering, is gone through.
PHASES: Mapping[Operation, int] = {"all_reduce": 2, "reduce_scatter": 1, "all_gather": 1}


@dataclass(frozen=True)
class Network:
    """Links as one GPU sees them.

    Fields:
        intra, inter: GB/s that one GPU can send within its node and, through its share of the node's adapters, to
            others; each way.
        latency: microseconds of each round, from one GPU to another.
        per_node: GPUs of a node.
        utilization: share of a link's rate that a collective reaches; assumed unless given.
        source: where the rates are from.
    """

    name: str
    intra: float
    inter: float
    latency: float = 5.0
    per_node: int = 8
    utilization: float = 0.8
    source: str = "given"


_NVLINK4 = "NVLink 4: 900 GB/s per GPU, both ways together (NVIDIA H100 data sheet)"
_NDR = "InfiniBand NDR: 400 Gb/s per adapter, one for each GPU (NVIDIA Quantum-2; DGX H100 data sheet)"
_HDR = "InfiniBand HDR: 200 Gb/s per adapter, one for each GPU (NVIDIA Quantum; DGX A100 data sheet)"
PRESETS = {
    each.name: each
    for each in (
        Network("h100-ndr", 450, 50, source=f"{_NVLINK4}; {_NDR}"),
        Network("h100-hdr", 450, 25, source=f"{_NVLINK4}; {_HDR}"),
        Network("h100-eth100", 450, 12.5, source=f"{_NVLINK4}; Ethernet: 100 Gb/s (IEEE 802.3) for each GPU"),
        Network("h800-ndr", 200, 50, source=f"NVLink of the H800: 400 GB/s (resellers' data sheets); {_NDR}"),
        Network(
            "a100-hdr",
            300,
            25,
            source=f"NVLink 3: 600 GB/s per GPU, both ways together (NVIDIA A100 data sheet); {_HDR}",
        ),
    )
}
_KEYS = [field.name for field in fields(Network) if field.name not in ("name", "source")]


def parse_network(text: str) -> Network:
    """A preset's name, or `key=value,…` of `Network`, or a preset with values in the place of its own.

    Raises ConfigError for an unknown name or key, and a value that is not above 0.
    """
    first, *rest = text.split(",")
    if "=" in first:
        network, rest = Network("custom", 0, 0), [first, *rest]
    elif first in PRESETS:
        network = PRESETS[first]
    else:
        raise ConfigError(
            f"--network {first!r} is none of {', '.join(PRESETS)}, nor keys such as intra=450,inter=50"
            f"{nearest(first, PRESETS)}"
        )
    given: dict[str, Any] = {}
    for part in rest:
        key, _, value = part.partition("=")
        if key not in _KEYS:
            raise ConfigError(f"--network: unknown key {key!r}; keys: {', '.join(_KEYS)}{nearest(key, _KEYS)}")
        given[key] = _positive(key, value)
    if not network.intra and {"intra", "inter"} - set(given):
        raise ConfigError(f"--network {text}: intra and inter, GB/s per GPU each way, are wanted")
    if network.name != "custom" and given:
        network = replace(network, name=text)
    return replace(network, **given)


def _positive(key: str, text: str) -> float | int:
    wanted = "a whole number above 0" if key == "per_node" else "a number above 0"
    try:
        value = int(text) if key == "per_node" else float(text)
    except ValueError:
        value = 0
    if not 0 < value < float("inf") or (key == "utilization" and value > 1):
        raise ConfigError(f"--network: {key} is {text!r}; {wanted}{', at most 1,' * (key == 'utilization')} is wanted")
    return value


@dataclass(frozen=True)
class Traffic:
    """What one GPU sends in a collective, in bytes by kind of link, and the seconds it takes."""

    intra: float = 0.0
    inter: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.intra + other.intra, self.inter + other.inter, self.seconds + other.seconds)

    def __mul__(self, times: float) -> "Traffic":
        return Traffic(self.intra * times, self.inter * times, self.seconds * times)

    @property
    def total(self) -> float:
        return self.intra + self.inter


def nodes_of(gpus: int, network: Network) -> tuple[int, int]:
    """(nodes, GPUs in each); raises ConfigError for a number of GPUs that fills no whole nodes."""
    if gpus <= network.per_node:
        return 1, gpus
    if gpus % network.per_node:
        raise ConfigError(f"--gpus {gpus} is no multiple of the {network.per_node} GPUs of a node ({network.name})")
    return gpus // network.per_node, network.per_node


def collective(operation: Operation, size: float, gpus: int, network: Network) -> Traffic:
    """One collective on a buffer of `size` bytes, all of them on every GPU before a reduction or after a gathering.

    Within the nodes, and then across them between the GPUs of the same place in each, on a part of the buffer: k GPUs
    on each of m nodes send (k − 1)/k · S within, and (m − 1)/m · S/k across, in each phase; together that is
    (n − 1)/n · S. Both kinds of link are busy at once, so the slower one is waited for. Latency is that of k − 1 rounds
    of a ring within and of ⌈log₂ m⌉ across, where NCCL has trees that send no more than rings.
    """
    nodes, local = nodes_of(gpus, network)
    phases = PHASES[operation]
    intra = phases * (local - 1) / local * size
    inter = phases * (nodes - 1) / nodes * size / local
    rounds = phases * (local - 1 + math.ceil(math.log2(nodes)))
    rate = network.utilization * 1e9
    return Traffic(
        intra,
        inter,
        max(intra / (network.intra * rate), inter / (network.inter * rate)) + rounds * network.latency * 1e-6,
    )
