"""The names of DeepSpeed's options: all that it knows are allowed or refused, and what is refused says why."""

import pytest

from launch.config import ConfigError
from launch.training.deepspeed_options import (
    DataTypes,
    DeepSpeedConfig,
    DeepSpeedOptions,
    FlopsProfiler,
    OffloadOptimizer,
    OffloadParam,
    Options,
    ZeroOptimization,
)
from launch.training.engine import start_processes
from tests.test_launch_deepspeed_options import said, zero


def recorded_keys() -> set[str]:
    """Every key that DeepSpeed looks for in its configuration."""
    from deepspeed.runtime.config import DeepSpeedConfig as Theirs

    asked = set()

    class Recording(dict):
        def get(self, key, *default):
            asked.add(key)
            return super().get(key, *default)

        def __getitem__(self, key):
            asked.add(key)
            return super().__getitem__(key)

        def __contains__(self, key):
            asked.add(key)
            return super().__contains__(key)

        def keys(self):
            return self

    start_processes()
    Theirs(Recording(train_batch_size=1))
    return asked


def deepspeeds_keys() -> dict[type[Options], set[str]]:
    from deepspeed.profiling import constants as profiler
    from deepspeed.runtime import config, constants
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    def fields(model) -> set[str]:
        return {*model.model_fields, *(f.alias for f in model.model_fields.values() if f.alias)}

    texts = {name: value for name, value in vars(profiler).items() if isinstance(value, str) and "FORMAT" not in name}
    return {
        DeepSpeedOptions: recorded_keys() | set(config._REMOVED_TOP_LEVEL_CONFIG_KEYS),
        ZeroOptimization: fields(DeepSpeedZeroConfig) | set(config._REMOVED_ZERO_CONFIG_KEYS),
        OffloadOptimizer: fields(DeepSpeedZeroOffloadOptimizerConfig),
        OffloadParam: fields(DeepSpeedZeroOffloadParamConfig),
        DataTypes: {
            constants.GRAD_ACCUM_DTYPE,
            constants.PARAM_DTYPE,
            constants.BUFFER_DTYPE,
            constants.KEEP_IN_FP32_MODULES,
        },
        FlopsProfiler: {text for name, text in texts.items() if name.startswith("FLOPS_PROFILER_")},
    }


def test_each_key_that_deepspeed_knows_is_allowed_or_refused_with_a_reason():
    for section, keys in deepspeeds_keys().items():
        may, refused = set(section.model_fields), set(section.refused)
        assert may | refused == keys and not may & refused, section
        assert all(reason.strip() for reason in section.refused.values())


def refusal(options: dict, stage: int = 1, precision: str = "bfloat16") -> str:
    with pytest.raises(ConfigError) as e:
        DeepSpeedConfig(zero_stage=stage, overrides=options).merged_overrides(precision)
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize(
    ("options", "near"),
    [
        ({"zero_optimisation": {"overlap_comm": True}}, "zero_optimization"),
        ({"zero_optimization": {"overlap_com": True}}, "overlap_comm"),
        ({"zero_optimization": {"reduce_bucketsize": 5}}, "reduce_bucket_size"),
        ({"zero_optimization": {"offload_optimizer": {"pinmemory": True}}}, "pin_memory"),
        ({"zero_optimization": {"stage3_prefetch_bucket": 5}}, "stage3_prefetch_bucket_size"),
        ({"data_types": {"grad_acum_dtype": "fp32"}}, "grad_accum_dtype"),
        ({"flops_profiler": {"enable": True}}, "enabled"),
        ({"gradient_cliping": 1.0}, "gradient_clipping"),
        ({"communication_datatype": "bf16"}, "communication_data_type"),
        ({"wallclock_breakdown": True}, "wall_clock_breakdown"),
    ],
)
def test_a_misspelt_key_at_any_depth_names_the_nearest(options, near):
    (wrong,) = said(options)
    misspelt = wrong.split(".")[-1] if next(iter(options)) in DeepSpeedOptions.model_fields else next(iter(options))
    assert f"DeepSpeed has no key {misspelt!r} (did you mean {near!r}?)" in refusal(options)


WHERE = {
    DeepSpeedOptions: (),
    ZeroOptimization: ("zero_optimization",),
    OffloadOptimizer: ("zero_optimization", "offload_optimizer"),
    OffloadParam: ("zero_optimization", "offload_param"),
    DataTypes: ("data_types",),
}


@pytest.mark.parametrize("section", WHERE)
def test_what_cannot_be_set_is_refused_with_its_reason(section):
    assert section.refused
    for key, reason in section.refused.items():
        options = {key: 1}
        for part in reversed(WHERE[section]):
            options = {part: options}
        assert f"{key} cannot be set there: {reason}" in refusal(options, stage=3), key


@pytest.mark.parametrize(
    ("stage", "options", "says"),
    [
        (1, zero(offload_optimizer={"device": "nvme"}), "zero_optimization.offload_optimizer.device: nvme swaps"),
        (3, zero(offload_param={"device": "nvme"}), "zero_optimization.offload_param.device: nvme swaps"),
        (1, zero(offload_optimizer={"device": "gpu"}), "must be 'none' or 'cpu' (got 'gpu')"),
        (1, {"communication_data_type": "fp16"}, "communication_data_type: fp16 cannot hold gradients above 65,504"),
        (1, {"data_types": {"grad_accum_dtype": "fp16"}}, "must be 'fp32' (got 'fp16')"),
        (0, {"data_types": {"grad_accum_dtype": "fp32"}}, "grad_accum_dtype fp32 needs zero_stage 1, 2 or 3"),
        (1, zero(overlap_comm="yes"), "zero_optimization.overlap_comm: true or false is wanted (got 'yes')"),
        (1, zero(reduce_bucket_size=-5), "must be at least 1 (got -5)"),
        (1, zero(reduce_bucket_size=0.5), "a whole number is wanted (got 0.5)"),
        (2, zero(allgather_bucket_size=101), "multiple of 2"),
        (0, zero(overlap_comm=True), "overlap_comm means nothing under ZeRO 0, only under 1, 2 and 3"),
        (
            1,
            zero(stage3_prefetch_bucket_size=5),
            "stage3_prefetch_bucket_size means nothing under ZeRO 1, only under 3",
        ),
        (2, zero(offload_param={"device": "cpu"}), "offload_param means nothing under ZeRO 2, only under 3"),
        (3, zero(allgather_bucket_size=6), "allgather_bucket_size means nothing under ZeRO 3, only under 1 and 2"),
        (1, zero(stage=2), "deepspeed.zero_stage is 1, but deepspeed.file or overrides say 2"),
        (1, {"zero_optimization": True}, "zero_optimization: a section of keys is wanted (got True)"),
        (1, {"flops_profiler": [1]}, "flops_profiler: a section of keys is wanted"),
    ],
)
def test_a_value_that_is_no_good_is_refused(stage, options, says):
    assert says in refusal(options, stage)


def test_the_file_is_named_where_the_fault_is_in_it(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"overlap_com": true}}')
    with pytest.raises(ConfigError, match=rf"{path}: zero_optimization: DeepSpeed has no key 'overlap_com'"):
        DeepSpeedConfig(file=str(path)).merged_overrides("float32")
    path.write_text('{"zero_optimization": {"reduce_bucket_size": 5e8, "overlap_comm": true}}')
    config = DeepSpeedConfig(file=str(path), overrides=zero(overlap_comm=False))
    merged = config.merged_overrides("float32")
    assert merged == zero(stage=1, reduce_bucket_size=500_000_000, overlap_comm=False)
    assert type(merged["zero_optimization"]["reduce_bucket_size"]) is int
