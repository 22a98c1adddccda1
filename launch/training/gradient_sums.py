"""What gradients are summed in, over the micro-batches of a step and over processes: `train.grad_sum_dtype`.

In bfloat16 a sum of n gradients has a relative error of about 2⁻⁹ for each addition, in float32 of 2⁻²⁴; what one
micro-batch's backward pass gives is rounded to the precision of the run either way.
"""

from typing import Any

from launch.config_files import ConfigError, merge
from launch.training.config import TrainConfig
from launch.training.deepspeed_options import DeepSpeedConfig

FLOAT32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}


def engine_options(train: TrainConfig, deepspeed: DeepSpeedConfig) -> dict[str, Any]:
    """DeepSpeed's options of a run: its own file and overrides, and those that `train.grad_sum_dtype` means.

    Raises ConfigError where the key cannot be had, or the two contradict each other.
    """
    options, dtype = deepspeed.merged_overrides(train.precision), train.grad_sum_dtype
    if dtype is None or train.precision == "float32":
        return options
    if dtype == "float32" and deepspeed.zero_stage == 0:
        raise ConfigError(
            "train.grad_sum_dtype is float32, but under deepspeed.zero_stage 0 in bfloat16 DeepSpeed sums gradients in "
            "bfloat16 only: use zero_stage 1, 2 or 3"
        )
    for path, other in (("data_types.grad_accum_dtype", "fp32"), ("communication_data_type", "fp32")):
        section, _, key = path.rpartition(".")
        found = (options.get(section) or {}).get(key) if section else options.get(key)
        if found is not None and (found == other) != (dtype == "float32"):
            raise ConfigError(
                f"train.grad_sum_dtype is {dtype}, but deepspeed.file or overrides say {path} {found}: keep one"
            )
    return merge(options, FLOAT32_SUMS) if dtype == "float32" else options
