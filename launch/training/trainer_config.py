"""What a trainer is told of a run."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from launch.training.config import OptimizerConfig, TrainConfig
from launch.training.deepspeed_options import DeepSpeedConfig


@dataclass(frozen=True)
class TrainerConfig:
    """A run as the trainer needs it: kind and length, output directory, sections of the run file."""

    kind: str
    directory: Path
    last_step: int
    train: TrainConfig
    optimizer: OptimizerConfig
    deepspeed: DeepSpeedConfig
    run: dict = field(repr=False)  # the whole run file, for the record
    flops: Callable[[int], float] = field(repr=False)  # of a training step, per image, by step
    paced: bool  # whether the run is compared with the published one
