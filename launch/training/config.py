"""The sections of a run file that training alone reads, of whichever model: `train` and `optimizer`."""

import math
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from common.sections import (
    Count,
    CountFrom0,
    Float,
    NonNegative,
    PathText,
    Positive,
    Probability,
    RecomputeBlocks,
    Section,
    Size,
    Text,
)
from launch.config_files import ConfigError


def _below_output_dir(name: str) -> str:
    if not name or name.startswith(("/", "~")) or ".." in PurePath(name).parts:
        raise ValueError(f"{name!r} is no name of a folder below output_dir")
    return name


def distinct(names: Any) -> Any:
    """A list as a tuple, of names that differ."""
    if isinstance(names, list | tuple):
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"{twice!r} stands there twice")
        return tuple(names)
    return names


Watched = Literal["grad_norms", "activation_norms", "attention_logits"]
#: Those that a task measures in a forward pass of its own (`launch.training.task.Measures`).
MEASURED = tuple(name for name in get_args(Watched) if name != "grad_norms")
RunName = Annotated[Text, AfterValidator(_below_output_dir)]


def _resume(value: Any) -> Any:
    if isinstance(value, bool) or value == "strict":
        return value
    raise ValueError(f"allowed are true, false and 'strict' (got {value!r})")


class TrainConfig(Section):
    """The `train` section: published keys, and ours from `max_epochs` on.

    `ckpt` names a checkpoint to go on from; otherwise, with `resume`, the newest of the output directory is taken.
    `weight_init` starts from weights alone; training takes one of the two. `global_batch_size` counts images per
    optimizer step over all processes.
    `compile` names what `torch.compile` makes of the networks: "auto" is "inductor" on a GPU below ZeRO 3, else "none";
    "cudagraphs" is Inductor with CUDA graphs, "regional" compiles each kind of block once, which takes seconds instead
    of half a minute (`kernels.compile.modes`). `deterministic` keeps Inductor from choosing by timing what
    changes last bits, so that another run on the same GPUs gives the same; its cost in speed is not measured yet.
    `resume` "strict" ends with an error where the newest checkpoint is damaged; true sets it aside, under another name,
    and goes on from the one before. `background_save` has a checkpoint written while training goes on, from a copy in
    host memory. `keep_checkpoints` keeps that many of the newest, and with `keep_every` those of every so many steps.
    `heartbeat_timeout`: seconds after which a process that does not answer (stopped, its machine unreachable) is lost,
    and all end; compilation, validation and saving do not count, however long they take.
    `use_checkpoint` computes activations again in the backward pass instead of keeping them: of whole blocks (true), of
    every k-th block (a number k), or of norms and activations alone ("pointwise").
    `watch` adds to every row of the log, for each block, "grad_norms" of the step, and of a few of its samples
    "activation_norms" and "attention_logits", the largest; a pass of its own.
    A loss further above the median of the last `spike_window` than `spike_factor` deviations is a spike
    (`launch.training.spikes`), `spike_steps` of them in a row are one that lasts (null: none does). After such a spike,
    or `max_skipped_in_a_row` skipped steps, the run goes back to the last good checkpoint and past the steps that
    caused it, `rollbacks` times, then it stops (`launch.training.incidents`).
    `grad_sum_dtype` is what gradients are summed in over micro-batches and processes; null: that of `precision`.
    `valid_weights` says what is validated where `optimizer.ema_decay` keeps an average: it ("ema"), the weights
    ("model"), or one after the other ("both").
    `valid_batches` counts batches of `global_batch_size` images.
    `wandb` names a project of Weights & Biases to log to; `WANDB_MODE=offline` keeps the log here until `wandb sync`.
    """

    max_steps: Count | None = None
    global_batch_size: Count = 1024
    global_seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    output_dir: PathText = "output"
    exp_name: RunName | None = None
    ckpt: PathText | None = None
    log_every: Count = 100
    ckpt_every: Count = 20_000
    weight_init: PathText | None = None
    resume: Annotated[bool | Literal["strict"], BeforeValidator(_resume)] = True
    use_checkpoint: RecomputeBlocks = False
    max_epochs: Count | None = None
    micro_batch_size: Size | None = None
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    residual_dtype: Literal["float32", "bfloat16"] = "float32"
    compile: Literal["auto", "none", "inductor", "regional", "cudagraphs", "aot_eager"] = "auto"
    deterministic: bool = True
    keep_checkpoints: Count | None = None
    valid_every: Count | None = None
    valid_batches: Count = 8
    valid_weights: Literal["both", "ema", "model"] = "both"
    max_skipped_in_a_row: Count = 20
    tensorboard: bool = True
    keep_every: Count | None = None
    background_save: bool = True
    heartbeat_timeout: Annotated[Float, Field(ge=1)] = 30.0
    watch: Annotated[tuple[Watched, ...], BeforeValidator(distinct)] = ()
    spike_factor: Positive = 7.0
    spike_window: Annotated[int, Field(ge=4, le=10_000)] = 256
    spike_steps: Count | None = 50
    rollbacks: CountFrom0 = 1
    grad_sum_dtype: Literal["bfloat16", "float32"] | None = None
    wandb: Text | None = None

    @model_validator(mode="after")
    def _check(self):
        if self.keep_every is not None and self.keep_checkpoints is None:
            raise ValueError(f"keep_every is {self.keep_every}, but without keep_checkpoints every checkpoint is kept")
        if self.keep_every is not None and self.keep_every % self.ckpt_every:
            raise ValueError(f"keep_every {self.keep_every} is no multiple of ckpt_every {self.ckpt_every}")
        if self.max_steps is not None and self.max_epochs is not None:
            raise ValueError(f"max_steps {self.max_steps} and max_epochs {self.max_epochs} both given; keep one")
        if self.spike_steps is not None and self.spike_steps > self.spike_window // 4:
            raise ValueError(
                f"spike_steps {self.spike_steps} is more than a quarter of spike_window {self.spike_window}: the "
                "median would be that of the spike itself"
            )
        if self.grad_sum_dtype == "bfloat16" and self.precision == "float32":
            raise ValueError("grad_sum_dtype bfloat16 would round gradients that precision float32 has in float32")
        return self

    @property
    def directory(self) -> Path:
        """Of the run."""
        return Path(self.output_dir) / (self.exp_name or "")

    def with_validation(self, valid_path: str | None) -> "TrainConfig":
        """The section with `valid_every` as it is meant: by default at every checkpoint, where there is data for it."""
        if valid_path is None and self.valid_every is not None:
            raise ConfigError(f"train.valid_every is {self.valid_every}, but data.valid_path names no data for it")
        every = None if valid_path is None else self.valid_every or self.ckpt_every
        return self.model_copy(update={"valid_every": every})

    def validated(self, ema_decay: float) -> tuple[str, ...]:
        """What is validated, in this order: "ema", the average, "model", the weights; without an average these."""
        if ema_decay == 0:
            return ("model",)
        return ("ema", "model") if self.valid_weights == "both" else (self.valid_weights,)

    def without_effect(self, ema_decay: float, valid_path: str | None) -> list[str]:
        """Notes on keys that a file sets and that change nothing."""
        asked = [key for key in ("valid_batches", "valid_weights") if key in self.model_fields_set]
        if valid_path is None:
            nothing = "data.valid_path names no data: nothing is validated"
            return [f"train.{key} is {getattr(self, key)}, but {nothing}" for key in asked]
        if "valid_weights" in asked and ema_decay == 0:
            average = "optimizer.ema_decay is 0: no average is kept, and the weights are validated"
            return [f"train.valid_weights is {self.valid_weights}, but {average}"]
        return []

    def steps(self, num_images: int) -> int:
        """Optimizer steps of the run: `max_steps`, or what `max_epochs` epochs of `num_images` come to."""
        if self.max_steps is not None:
            return self.max_steps
        if self.max_epochs is None:
            raise ConfigError("train: give max_steps or max_epochs")
        return -(-self.max_epochs * num_images // self.global_batch_size)


class OptimizerConfig(Section):
    """AdamW and the moving average. Published: `lr`, `beta2`, `max_grad_norm` (0: no clipping)."""

    lr: Positive = 2e-4
    beta1: Probability = 0.9
    beta2: Probability = 0.95
    eps: Annotated[Float, Field(ge=1e-30)] = 1e-8  # in float32 a smaller one vanishes beside a small gradient's root
    weight_decay: NonNegative = 0.0
    max_grad_norm: NonNegative = 0.0
    ema_decay: Probability = 0.9999
    warmup_steps: CountFrom0 = 0
    final_lr_fraction: Annotated[Float, Field(ge=0, le=1)] = 1.0

    def lr_at(self, step: int, last_step: int) -> float:
        """Learning rate of a step (from 1): linear warm-up, then a cosine to `final_lr_fraction` (1: constant)."""
        if step <= self.warmup_steps:
            return self.lr * step / self.warmup_steps
        done = (step - self.warmup_steps) / max(last_step - self.warmup_steps, 1)
        cosine = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        return self.lr * (self.final_lr_fraction + (1 - self.final_lr_fraction) * cosine)
