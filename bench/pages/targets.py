"""Targets on one H200, and figures to hold against them: 128 images per step, optimizer and average included."""

from collections.abc import Callable
from dataclasses import dataclass

from bench import gemms
from bench.pages.measured import HEADLINE, Measured, tflops
from bench.workloads.published import published_config

Reader = Callable[[Measured], float | None]


@dataclass(frozen=True)
class Target:
    """One figure, higher is better.

    Attributes:
        name: of `bench/results/notes/<name>.md`, where it is written why it was missed.
        unit: "%" for fractions, "×" for ratios, or the word after the figure.
        limit: the most that arithmetic allows, in words; empty where nothing was derived.
        read: the figure from rows; None where nothing measures it yet.
    """

    name: str
    metric: str
    target: float
    moonshot: float
    unit: str
    limit: str = ""
    read: Reader = lambda gpu: None

    def text(self, value: float) -> str:
        if self.unit == "%":
            return f"{value:.1%}".replace("%", " %")
        return f"{value:,.2f}".rstrip("0").rstrip(".") + f" {self.unit}" if value < 100 else f"{value:,.0f} {self.unit}"


def trained(gpu: Measured) -> float | None:
    row = gpu.step("trainer")
    return None if row is None else row["images_per_second"]


def over(peer: str) -> Reader:
    """Times that the trainer's steps are faster than this provider's."""
    return lambda gpu: (gpu.step("trainer") or {}).get("times_faster_than", {}).get(peer)


def of_copy(op: str, direction: str = "forward") -> Reader:
    return lambda gpu: (gpu.representative(op, direction) or {}).get("fraction")


def attention(direction: str) -> Reader:
    def read(gpu: Measured) -> float | None:
        row = gpu.representative("rope_attention", direction)
        return None if row is None else tflops(row)

    return read


def fastest(kind: str, figure: str = "images_per_second", **names: str) -> Reader:
    """The highest figure among our own rows of a kind that have these names."""

    def read(gpu: Measured) -> float | None:
        rows = (row for row in gpu.numbers(kind) if row.get("ours", True) and names.items() <= row.items())
        return max((row[figure] for row in rows), default=None)

    return read


def loss_ratio(gpu: Measured) -> float | None:
    """Forward and backward together, as a training step has them."""
    rows = [gpu.representative("vf_loss", direction) for direction in ("forward", "backward")]
    compared = [row for row in rows if row and "eager" in row["times_faster_than"]]
    if len(compared) < len(rows):
        return None
    eager = sum(row["p50_us"] * row["times_faster_than"]["eager"] for row in compared)
    return eager / sum(row["p50_us"] for row in compared)


def gemm_mean(gpu: Measured) -> float | None:
    """TFLOP/s of a step's products, each alone, as torch runs them."""
    return gemms.means(gpu.numbers("gemm")).get((*HEADLINE, "torch"))


def gemm_rate(gpu: Measured) -> float | None:
    """TFLOP/s within a step: the blocks' four matrix products and their gradients, over all time in such kernels."""
    row = gpu.step("trainer") or gpu.step("bare")
    if not row or not (spent := row.get("breakdown_ms", {}).get("gemm")):
        return None
    config = published_config(HEADLINE[0])
    per_token = 4 * config.hidden_size**2 + 3 * config.hidden_size * config.mlp_hidden
    return 3 * 2 * config.depth * config.num_tokens * per_token * row["batch"] / spent / 1e9


TARGETS = [
    Target("training", "training, bfloat16", 650, 750, "images/s", "860 to 934", trained),
    Target("training-fp8", "training, fp8", 780, 900, "images/s", "about 1,070"),
    Target("plain-eager", "training, over the plain model in eager", 3, 4, "×", "", over("plain-eager")),
    Target(
        "plain-compile", "training, over the plain model under torch.compile", 1.3, 1.6, "×", "", over("plain-compile")
    ),
    Target("gemm", "matrix products of a step, mean", 680, 720, "TFLOP/s", "790", gemm_mean),
    Target(
        "gated-norm-forward",
        "gated residual + norm + modulate, forward, of a copy",
        0.88,
        0.93,
        "%",
        "100 %",
        of_copy("gated_residual_adaln_rms_norm"),
    ),
    Target(
        "gated-norm-backward",
        "gated residual + norm + modulate, backward, of a copy",
        0.78,
        0.88,
        "%",
        "100 %",
        of_copy("gated_residual_adaln_rms_norm", "backward"),
    ),
    Target("swiglu-forward", "SwiGLU, forward, of a copy", 0.90, 0.94, "%", "100 %", of_copy("swiglu")),
    Target("swiglu-backward", "SwiGLU, backward, of a copy", 0.85, 0.92, "%", "100 %", of_copy("swiglu", "backward")),
    Target("attention-forward", "`rope_attention`, forward", 300, 385, "TFLOP/s", "550", attention("forward")),
    Target("attention-backward", "`rope_attention`, backward", 250, 345, "TFLOP/s", "688", attention("backward")),
    Target("optimizer", "AdamW + average + bfloat16 copy, of a copy", 0.88, 0.93, "%", "100 %", of_copy("adamw_ema_")),
    Target("vf-loss", "VF loss, over eager", 4, 8, "×", "", loss_ratio),
    Target(
        "sampling",
        "sampling, 250 Euler steps, guided",
        4.2,
        5.2,
        "images/s",
        "7.7",
        fastest("sampling", model=HEADLINE[0]),
    ),
    Target("encode", "tokenizer, encoding", 2000, 3000, "images/s", "5,700", fastest("tokenizer", part="encode")),
    Target("decode", "tokenizer, decoding", 1100, 1600, "images/s", "3,130", fastest("tokenizer", part="decode")),
    Target("vavae", "VA-VAE training", 40, 80, "images/s", "", fastest("tokenizer", part="train")),
    Target("images", "JPEG decoding and crop, 16 cores and the GPU", 2500, 6000, "images/s", "", fastest("images")),
    Target(
        "latents-host",
        "latents loader, on the host",
        50_000,
        200_000,
        "latents/s",
        "",
        fastest("data", "latents_per_second", provider="latents"),
    ),
    Target(
        "latents-device",
        "latents loader, on the GPU",
        1_000_000,
        5_000_000,
        "latents/s",
        "",
        fastest("data", "latents_per_second", provider="latents-device", memory="cuda"),
    ),
]


def verdict(target: Target, value: float) -> str:
    return "moonshot" if value >= target.moonshot else "reached" if value >= target.target else "missed"


def missed(gpu: Measured) -> dict[Target, float]:
    """Target → the figure that misses it."""
    figures = {target: target.read(gpu) for target in TARGETS}
    return {target: value for target, value in figures.items() if value is not None and value < target.target}
