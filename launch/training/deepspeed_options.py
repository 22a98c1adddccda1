"""DeepSpeed's configuration: this project's own settings, a file, and overrides on top.

The sections below have the keys that a run may set; each takes real steps in a test. What a run leaves out is
DeepSpeed's choice. `refused` holds every other key that DeepSpeed knows, with the reason; what is in neither is
misspelt. DeepSpeed itself is not imported: a dry run checks the same things without waiting for it, and a test compares
the names with DeepSpeed's own.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from common.sections import Count, NonNegative, PathText, Section, describe
from common.text import nearest
from launch.config_files import ConfigError, config_note, find_config, merge, read_mapping

DEEPSPEED_FILES = Path(__file__).parents[1] / "deepspeed"

_PRECISION = "it follows from train.precision"
_OPTIMIZER = "it follows from the optimizer section"
_LOGGED = "a run's own log and TensorBoard files say it"
_OTHER_CHECKPOINTS = "it is for DeepSpeed's own checkpoints, which are not written here"
_OTHER_OPTIMIZERS = "it is for DeepSpeed's own optimizers; this project's is another"
_OTHER_MODELS = "it is for models of another kind"
_OTHER_DATA = "samples come from this project's own loader"
_ROUNDS = "it rounds weights or gradients to 8 bits"
_FLOAT16 = "it is for sums in float16; bfloat16 has the range of float32"
_NVME = "it is for nvme, which swaps the states of DeepSpeed's own optimizers only"
_REMOVED = "DeepSpeed has removed it"


UNSET: Any = None


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Elements = Annotated[int, BeforeValidator(_whole), Field(ge=1, le=10**15)]
ElementsFrom0 = Annotated[int, BeforeValidator(_whole), Field(ge=0, le=10**15)]


class Options(Section):
    """Keys that may be set in one section of DeepSpeed's configuration, and reasons against the others it has."""

    refused: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_keys(cls, values: Any) -> Any:
        for key in values if isinstance(values, dict) else ():
            if key in cls.refused:
                raise ValueError(f"{key} cannot be set there: {cls.refused[key]}")
            if key not in cls.model_fields:
                raise ValueError(f"DeepSpeed has no key {key!r}{nearest(str(key), [*cls.model_fields, *cls.refused])}")
        return values


def _not_nvme(value: Any) -> Any:
    if value == "nvme":
        raise ValueError("nvme swaps the states of DeepSpeed's own optimizers only: use cpu, which is host memory")
    return value


class Offload(Options):
    """The device that something is kept on: "cpu" is the host's memory."""

    device: Annotated[Literal["none", "cpu"], BeforeValidator(_not_nvme)] = UNSET
    pin_memory: bool = UNSET


class OffloadOptimizer(Offload):
    """`zero_optimization.offload_optimizer`: master weights and states, and the update of them."""

    refused: ClassVar = {
        **dict.fromkeys(("nvme_path", "buffer_count", "pipeline_read", "pipeline_write", "fast_init"), _NVME),
        **dict.fromkeys(("ratio", "super_offload", "cpuadam_cores_perc"), _OTHER_OPTIMIZERS),
    }


class OffloadParam(Offload):
    """`zero_optimization.offload_param`: the weights in use."""

    refused: ClassVar = dict.fromkeys(("nvme_path", "buffer_count", "buffer_size", "max_in_cpu"), _NVME)


class ZeroOptimization(Options):
    """`zero_optimization`: sizes are numbers of elements."""

    stage: Literal[0, 1, 2, 3] = UNSET
    contiguous_gradients: bool = UNSET
    overlap_comm: bool | None = UNSET
    reduce_scatter: bool = UNSET
    use_multi_rank_bucket_allreduce: bool = UNSET
    reduce_bucket_size: Elements = UNSET
    allgather_bucket_size: Annotated[Elements, Field(multiple_of=2)] = UNSET
    parameter_alignment: bool = UNSET
    offload_optimizer: OffloadOptimizer | None = UNSET
    offload_param: OffloadParam | None = UNSET
    stage3_prefetch_bucket_size: ElementsFrom0 = UNSET
    stage3_param_persistence_threshold: ElementsFrom0 = UNSET
    stage3_model_persistence_threshold: ElementsFrom0 = UNSET
    stage3_max_live_parameters: ElementsFrom0 = UNSET
    stage3_max_reuse_distance: ElementsFrom0 = UNSET
    stage3_module_granularity_threshold: ElementsFrom0 = UNSET
    stage3_use_all_reduce_for_fetch_params: bool = UNSET
    stage3_allgather_sequential: bool = UNSET
    memory_efficient_linear: bool = UNSET

    refused: ClassVar = {
        "sub_group_size": "each group of parameters would count as a step of the optimizer",
        "round_robin_gradients": "DeepSpeed then reads and writes a parameter's master weights at another one's place",
        "compute_grad_norm": "it follows from what else is set",
        "allgather_partitions": "DeepSpeed no longer reads it",
        "zenflow": _OTHER_OPTIMIZERS,
        "save_muon_momentum_buffer_in_memory": _OTHER_OPTIMIZERS,
        "zero_hpz_partition_size": "it keeps weights in groups that the checkpoints do not know",
        "zero_quantized_weights": _ROUNDS,
        "zero_quantized_nontrainable_weights": _ROUNDS,
        "zero_quantized_gradients": _ROUNDS,
        "ignore_unused_parameters": "every parameter that is trained has a gradient",
        "leaf_module": _OTHER_MODELS,
        "override_module_apply": _OTHER_MODELS,
        "log_trace_cache_warnings": "it is for finding faults of DeepSpeed",
        "enable_sanity_checks": "it is for finding faults of DeepSpeed",
        **dict.fromkeys(
            (
                "load_from_fp32_weights",
                "elastic_checkpoint",
                "pipeline_loading_checkpoint",
                "gather_16bit_weights_on_model_save",
                "stage3_gather_16bit_weights_on_model_save",
                "stage3_gather_fp16_weights_on_model_save",
            ),
            _OTHER_CHECKPOINTS,
        ),
        **{
            name: f"its name is stage3_{name}"
            for name in (
                "prefetch_bucket_size",
                "param_persistence_threshold",
                "model_persistence_threshold",
                "max_live_parameters",
                "max_reuse_distance",
                "module_granularity_threshold",
                "use_all_reduce_for_fetch_params",
                "allgather_sequential",
            )
        },
        "cpu_offload": "its name is offload_optimizer",
        "cpu_offload_param": "its name is offload_param",
        "cpu_offload_use_pin_memory": "its name is offload_optimizer.pin_memory or offload_param.pin_memory",
        **dict.fromkeys(
            ("legacy_stage1", "mics_shard_size", "mics_hierarchical_params_gather", "zeropp_loco_param"), _REMOVED
        ),
    }

    @model_validator(mode="after")
    def _check(self):
        for key in self.model_fields_set - {"stage"}:
            allowed = (3,) if key.startswith("stage3_") else _STAGES.get(key, (1, 2, 3))
            if self.stage not in allowed:
                stages = " and ".join(map(str, allowed)) if len(allowed) < 3 else "1, 2 and 3"
                raise ValueError(f"{key} means nothing under ZeRO {self.stage}, only under {stages}")
        return self


#: The ZeRO stages in which a key has an effect, if not in 1, 2 and 3.
_STAGES = {
    **dict.fromkeys(
        ("reduce_scatter", "use_multi_rank_bucket_allreduce", "allgather_bucket_size", "parameter_alignment"), (1, 2)
    ),
    **dict.fromkeys(("offload_param", "memory_efficient_linear"), (3,)),
}


class DataTypes(Options):
    """`data_types`: what the gradients of micro-batches are summed in."""

    grad_accum_dtype: Literal["fp32"] | None = UNSET

    refused: ClassVar = dict.fromkeys(("param_dtype", "buffer_dtype", "keep_in_fp32_modules"), _PRECISION)


class FlopsProfiler(Options):
    """`flops_profiler`: prints FLOPs and times of one step, or writes them to a file."""

    enabled: bool = UNSET
    recompute_fwd_factor: NonNegative = UNSET
    profile_step: Count = UNSET
    module_depth: Annotated[int, Field(ge=-1, le=1000)] = UNSET
    top_modules: Count = UNSET
    detailed: bool = UNSET
    output_file: PathText | None = UNSET


def _not_float16(value: Any) -> Any:
    if value == "fp16":
        raise ValueError(
            "fp16 cannot hold gradients above 65,504, and such steps would all be skipped: use bf16 or fp32"
        )
    return value


class DeepSpeedOptions(Options):
    """The whole of DeepSpeed's configuration."""

    zero_optimization: ZeroOptimization = UNSET
    data_types: DataTypes = UNSET
    communication_data_type: Annotated[Literal["bf16", "fp32"] | None, BeforeValidator(_not_float16)] = UNSET
    flops_profiler: FlopsProfiler = UNSET
    wall_clock_breakdown: bool = UNSET
    memory_breakdown: bool = UNSET

    refused: ClassVar = {
        "train_batch_size": "it follows from train.global_batch_size",
        "train_micro_batch_size_per_gpu": "it follows from train.micro_batch_size",
        "gradient_accumulation_steps": "it follows from train.global_batch_size and train.micro_batch_size",
        "managed_gradient_accumulation": "it follows from train.global_batch_size and train.micro_batch_size",
        "gradient_clipping": "it follows from optimizer.max_grad_norm",
        **dict.fromkeys(("bf16", "bfloat16", "fp16", "torch_autocast", "amp"), _PRECISION),
        **dict.fromkeys(("optimizer", "scheduler"), _OPTIMIZER),
        "zero_allow_untested_optimizer": "this project's optimizer is known to work under every stage",
        "zero_force_ds_cpu_optimizer": _OTHER_OPTIMIZERS,
        "gradient_allreduce_op": "a step's gradient is the mean over its images",
        **dict.fromkeys(("prescale_gradients", "gradient_predivide_factor"), _FLOAT16),
        "disable_allgather": "DeepSpeed no longer reads it",
        "disable_python_gc": "it has not been tried here",
        "compile": "it follows from train.compile",
        "activation_checkpointing": "it follows from train.use_checkpoint",
        "aio": _NVME,
        **dict.fromkeys(
            (
                "steps_per_print",
                "dump_state",
                "log_level",
                "comms_logger",
                "timers",
                "tensorboard",
                "wandb",
                "csv_monitor",
                "comet",
            ),
            _LOGGED,
        ),
        **dict.fromkeys(("checkpoint", "datastates_ckpt"), _OTHER_CHECKPOINTS),
        **dict.fromkeys(("dataloader_drop_last", "data_efficiency"), _OTHER_DATA),
        **dict.fromkeys(
            (
                "expert_parallel",
                "use_data_before_expert_parallelism",
                "hybrid_engine",
                "pipeline",
                "tensor_parallel",
                "sequence_parallel_size",
                "seq_parallel_communication_data_type",
                "vocabulary_size",
                "weight_quantization",
            ),
            _OTHER_MODELS,
        ),
        "autotuning": "it is for DeepSpeed's launcher, which starts programs over and over",
        **dict.fromkeys(
            (
                "compression_training",
                "curriculum_learning",
                "eigenvalue",
                "elasticity",
                "graph_harvesting",
                "nebula",
                "progressive_layer_drop",
                "quantize_training",
                "sparse_attention",
                "sparse_gradients",
            ),
            _REMOVED,
        ),
    }


class DeepSpeedConfig(Section):
    """ZeRO stage, and what of DeepSpeed's own configuration may be set: a JSON file, then `overrides` on top.

    `file` is a path, or the name of one of `launch/deepspeed/`; a file here comes first, as with run files.
    """

    zero_stage: Literal[0, 1, 2, 3] = 1
    file: PathText | None = None
    overrides: dict[str, Any] = Field(default_factory=dict)

    def merged_overrides(self, precision: str) -> dict[str, Any]:
        """Options of file and overrides, to merge into the configuration this project makes for a run in `precision`.

        Raises ConfigError where the file cannot be read, a key is misspelt, has no effect or cannot be set, a value is
        not allowed, or file and overrides are for another ZeRO stage.
        """
        content = {}
        if self.file is not None:
            path = find_config(self.file, DEEPSPEED_FILES)
            try:
                content = read_mapping(path)
            except ConfigError as e:
                raise ConfigError(f"deepspeed.file: {e}") from None
            content = self._checked(content, f"deepspeed.file {path}")
        merged = self._checked(merge(content, self.overrides), "deepspeed.overrides")
        summed = merged.get("data_types", {}).get("grad_accum_dtype")
        if summed is not None and self.zero_stage == 0 and precision == "bfloat16":
            raise ConfigError(
                "deepspeed: under ZeRO 0 in bfloat16 DeepSpeed sums gradients in bfloat16 only; "
                "data_types.grad_accum_dtype fp32 needs zero_stage 1, 2 or 3"
            )
        return merged

    def notes(self) -> list[str]:
        """A note on which file was taken where `file` has the name of a shipped one."""
        which = [] if self.file is None else config_note(self.file, DEEPSPEED_FILES)
        return [f"deepspeed.file {self.file}: {note}" for note in which]

    def _checked(self, options: dict, where: str) -> dict[str, Any]:
        zero = options.get("zero_optimization", {})
        stage = zero.get("stage", self.zero_stage) if isinstance(zero, dict) else None
        if stage is not None and stage != self.zero_stage:
            raise ConfigError(f"deepspeed.zero_stage is {self.zero_stage}, but deepspeed.file or overrides say {stage}")
        try:
            staged = merge({"zero_optimization": {"stage": self.zero_stage}}, options)
            return DeepSpeedOptions.model_validate(staged).model_dump(exclude_unset=True)
        except ValidationError as e:
            raise ConfigError(f"{where}: {describe(e)}") from None


def deepspeed_config(
    *, stage: int, bf16: bool, micro_batch_size: int, accumulation: int, world_size: int, overrides: dict
) -> dict:
    """DeepSpeed's own configuration of one engine.

    Norm, clipping and overflow checks are the optimizer's (they read nothing on the host), so DeepSpeed's are off.
    So are, in bfloat16 under ZeRO 1 and 2, DeepSpeed's float32 master weights: the optimizer keeps them as a state, or
    else DeepSpeed would cast every gradient to float32 and every weight back. (It wants "bf16_optimizer_states" said
    then; ours stay float32.) `overrides` are merged before that.
    """
    config: dict[str, Any] = {
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
        config["zero_optimization"]["reduce_scatter"] = False
    if stage == 3:
        # One group, so that the optimizer sees every gradient of this process at once.
        config["zero_optimization"]["sub_group_size"] = int(1e15)
    config = merge(config, overrides)
    summed = config.get("data_types", {}).get("grad_accum_dtype") == "fp32"
    offloaded = (config["zero_optimization"].get("offload_optimizer") or {}).get("device", "none") != "none"
    if stage in (1, 2):
        # It can do without where it neither offloads nor, under ZeRO 1, sums bfloat16 gradients in float32.
        config["zero_optimization"]["compute_grad_norm"] = offloaded or (stage == 1 and bf16 and summed)
    if world_size == 1 and stage in (1, 2):
        # One process has nothing to overlap with the backward pass, and DeepSpeed would wait for the device first.
        config["zero_optimization"]["overlap_comm"] = False
    if bf16 and stage in (1, 2) and not summed and not offloaded:
        config["bf16"] |= {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    return config
