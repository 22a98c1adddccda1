"""What is aimed at and what of it was reached, on one H200: 128 images per step, optimizer and average included."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from bench import gemms
from bench.measure.rows import Row
from bench.pages.measured import HEADLINE, Measured, tflops
from lightningdit.config import named_config

Reader = Callable[[Measured], float | None]


@dataclass(frozen=True)
class Target:
    """One figure, higher is better.

    Attributes:
        name: of `bench/results/notes/<name>.md`, where it is written why it was missed.
        unit: "%" for fractions, "×" for ratios, or what follows the figure.
        limit: what arithmetic allows, in words; empty where nothing was derived.
        read: the figure from rows; None where nothing measures it yet.
    """

    name: str
    metric: str
    target: float
    moonshot: float
    unit: str
    limit: str = ""
    read: Reader = lambda measured: None

    def text(self, value: float) -> str:
        if self.unit == "%":
            return f"{value:.1%}".replace("%", " %")
        return f"{value:,.2f}".rstrip("0").rstrip(".") + f" {self.unit}" if value < 100 else f"{value:,.0f} {self.unit}"


def rate(variant: str, measured: Measured) -> float | None:
    row = measured.step(variant)
    return row and row["images_per_second"]


def ratio(peer: str, measured: Measured) -> float | None:
    row = measured.step("trainer")
    return row and row["times_faster_than"].get(peer)


def of_copy(op: str, direction: str, measured: Measured) -> float | None:
    row = measured.representative(op, direction)
    return row and row["fraction"]


def attention(direction: str, measured: Measured) -> float | None:
    row = measured.representative("rope_attention", direction)
    return row and tflops(row)


def loss_ratio(measured: Measured) -> float | None:
    """Forward and backward together, as a training step has them."""
    rows = [measured.representative("vf_loss", direction) for direction in ("forward", "backward")]
    if not all(row and "eager" in row["times_faster_than"] for row in rows):
        return None
    return sum(row["p50_us"] * row["times_faster_than"]["eager"] for row in rows) / sum(row["p50_us"] for row in rows)


def gemm_mean(measured: Measured) -> float | None:
    """TFLOP/s of a step's products, each alone, as torch runs them."""
    return gemms.means(measured.numbers("gemm")).get((*HEADLINE, "torch"))


def gemm_rate(measured: Measured) -> float | None:
    """TFLOP/s within a step: the blocks' four matrix products and their gradients, over all time in such kernels."""
    row = measured.step("trainer") or measured.step("bare")
    if not row or not (spent := row.get("breakdown_ms", {}).get("gemm")):
        return None
    config = named_config(HEADLINE[0], input_size=16, in_channels=32, use_swiglu=True, use_rope=True, use_rmsnorm=True)
    per_token = 4 * config.hidden_size**2 + 3 * config.hidden_size * config.mlp_hidden
    return 3 * 2 * config.depth * config.num_tokens * per_token * row["batch"] / spent / 1e9


def sampling(measured: Measured) -> float | None:
    """Of the best of our samplers, its images decoded."""
    return _fastest(row for row in measured.numbers("sampling") if row["model"] == HEADLINE[0])


def tokenizer(part: str, measured: Measured) -> float | None:
    return _fastest(row for row in measured.numbers("tokenizer") if row["part"] == part)


def _fastest(rows: Iterable[Row]) -> float | None:
    return max((row["images_per_second"] for row in rows if row["ours"]), default=None)


def loader(measured: Measured) -> float | None:
    rows = [row for row in measured.numbers("data") if row["provider"] == "latents"]
    return max((row["latents_per_second"] for row in rows), default=None)


def _passes(name: str, metric: str, op: str, forward: tuple, backward: tuple) -> list[Target]:
    return [Target(f"{name}-{direction}", f"{metric}, {direction}, of a copy", *figures, "%", "100 %",
                   partial(of_copy, op, direction))
            for direction, figures in (("forward", forward), ("backward", backward))]  # fmt: skip


TARGETS = [
    Target("training", "training, bfloat16", 650, 750, "images/s", "860 to 934", partial(rate, "trainer")),
    Target("training-fp8", "training, fp8", 780, 900, "images/s", "about 1,070"),
    Target("plain-eager", "training, over the plain model in eager", 3, 4, "×", "", partial(ratio, "plain-eager")),
    Target("plain-compile", "training, over the plain model under torch.compile", 1.3, 1.6, "×", "",
           partial(ratio, "plain-compile")),
    Target("gemm", "matrix products of a step, mean", 680, 720, "TFLOP/s", "790", gemm_mean),
    *_passes("gated-norm", "gated residual + norm + modulate", "gated_residual_adaln_rms_norm",
             (0.88, 0.93), (0.78, 0.88)),
    *_passes("swiglu", "SwiGLU", "swiglu", (0.90, 0.94), (0.85, 0.92)),
    Target("attention-forward", "`rope_attention`, forward", 300, 385, "TFLOP/s", "550", partial(attention, "forward")),
    Target("attention-backward", "`rope_attention`, backward", 250, 345, "TFLOP/s", "688",
           partial(attention, "backward")),
    Target("optimizer", "AdamW + average + bfloat16 copy, of a copy", 0.88, 0.93, "%", "100 %",
           partial(of_copy, "adamw_ema_", "forward")),
    Target("vf-loss", "VF loss, over eager", 4, 8, "×", "", loss_ratio),
    Target("sampling", "sampling, 250 Euler steps, guided", 4.2, 5.2, "images/s", "7.7", sampling),
    Target("encode", "tokenizer, encoding", 2000, 3000, "images/s", "5,700", partial(tokenizer, "encode")),
    Target("decode", "tokenizer, decoding", 1100, 1600, "images/s", "3,130", partial(tokenizer, "decode")),
    Target("vavae", "VA-VAE training", 40, 80, "images/s", "", partial(tokenizer, "train")),
    Target("images", "JPEG decoding and crop, 16 cores and the GPU", 2500, 6000, "images/s"),
    Target("latents-host", "latents loader, on the host", 50_000, 200_000, "latents/s", "", loader),
    Target("latents-device", "latents loader, on the GPU", 1_000_000, 5_000_000, "latents/s"),
]  # fmt: skip


def verdict(target: Target, value: float | None) -> str:
    if value is None:
        return ""
    return "moonshot" if value >= target.moonshot else "reached" if value >= target.target else "missed"


def missed(measured: Measured) -> list[Target]:
    return [target for target in TARGETS if verdict(target, target.read(measured)) == "missed"]
