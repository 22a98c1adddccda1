"""`train.grad_sum_dtype`: sums of gradients over micro-batches and processes, and what it contradicts."""

from pathlib import Path

import pytest

from launch.config import ConfigError
from launch.training.config import TrainConfig
from launch.training.deepspeed_options import DeepSpeedConfig
from launch.training.gradient_sums import engine_options
from tests.gradient_sums import measured

README = Path(__file__).parents[1] / "launch" / "README.md"

#: Bytes a parameter that one process hands to collectives, of a weight (2) and a gradient (2 or 4) in 4 micro-batches.
SENT = {1: lambda g: g + 2, 2: lambda g: 4 * g + 2, 3: lambda g: 4 * (2 * 2 + g)}


def test_sums_have_the_errors_of_their_dtype_and_take_what_the_readme_says(tmp_path):
    """Against float64, over two processes and four micro-batches of each; bfloat16 has 2¹⁶ times coarser steps."""
    found = measured(tmp_path)
    for stage in (1, 2, 3):
        rounded, exact = found[f"{stage} bfloat16"], found[f"{stage} float32"]
        assert 3e-4 < rounded["error"] < 1e-2 and exact["error"] < 2e-7, stage
        assert exact["error"] * 2**12 < rounded["error"], stage
        sent = [each["sent"] for each in (rounded, exact)]
        assert sent == pytest.approx([SENT[stage](2), SENT[stage](4)], rel=0.01), stage
        row = f"| ZeRO {stage}, bfloat16 / float32 | {_power(rounded['error'])} / {_power(exact['error'])} | "
        row += " / ".join(f"{each:.0f}" for each in sent) + f" | {rounded['alive']:.0f} / {exact['alive']:.0f} |"
        assert row in README.read_text("utf-8")


def _power(value: float) -> str:
    return f"{value:.1e}".replace("e-0", "e-")


def options(dtype: str | None, stage: int = 1, precision: str = "bfloat16", **overrides) -> dict:
    train = TrainConfig(grad_sum_dtype=dtype, precision=precision)
    found = engine_options(train, DeepSpeedConfig(zero_stage=stage, overrides=overrides))
    return {key: value for key, value in found.items() if key != "zero_optimization"}


def test_what_the_key_means_beside_deepspeeds_own_options():
    float32 = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    assert options("float32") == options("float32", **float32) == options(None, **float32) == float32
    assert options(None) == options("bfloat16") == options("float32", precision="float32") == {}
    assert options("bfloat16", communication_data_type="bf16") == {"communication_data_type": "bf16"}


@pytest.mark.parametrize(
    ("dtype", "stage", "overrides", "said"),
    [
        ("float32", 0, {}, "grad_sum_dtype is float32, but under deepspeed.zero_stage 0 in bfloat16"),
        ("float32", 1, {"communication_data_type": "bf16"}, "float32, but .* communication_data_type bf16: keep one"),
        ("bfloat16", 2, {"data_types": {"grad_accum_dtype": "fp32"}}, "bfloat16, but .*grad_accum_dtype fp32: keep"),
    ],
)
def test_contradictions_are_refused(dtype, stage, overrides, said):
    with pytest.raises(ConfigError, match=said):
        options(dtype, stage, **overrides)


def test_bfloat16_sums_of_float32_gradients_are_refused():
    with pytest.raises(ValueError, match="grad_sum_dtype bfloat16 would round gradients"):
        TrainConfig(grad_sum_dtype="bfloat16", precision="float32")
