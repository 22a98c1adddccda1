"""The plan's arithmetic against figures worked out by hand."""

import pytest

from launch.training.dry_run import NetworkCost, RunPlan, latents_bytes, state_bytes

P = 1_000


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (0, 2 + 2 + 16),
        (1, 2 + 2 + 16 / 4),
        (2, 2 + 2 / 4 + 16 / 4),
        (3, 20 / 4),
    ],
)
def test_bf16_state_per_parameter(stage, expected):
    """2 + 2 bytes of weights and gradients, 4 of master weights, 12 of exp_avg, exp_avg_sq and EMA; 4 processes."""
    assert state_bytes(P, stage, 4, bf16=True) == pytest.approx(expected * P)


def test_float32_keeps_a_master_copy_only_where_it_is_sharded():
    assert state_bytes(P, 0, 1, bf16=False) == (4 + 4 + 12) * P
    assert state_bytes(P, 1, 1, bf16=False) == (4 + 4 + 16) * P


def test_latents_on_disk():
    assert latents_bytes(10, 32, 16) == 10 * (2 * 32 * 256 * 4 + 8)


def test_lines_say_what_is_assumed_and_add_up():
    plan = RunPlan(
        title="t",
        networks=(NetworkCost("model", 10 * P, 9 * P, 3e9, 2.0**30),),
        frozen_parameters=0,
        num_images=1000,
        images_assumed=False,
        steps=50,
        global_batch_size=40,
        micro_batch_size=5,
        processes=2,
        stage=2,
        bf16=True,
    )
    text = "\n".join(plan.lines())
    assert "50 steps = 2.0 epochs of 1,000 images (counted)" in text
    assert "global batch 40 = 2 processes × micro-batch 5 × 4 accumulated; 20 images per GPU and step" in text
    assert "0.12 TFLOP per step" in text
    assert "activations 5.0 GiB" in text and "latents" not in text
    assert [line for line in text.splitlines() if "← this run" in line] == ["    ZeRO 2:     5.0 GiB   ← this run"]


def test_memory_is_said_in_units_of_1024_cubed():
    """64 · 2³⁰ parameters in float32, 20 bytes each (weights, gradients, three states), and 5 images of 1 GiB."""
    plan = RunPlan(
        title="t",
        networks=(NetworkCost("model", 2**36, 2**36, 1e9, 2.0**30),),
        frozen_parameters=2**34,
        num_images=1_000_000,
        images_assumed=True,
        steps=1,
        global_batch_size=5,
        micro_batch_size=5,
        processes=1,
        stage=0,
        bf16=False,
        latents=(32, 16),
    )
    lines = plan.lines()
    assert "  memory per GPU in float32 (estimated; activations 5.0 GiB of it):" in lines
    assert f"    ZeRO 0: {64 * 20 + 5 + 16 * 4:7,.1f} GiB   ← this run" in lines
    assert "  latents on disk: 65.5 GB (float32 32×16×16, two per image)" in lines  # disks are sold by powers of ten
