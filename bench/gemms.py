"""Time the matrix products of a training step on a GPU, each alone, as torch and as cuBLASLt run them.

    python -m bench.gemms [--model NAME] [--batch N] [--only NAME] [--minutes M] [--out FILE]

Each of a block's four linear layers makes three products in a step: forward, the gradient of its input (dgrad) and that
of its weight (wgrad), in bfloat16. "torch" is what a training step runs, "cublaslt" asks torch for that library.
Results are checked against float64; numbers are random, as zeros draw less power and run faster.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from bench.measure import program
from bench.measure.comparison import Comparison, mismatches
from bench.measure.progress import Ready
from bench.measure.rows import Row
from bench.measure.timing import Iteration, iteration_size
from bench.workloads.published import published_config
from lightningdit.config import MODEL_NAMES, ModelConfig

#: Provider → what `torch.backends.cuda.preferred_blas_library` is told; its default is cuBLAS on NVIDIA's GPUs.
LIBRARIES = {"torch": "default", "cublaslt": "cublaslt"}
LAYERS = ("qkv", "proj", "w12", "w3")
DIRECTIONS = ("forward", "dgrad", "wgrad")


@dataclass(frozen=True)
class Product:
    """One product of a linear layer [inputs → outputs] over so many tokens."""

    layer: str
    direction: str
    tokens: int
    inputs: int
    outputs: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(M, N, K) of the [M, N] result, a sum over K."""
        return {
            "forward": (self.tokens, self.outputs, self.inputs),
            "dgrad": (self.tokens, self.inputs, self.outputs),
            "wgrad": (self.outputs, self.inputs, self.tokens),
        }[self.direction]

    @property
    def flops(self) -> int:
        return 2 * self.tokens * self.inputs * self.outputs

    @property
    def moved(self) -> int:
        """Bytes of both operands and the result in bfloat16."""
        m, n, k = self.shape
        return 2 * (m * k + k * n + m * n)

    def operands(self, device: torch.device | str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Both factors, [M, K] and [K, N], stored as training stores them: tokens by channels, outputs by inputs."""
        generator = torch.Generator(device).manual_seed(seed)
        draw = partial(torch.randn, generator=generator, device=device)
        x, dy = (self.tokens, self.inputs), (self.tokens, self.outputs)
        first, second = {
            "forward": (x, (self.outputs, self.inputs)),
            "dgrad": (dy, (self.outputs, self.inputs)),
            "wgrad": (dy, x),
        }[self.direction]
        a, b = draw(first).bfloat16(), draw(second).bfloat16()
        return {"forward": (a, b.t()), "dgrad": (a, b), "wgrad": (a.t(), b)}[self.direction]


def products(config: ModelConfig, batch: int) -> Iterator[Product]:
    """The 12 of a block."""
    D, F, tokens = config.hidden_size, config.mlp_hidden, batch * config.num_tokens
    sizes = {"qkv": (D, 3 * D), "proj": (D, D), "w12": (D, 2 * F), "w3": (F, D)}
    for direction in DIRECTIONS:
        for layer in LAYERS:
            yield Product(layer, direction, tokens, *sizes[layer])


@dataclass(frozen=True)
class GemmJob:
    """One product of a model's step, by several libraries."""

    model: str
    batch: int
    product: Product
    providers: tuple[str, ...] = tuple(LIBRARIES)

    def __str__(self) -> str:
        return f"{self.model} batch {self.batch} {self.product.layer} {self.product.direction}"


@dataclass(frozen=True)
class GemmComparison(Comparison):
    """Iterations go over several pairs of operands, as CUDA graphs."""

    kind: ClassVar[str] = "gemm"

    def named(self, job: GemmJob, name: str) -> Row:
        product = job.product
        return {
            "model": job.model,
            "batch": job.batch,
            "layer": product.layer,
            "direction": product.direction,
            "provider": name,
            "ours": False,
            "shape": product.shape,
        }

    def run(self, job: GemmJob) -> list[Row]:
        with self.device.active():
            return super().run(job)

    def set_up(self, job: GemmJob) -> tuple[list, int]:
        sets, calls = iteration_size(job.product.moved, self.device.l2_bytes)
        return [job.product.operands(self.device.kind, seed) for seed in range(sets)], calls

    def prepare(self, job: GemmJob, name: str, shared: tuple[list, int]) -> Ready:
        pairs, calls = shared
        (value,) = self._multiplied(name, pairs, 1)
        run, method = self.device.replayable(partial(self._multiplied, name, pairs, calls))
        about = {"calls": calls, "sets": len(pairs), "method": method}
        return Ready({"": Iteration(run, calls, method=method)}, value, about)

    def _multiplied(self, name: str, pairs: list, calls: int) -> list[torch.Tensor]:
        """The products of an iteration; they stay until its end, so that results rotate too."""
        before = torch.backends.cuda.preferred_blas_library()
        try:
            torch.backends.cuda.preferred_blas_library(LIBRARIES[name])
            return [torch.mm(*pairs[call % len(pairs)]) for call in range(calls)]
        finally:
            torch.backends.cuda.preferred_blas_library(before)

    def wrong(self, job: GemmJob, values: Mapping[str, torch.Tensor], shared: tuple[list, int]) -> dict[str, str]:
        """By the tests' rule, beside the exact product rounded once."""
        a, b = shared[0][0]
        exact = a.double() @ b.double()
        return mismatches("product", values, exact.bfloat16(), exact)

    def figures(self, job: GemmJob, ready: Ready) -> Row:
        flops, seconds = job.product.flops, ready.seconds()
        return {
            "flops": flops,
            "bytes": job.product.moved,
            "tflops": flops / seconds / 1e12,
            **self.limits(flops / seconds),
        }

    def label(self, row: Row) -> str:
        of = f"{row['model']} batch {row['batch']} {row['layer']:4} {row['direction']:7}"
        return f"{of} {' x '.join(map(str, row['shape'])):20} {row['provider']:8}"

    def measured(self, row: Row) -> str:
        part = f", {row['fraction']:.1%} of a large matmul" if row["fraction"] else ""
        return f"{row['tflops']:6.1f} TFLOP/s ({row['p50_ms'] * 1e3:.1f} µs ±{row['spread'] / 2:.1%}{part})"

    def conclude(self, rows: list[Row]) -> None:
        for (model, batch, name), rate in means(rows).items():
            print(f"{model} batch {batch}: {rate:.1f} TFLOP/s mean over the step's products, {name}")


def means(rows: Iterable[Row]) -> dict[tuple[str, int, str], float]:
    """(model, batch, provider) → TFLOP/s of all products together: their FLOPs over their time.

    "best" takes for each product the library that is fastest at it. Left out is who lacks a product.
    """
    found: dict[tuple[str, int, str], dict[tuple[str, str], Row]] = {}
    for row in (row for row in rows if row["status"] == "ok"):
        which = row["layer"], row["direction"]
        for name in (row["provider"], "best"):
            known = found.setdefault((row["model"], row["batch"], name), {})
            if which not in known or row["p50_ms"] < known[which]["p50_ms"]:
                known[which] = row
    whole = {key: list(known.values()) for key, known in found.items() if len(known) == len(LAYERS) * len(DIRECTIONS)}
    return {
        key: sum(row["flops"] for row in known) / sum(row["p50_ms"] for row in known) / 1e9
        for key, known in whole.items()
    }


def main(argv: list[str] | None = None) -> int:
    parser = program.parser("bench.gemms", __doc__, seconds=0.5)
    parser.add_argument("--model", choices=MODEL_NAMES, default="LightningDiT-XL/1", help="default: XL/1")
    parser.add_argument("--batch", type=int, default=128, help="images per step (default 128)")
    parser.add_argument("--only", action="append", choices=LIBRARIES, help="a provider; repeatable")
    options = parser.parse_args(argv)
    config = published_config(options.model)
    names = tuple(options.only or LIBRARIES)
    todo = [GemmJob(options.model, options.batch, product, names) for product in products(config, options.batch)]
    return program.run("bench.gemms", options, GemmComparison, todo)


if __name__ == "__main__":
    sys.exit(main())
