"""Bytes of device memory that a training process takes, part by part, under each ZeRO stage.

What DeepSpeed and the optimizer hold for each trained parameter was counted, tensor by tensor, on engines of one and
two processes; tests count it again. A step has its peak where the backward pass begins (all activations are
kept), where the optimizer steps, at the start of a run, in a validation or sampling by the averaged weights, or where
samples are decoded or judged.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

GIB = 2**30
FLOAT32, BFLOAT16 = 4, 2
STAGES = (0, 1, 2, 3)
OPTIMIZER_STATES = 3  # exp_avg, exp_avg_sq, ema: float32 each
# DeepSpeed's defaults, in elements.
REDUCE_BUCKET, ALL_REDUCE, LIVE_PARAMETERS = 500_000_000, 500_000_000, 1_000_000_000
#: Of a card's memory: what CUDA, cuBLAS and NCCL keep for themselves, and the share lost to fragmentation. Assumed.
CONTEXT, FRAGMENTATION = 1.0 * GIB, 0.05
#: Images that are decoded at a time beside a network in training, and the bytes that each pixel then takes: of the
#: published tokenizer's decoder in float32, counted tensor by tensor.
DECODED, DECODED_PIXEL = 4, 2560
#: An image's latents and its mirror image's.
MIRRORS = 2


@dataclass(frozen=True)
class NetworkCost:
    """One trained network: parameters, and what one image costs in it.

    `flops` counts a training step's (forward and backward) per image; `activation_bytes` what is held per image at the
    peak of a step in the run's precision, `forward_bytes` in a forward pass that keeps nothing.
    """

    name: str
    parameters: int
    trainable: int
    flops: float
    activation_bytes: float
    forward_bytes: float = 0.0


@dataclass(frozen=True)
class Setup:
    """What of a run decides about its memory beside the networks.

    Fields:
        processes: of one GPU each.
        bf16: whether weights, gradients and activations are bfloat16; else float32.
        options: DeepSpeed's, as `DeepSpeedConfig.merged_overrides` gives them.
        frozen: parameters of networks that are not trained, held in the same precision.
        latents: bytes of latents that each process keeps on its device.
        averaged: whether validation, previews or figures of samples put the average in the place of the weights.
        sampled: samples for which previews call the network at once. decoding: bytes of the main process's tokenizer
            and of what it decodes, or of the networks that judge samples where those are more.
    """

    processes: int
    bf16: bool
    options: dict[str, Any] = field(default_factory=dict)
    frozen: int = 0
    latents: float = 0.0
    averaged: bool = False
    sampled: int = 0
    decoding: float = 0.0

    @property
    def weight(self) -> int:
        """Bytes of a weight in use."""
        return BFLOAT16 if self.bf16 else FLOAT32

    @property
    def zero(self) -> dict[str, Any]:
        return self.options.get("zero_optimization") or {}

    @property
    def summed(self) -> bool:
        """Whether gradients of bfloat16 are summed in float32."""
        return self.bf16 and (self.options.get("data_types") or {}).get("grad_accum_dtype") == "fp32"

    def offloads(self, what: str) -> bool:
        """Whether the optimizer ("offload_optimizer") or weights ("offload_param") are in the host's memory."""
        return (self.zero.get(what) or {}).get("device", "none") != "none"

    def buckets(self, stage: int) -> float:
        """Bytes of the buffers that gradients are copied to for an all-reduce, of one engine."""
        held = self.zero.get("contiguous_gradients", True) or self.offloads("offload_optimizer")
        if stage == 0 or not held or (stage == 1 and self.summed):
            return 0.0
        size = self.zero.get("reduce_bucket_size", REDUCE_BUCKET)
        cast = self.bf16 and self.options.get("communication_data_type") == "fp32"
        doubled = stage < 3 and self.processes > 1 and bool(self.zero.get("overlap_comm"))
        return size * ((1 + doubled) * self.weight + (FLOAT32 if cast else 0))


@dataclass(frozen=True)
class Memory:
    """Bytes of one process: parts where the backward pass begins, and the totals of the other moments.

    Fields:
        step, start, validation, decoding: all that is held when the optimizer steps or gradients are sorted for it,
            when a run is set up, in a validation or sampling (0 without any by the average), and while samples are
            decoded or judged (0 without any).
        host: bytes of the host's memory for what is offloaded.
    """

    weights: float
    gradients: float
    states: float
    buckets: float
    activations: float
    frozen: float
    latents: float
    step: float
    start: float
    validation: float
    decoding: float
    host: float

    @property
    def backward(self) -> float:
        parts = (self.weights, self.gradients, self.states, self.buckets, self.activations, self.frozen, self.latents)
        return sum(parts)

    @property
    def moments(self) -> dict[str, float]:
        return {
            "backward pass": self.backward,
            "optimizer step": self.step,
            "start": self.start,
            "validation": self.validation,
            "decoding of samples": self.decoding,
        }

    @property
    def peak(self) -> float:
        return max(self.moments.values())

    @property
    def peak_moment(self) -> str:
        return max(self.moments, key=self.moments.__getitem__)


@dataclass(frozen=True)
class _Shares:
    """Bytes for each trained parameter of one process under one stage; `step` and `start` beside weights and states.

    gathered: of whole weights that ZeRO 3 brings together for the passes.
    """

    weights: float
    gradients: float
    states: float
    step: float
    start: float
    average: float
    host: float = 0.0
    gathered: float = 0.0


def memory_of(
    networks: Sequence[NetworkCost], setup: Setup, stage: int, micro_batch_size: int, accumulation: int = 1
) -> Memory:
    """The memory of a process that trains `networks` with so many images at once under a ZeRO stage.

    Gradients are counted whole beside all activations, as they are where several micro-batches make a step.
    """
    totals = dict.fromkeys(_Shares.__dataclass_fields__, 0.0)
    buckets = 0.0
    for network in networks:
        shares = _shares(setup, stage, network.trainable, accumulation)
        for name in totals:
            totals[name] += network.trainable * getattr(shares, name)
        # ZeRO 3 holds an engine's for good; else they live for one backward pass, one engine's at a time.
        buckets = buckets + setup.buckets(stage) if stage == 3 else max(buckets, setup.buckets(stage))
    frozen = setup.frozen * setup.weight
    resident = totals["weights"] + totals["states"] + frozen + setup.latents + (buckets if stage == 3 else 0)
    forward = sum(network.forward_bytes for network in networks) * max(micro_batch_size, setup.sampled)
    return Memory(
        weights=totals["weights"] + totals["gathered"],
        gradients=totals["gradients"],
        states=totals["states"],
        buckets=buckets,
        activations=sum(network.activation_bytes for network in networks) * micro_batch_size,
        frozen=frozen,
        latents=setup.latents,
        step=resident + totals["step"],
        start=resident + totals["start"],
        validation=resident + totals["gathered"] + totals["average"] + forward if setup.averaged else 0.0,
        decoding=resident + setup.decoding if setup.decoding else 0.0,
        host=totals["host"],
    )


def _shares(setup: Setup, stage: int, trainable: int, accumulation: int) -> _Shares:
    W, weight, bf16 = setup.processes, setup.weight, setup.bf16
    states = OPTIMIZER_STATES * FLOAT32 + (FLOAT32 if bf16 or stage > 0 else 0)  # with master weights
    start = FLOAT32 if bf16 else 0  # weights as they were before DeepSpeed rounded them
    flat = min(1.0, ALL_REDUCE / max(trainable, 1)) if W > 1 else 0.0  # of the gradients, copied for an all-reduce
    if stage == 0:
        step = weight + max(FLOAT32 if bf16 else 0, weight * flat)
        return _Shares(weight, weight, states, step, start + 6 if bf16 else 0, weight)
    if stage == 3:
        gradient = (FLOAT32 if setup.summed else weight) / W
        live = setup.zero.get("stage3_max_live_parameters", LIVE_PARAMETERS)
        gathered = weight * min(1.0, live / max(trainable, 1)) if W > 1 else 0.0
        step = gradient + (FLOAT32 + (BFLOAT16 if bf16 and not setup.summed else 0)) / W
        shares = _Shares(weight / W, gradient, states / W, step, start + gradient, weight / W, gathered=gathered)
        return _offloaded(shares, setup, stage, weight)
    if setup.summed:
        copy, gradient = 0, (weight + FLOAT32 if stage == 1 else FLOAT32 / W)
        step, start = gradient, start + (FLOAT32 if stage == 1 else 0)
    else:
        copy = weight if bf16 else 0  # DeepSpeed's of the part that is updated; in float32 it is the master
        twice = 2 if accumulation > 1 else 1  # the sum of micro-batches, and the newest
        gradient = weight if stage == 1 else twice * weight / W
        step = weight / W + (weight if stage == 1 else weight / W)
    shares = _Shares(weight, gradient, (states + copy) / W, step, start, weight)
    return _offloaded(shares, setup, stage, weight)


def _offloaded(shares: _Shares, setup: Setup, stage: int, weight: int) -> _Shares:
    """The shares with what the run's options leave in the host's memory there."""
    if not setup.offloads("offload_optimizer"):
        return shares
    W = setup.processes
    host = ((OPTIMIZER_STATES + 2) * FLOAT32 + weight) / W  # states, master weights and gradients, and a copy to send
    weights = shares.weights
    if stage == 3 and setup.offloads("offload_param"):
        weights, host = weights - weight / W, host + weight / W
    gradients = weight / W if stage > 1 else shares.gradients
    # Master weights are made on the device and then moved.
    start = shares.start + FLOAT32 / W
    return _Shares(weights, gradients, 0.0, gradients, start, shares.average, host, shares.gathered)


def usable(card: float) -> float:
    """Bytes of a card's memory (bytes) that a plan may count on: less CUDA's own and what fragmentation loses."""
    return card * (1 - FRAGMENTATION) - CONTEXT


def save_bytes(networks: Sequence[NetworkCost], processes: int, stage: int, *, pinned: bool = False) -> float:
    """Bytes of host memory for a checkpoint written while training goes on, of the process that holds most of it.

    Master weights and the three states, float32, of the trained parameters, a block for each of them and each network:
    shared out from ZeRO 1 on, all on the main process under ZeRO 0. What is not trained is on the main process.
    pinned: the blocks are page-locked, as on a GPU, whose allocator rounds each up to a power of two.
    """
    shares, held = processes if stage > 0 else 1, 0.0
    for network in networks:
        block = network.trainable * FLOAT32 / shares
        held += (1 + OPTIMIZER_STATES) * (_power_of_two(block) if pinned else block)
        held += (network.parameters - network.trainable) * FLOAT32
    return held


def _power_of_two(size: float) -> int:
    """The least that is not below `size`."""
    return 1 << max(math.ceil(size) - 1, 0).bit_length()


def latents_bytes(num_images: int, channels: int, size: int, width: int = FLOAT32) -> int:
    """Disk for the latents: an image and its mirror image, `[channels, size, size]` each, and an int64 label.

    width: bytes that are stored for each number, of moments those of both.
    """
    return num_images * (MIRRORS * channels * size * size * width + 8)
