"""Compile a training step for the H100 that is not there, run what was compiled, and print what that came to.

    python -m tests.fake_gpu.step VARIANT [--depth N] [--plant MISTAKE] [--sources DIR]

One JSON object. With --sources, the source of each generated kernel is written to DIR for `tests.fake_gpu.kernels`.
"""

import argparse
import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_leaves

import kernels
from bench.workloads.plain import PlainLightningDiT
from kernels.compile.modes import compile_module, compiled
from kernels.registry import Ops
from lightningdit.config import ModelConfig, named_config
from lightningdit.flow import Transport
from lightningdit.model import LightningDiT
from tests.fake_gpu.device import Compilations, compiling, on_device
from tests.fake_gpu.mistakes import MISTAKES
from tests.live_memory import LiveMemory
from tests.operator_costs import READS, moved_bytes
from vavae.config import AutoencoderConfig, FoundationConfig, LossConfig
from vavae.foundation import FoundationModel
from vavae.loss import Perceptual, lpips_network
from vavae.task import VavaeTask, build_networks

PAPER = {"use_swiglu": True, "use_rope": True, "use_rmsnorm": True}
#: Operators that only make room, or name memory and where it is.
FREE = re.compile(r"prim::device|aten::((new_)?empty|_unsafe_view|detach|alias)")
#: Bytes for each trained parameter beside the network's own: float32 weights, two moments and the average.
STATES = 16


@dataclass(frozen=True)
class Variant:
    """One way to train, or one network that is run.

    Attributes:
        ops: as `kernels.select` takes it; "triton" and "cuda" for the ops that have such kernels.
        graph_pass: ops that take the place of nodes of the compiled graph, on Triton.
        mode: of `kernels.compile.modes`.
        residual: dtype of the residual stream.
        recompute: `use_checkpoint` of the network.
        network: "lightningdit", "plain" (the peer), "sampler" (without gradients), or "vavae": both of the tokenizer's
            networks at 256 × 256, with all terms of the loss.
        batch: images at once.
    """

    ops: str = "triton"
    graph_pass: tuple[str, ...] = ()
    mode: str = "inductor"
    residual: torch.dtype = torch.float32
    recompute: bool | int | str = False
    network: str = "lightningdit"
    batch: int = 128

    def select(self) -> Ops:
        if self.ops not in ("triton", "cuda"):
            return kernels.select(self.ops)
        named = [name for name, op in kernels.OPS.items() if self.ops in op.backends and not op.graph_pass]
        return kernels.select("auto", **dict.fromkeys(named, self.ops), **dict.fromkeys(self.graph_pass, "triton"))


VARIANTS = {
    "triton": Variant(),
    "cuda": Variant(ops="cuda"),
    "graph-pass": Variant(graph_pass=tuple(name for name, op in kernels.OPS.items() if op.graph_pass)),
    "bfloat16-stream": Variant(residual=torch.bfloat16),
    "recompute": Variant(recompute=True),
    "pointwise": Variant(recompute="pointwise"),
    "recompute-every-second": Variant(recompute=2),
    "regional": Variant(mode="regional"),
    "regional-recompute": Variant(mode="regional", recompute=True),
    "cudagraphs": Variant(mode="cudagraphs"),
    "plain": Variant(ops="reference", network="plain"),
    "sampler": Variant(network="sampler"),
    "vavae": Variant(network="vavae", batch=32),
    "vavae-pointwise": Variant(network="vavae", batch=32, recompute="pointwise"),
}


class Watched(LiveMemory):
    """Bytes alive, and which operators run beside generated kernels.

    Attributes:
        operators: those that are no views → how often.
        moved: bytes that they read and write.
        to_host: those that hand the host a value of the device → how often.
    """

    def __init__(self):
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.to_host: Counter[str] = Counter()
        self.moved = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # compiled code is called under this mode

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if not func.is_view and not FREE.match(func._schema.name):
            self.operators[func._schema.name] += 1
            self.moved += moved_bytes(func, args, kwargs or {}, result)
        leaves = any(t.is_cuda for t in inputs) and any(not t.is_cuda for t in outputs)
        if leaves or func._schema.name in READS:
            self.to_host[str(func)] += 1
        return result


@dataclass(frozen=True)
class Step:
    """A loss, and what is done with it: gradients, and what the optimizer makes of them."""

    loss: Callable[[], torch.Tensor]
    update: Callable[[torch.Tensor], None] = lambda loss: None

    def __call__(self, live: Watched) -> int:
        """Run it once; the bytes that the forward pass has kept."""
        loss = self.loss()
        kept = live.now
        self.update(loss)
        return kept


def lightningdit(variant: Variant, config: ModelConfig) -> Step:
    """A training step of the network, up to the optimizer's pass over flat states."""
    ops = variant.select()
    with unset_fake_temporarily(), torch.device("meta"):
        network = LightningDiT(config, ops, variant.residual).train()
        if variant.network == "plain":
            network = PlainLightningDiT(network)
        else:
            network.bfloat16()
    network = on_device(network)
    trained = [p for p in network.parameters() if p.requires_grad]
    states = [torch.empty(sum(p.numel() for p in trained), device="cuda") for _ in range(STATES // 4)]
    x1, x0 = torch.empty(2, variant.batch, config.in_channels, config.input_size, config.input_size, device="cuda")
    t = torch.empty(variant.batch, device="cuda")
    y = torch.empty(variant.batch, dtype=torch.int64, device="cuda")
    transport = Transport(use_cosine_loss=True, use_lognorm=True)
    compile_module(network, variant.mode, ops)

    def loss() -> torch.Tensor:
        terms = transport.training_losses(network, x1, t=t, x0=x0, y=y)
        return terms["loss"].mean() + terms["cos_loss"].mean()

    def update(loss: torch.Tensor) -> None:
        loss.backward()
        if variant.network != "plain":
            gradient = torch.cat([p.grad.flatten() for p in trained])
            assert gradient.shape == states[0].shape
        for p in trained:
            p.grad = None

    return Step(loss, update)


def sampler(variant: Variant, config: ModelConfig) -> Step:
    """A call of the network without gradients, as a step of the sampler makes it."""
    ops = variant.select()
    with unset_fake_temporarily(), torch.device("meta"):
        network = LightningDiT(config, ops).eval().bfloat16()
    network = on_device(network.requires_grad_(False))
    x = torch.empty(variant.batch, config.in_channels, config.input_size, config.input_size, device="cuda")
    t = torch.empty(variant.batch, device="cuda")
    y = torch.empty(variant.batch, dtype=torch.int64, device="cuda")
    call = compiled(network, variant.mode, ops)
    return Step(torch.no_grad()(lambda: call(x, t, y)))


class FakeTask(VavaeTask):
    """The tokenizer's task with DINOv2 and LPIPS on the device, without files."""

    def __init__(self, variant: Variant, config: AutoencoderConfig):
        self.loss, self.stages, self.ops, self.batches = LossConfig(disc_start=0), (), variant.select(), range(1)
        self.use_checkpoint, self.global_batch_size = variant.recompute, variant.batch
        with unset_fake_temporarily(), torch.device("meta"):
            foundation = FoundationModel.from_config(FoundationConfig(), 16, pretrained=False).bfloat16()
            perceptual = Perceptual(lpips_network("meta"))
            perceptual.cast(torch.bfloat16)
            networks = build_networks(config, self.loss, self.ops, 0, foundation.width, variant.recompute)
            for network in networks.values():
                network.train().bfloat16()
        self.foundation, self.perceptual = on_device(foundation), on_device(perceptual)
        self.networks = {name: on_device(network) for name, network in networks.items()}


def vavae(variant: Variant, config: AutoencoderConfig) -> Step:
    """A training step of the tokenizer as the loop makes it, from images to gradients."""
    task = FakeTask(variant, config)
    task.compile(variant.mode)
    for network in task.networks.values():
        compile_module(network, variant.mode, task.ops)
    batch = {"image": torch.empty(variant.batch, 3, 256, 256, device="cuda")}
    draws = {"noise": torch.empty(variant.batch, config.embed_dim, 16, 16, device="cuda")}

    def step() -> torch.Tensor:
        return task.train_step(task.networks, batch, draws, 1, lambda name, loss: loss.backward())["loss"]

    def update(loss: torch.Tensor) -> None:
        for network in task.networks.values():
            for p in network.parameters():
                p.grad = None

    return Step(step, update)


def make_step(variant: Variant, depth: int) -> Step:
    if variant.network == "vavae":
        return vavae(variant, AutoencoderConfig(size="f16d32"))
    config = named_config("LightningDiT-XL/1", input_size=16, in_channels=32, **PAPER)
    config = config.model_copy(update={"depth": depth, "use_checkpoint": variant.recompute})
    return (sampler if variant.network == "sampler" else lightningdit)(variant, config)


def report(found: Compilations, live: Watched, kept: int, states: int, seconds: float) -> dict:
    forward = [g for g in found.graphs if not g.backward]
    return {
        "cpu_seconds": seconds,
        "graphs": [len(forward), sum(g.backward for g in found.graphs)],
        "nodes": [sum(g.nodes for g in forward), sum(g.nodes for g in found.graphs if g.backward)],
        "kernels": found.kinds(),
        "launches": sum(found.launches.values()),
        "generated_bytes": found.moved,
        "operators": dict(live.operators),
        "operator_bytes": live.moved,
        "atomics": sorted(name for name, source in found.sources.items() if "tl.atomic_" in source),
        "cudagraphs": found.cudagraphs,
        "no_cudagraph": [g.no_cudagraph for g in found.graphs if g.no_cudagraph],
        "to_host": dict(live.to_host),
        "state_bytes": states,
        "saved_bytes": kept,
        "peak_bytes": live.peak,
    }


def write_sources(folder: Path, sources: dict[str, str]) -> None:
    """One file for each kernel, by its content without the number in its name: other graphs have the same."""
    for name, source in sources.items():
        plain = source.replace(name, "triton_")
        (folder / f"{hashlib.sha256(plain.encode()).hexdigest()[:16]}.py").write_text(source)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("--depth", type=int, default=28)
    parser.add_argument("--plant", choices=MISTAKES)
    parser.add_argument("--sources", type=Path)
    options = parser.parse_args()
    variant = VARIANTS[options.variant]
    with compiling() as found, FakeTensorMode(), torch.autograd.set_multithreading_enabled(False):
        if options.plant:
            MISTAKES[options.plant]()
        with Watched() as made:
            step = make_step(variant, options.depth)
        begun = time.process_time()
        with Watched() as live:
            step(live)
        seconds = time.process_time() - begun
        found.forget()
        with Watched() as live:
            kept = step(live)
    print(json.dumps(report(found, live, kept, made.now, seconds)), flush=True)
    if options.sources:
        write_sources(options.sources, found.sources)


if __name__ == "__main__":
    main()
