"""What goes into DeepSpeed's configuration: this project's own settings, a file, and overrides on top.

DeepSpeed itself is not imported: a dry run checks the same things without waiting for it.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from common.sections import PathText, Section
from launch.config_files import ConfigError, merge, read_mapping

DEEPSPEED_FILES = Path(__file__).parent / "deepspeed"

# What this project sets in DeepSpeed's configuration, and from which of its own keys.
OWN_DEEPSPEED_KEYS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "gradient_clipping": "optimizer.max_grad_norm",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "optimizer": "the optimizer section",
    "scheduler": "the optimizer section",
}


class DeepSpeedConfig(Section):
    """ZeRO stage, and anything else of DeepSpeed's own configuration: a JSON file, then `overrides` on top.

    `file` is a path, or the name of one of `launch/deepspeed/`.
    """

    zero_stage: Literal[0, 1, 2, 3] = 1
    file: PathText | None = None
    overrides: dict[str, Any] = Field(default_factory=dict)

    def merged_overrides(self) -> dict[str, Any]:
        """What goes on top of the configuration this project makes.

        Raises ConfigError where the file cannot be read or names another ZeRO stage.
        """
        shipped = DEEPSPEED_FILES / self.file if self.file else None
        content = {} if shipped is None else read_mapping(shipped if shipped.is_file() else self.file)
        merged = merge(content, self.overrides)
        zero = merged.get("zero_optimization", {})
        if not isinstance(zero, dict):
            raise ConfigError(f"deepspeed: zero_optimization is a section of keys, not {zero!r}")
        stage = zero.get("stage", self.zero_stage)
        if stage != self.zero_stage:
            raise ConfigError(f"deepspeed.zero_stage is {self.zero_stage}, but deepspeed.file or overrides say {stage}")
        for key, ours in OWN_DEEPSPEED_KEYS.items():
            if key in merged:
                raise ConfigError(f"deepspeed: {key} cannot be set there; it follows from {ours}")
        return merged


def deepspeed_config(*, stage: int, bf16: bool, micro_batch_size: int, accumulation: int, world_size: int,
                     overrides: dict) -> dict:
    """DeepSpeed's own configuration of one engine.

    Norm, clipping and overflow checks are the optimizer's (they read nothing on the host), so DeepSpeed's are off.
    So are, in bfloat16 under ZeRO 1 and 2, DeepSpeed's float32 master weights: the optimizer keeps them as a state, or
    else DeepSpeed would cast every gradient to float32 and every weight back. (It wants "bf16_optimizer_states" said
    then; ours stay float32.) `overrides` are merged before that.
    """
    config = {
        "train_batch_size": micro_batch_size * accumulation * world_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "steps_per_print": None,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": bf16, "check_grad_overflow": False},
        "timers": {"throughput": {"enabled": False}},  # it waits for the device in every step
    }
    if stage in (1, 2):
        # DeepSpeed's "reduce_scatter" is an all-reduce too, of a bucket it divides, cuts by owner and copies back.
        config["zero_optimization"] |= {"compute_grad_norm": False, "reduce_scatter": False}
    if stage == 3:
        # One group, so that the optimizer sees every gradient of this process at once.
        config["zero_optimization"]["sub_group_size"] = int(1e15)
    config = merge(config, overrides)
    if world_size == 1 and stage in (1, 2):
        # There is nobody to talk to while the backward pass goes on, and before it talks it waits for the device.
        config["zero_optimization"]["overlap_comm"] = False
    if bf16 and stage in (1, 2) and not _wants_float32_gradients(config):
        config["bf16"] |= {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    return config


def _wants_float32_gradients(config: dict) -> bool:
    """Whether DeepSpeed is to sum gradients in float32, or to keep optimizer states in another memory, as float32."""
    offload = config["zero_optimization"].get("offload_optimizer") or {}
    summed = config.get("data_types", {}).get("grad_accum_dtype")
    return summed == "fp32" or offload.get("device", "none") not in (None, "none")
