"""Training steps of LightningDiT: the trainer's own, the same network without DeepSpeed, and the plain model.

All start from the same weights (none of them zero: zeros draw less power and run faster), see the same latents, noise
and times, and make one optimizer step with the moving average in each call. Those of MeanFlow
(`lightningdit.meanflow`) have a second time, and weights for it, and are compared with each other only.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import kernels
from bench.workloads import backends
from bench.workloads.latents import write_latents
from bench.workloads.plain import PlainLightningDiT
from bench.workloads.variants import TrainingVariant
from kernels.compile.modes import compile_module
from kernels.registry import Ops
from lightningdit.config import ModelConfig, TransportConfig
from lightningdit.cost import flops_per_image, training_flops_per_image
from lightningdit.flow import Transport
from lightningdit.meanflow import MeanFlow
from lightningdit.model import LightningDiT

LR, BETAS, EPS, EMA_DECAY = 2e-4, (0.9, 0.95), 1e-8, 0.9999
MEANFLOW = TransportConfig(objective="meanflow")
NORMALS = 8  # sets of latents and noise that steps go through by turns


class Inputs:
    """Latents, noise, times and labels of one micro-batch after another, on the device."""

    def __init__(self, config: ModelConfig, batch: int, device: torch.device | str, transport: Transport | None = None):
        """transport: by default that of the published recipe."""
        generator = torch.Generator(device).manual_seed(0)
        shape = (batch, config.in_channels, config.input_size, config.input_size)
        self.transport = transport or Transport(use_cosine_loss=True, use_lognorm=True)
        self.sets = []
        for _ in range(NORMALS):
            x1, x0 = (torch.randn(shape, generator=generator, device=device) for _ in range(2))
            t = self._times(batch, generator=generator, device=device)
            y = torch.randint(config.num_classes, (batch,), generator=generator, device=device)
            self.sets.append((x1, x0, t, y))
        self._next = 0

    def _times(self, count: int, **drawn: Any) -> torch.Tensor:
        """[B]"""
        return self.transport.sample_timesteps(count, **drawn)

    def following(self) -> tuple[torch.Tensor, ...]:
        """Data, noise, times and labels of the next set."""
        self._next += 1
        return self.sets[(self._next - 1) % NORMALS]

    def losses(self, network: Callable) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the next set, what is minimised and what is compared with the others': both squared error and direction,
        as the published recipe trains."""
        x1, x0, t, y = self.following()
        terms = self.transport.training_losses(network, x1, t=t, x0=x0, y=y)
        loss = terms["loss"].mean() + terms["cos_loss"].mean()
        return loss, loss


class MeanInputs(Inputs):
    """The same for MeanFlow: times are pairs t, r [2, B]; which samples use both is as in the trainer's batches."""

    transport: MeanFlow

    def __init__(self, config: ModelConfig, batch: int, device: torch.device | str):
        super().__init__(config, batch, device, MeanFlow(MEANFLOW))
        self.paired = self.transport.paired(batch)

    def _times(self, count: int, **drawn: Any) -> torch.Tensor:
        return torch.stack(self.transport.sample_time_pairs(count, **drawn))  # [2, B]

    def losses(self, network: Callable) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss has an adaptive weight and is about 1 whatever the network says: its mean square is compared."""
        x1, x0, (t, r), y = self.following()
        terms = self.transport.mean_losses(network, x1, t=t, r=r, x0=x0, paired=self.paired, y=y)
        return terms["loss"].mean(), terms["mse"].mean()


def flops_per_step(config: ModelConfig, batch: int, objective: str) -> int:
    """FLOPs of the products that a step of `batch` images needs, by its objective."""
    if objective == "flow":
        return batch * flops_per_image(config)[1]
    share = 1 - sum(MeanFlow(MEANFLOW).paired(batch)) / batch
    transport = MEANFLOW.model_copy(update={"equal_times": share})
    return round(batch * training_flops_per_image(config.model_copy(update={"time_pairs": True}), transport))


@contextmanager
def seeded(device: torch.device | str) -> Iterator[None]:
    """Tensors are made on the device within the context, random ones from seed 0; then its generator goes on as before.

    A CPU takes 14 s to draw the weights of a published size.
    """
    device = torch.device(device)
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]), device:
        torch.manual_seed(0)
        yield


def network_config(variant: TrainingVariant, config: ModelConfig) -> ModelConfig:
    """The config with what the variant says of the network."""
    return config.model_copy(update={"use_checkpoint": variant.recompute, "time_pairs": variant.objective != "flow"})


def make_network(
    config: ModelConfig, ops: Ops, device: torch.device | str, residual: torch.dtype = torch.float32
) -> LightningDiT:
    """The same weights for everybody on a device, float32."""
    with seeded(device):
        network = LightningDiT(config, ops, residual).to(device)
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.requires_grad and not parameter.any():
                    torch.nn.init.normal_(parameter, std=0.02)
    return network.train()


class FlatAdamW:
    """A network's weights, views of one buffer: in bfloat16 the one that `adamw_ema_` writes beside float32 states."""

    def __init__(self, network: torch.nn.Module, ops: Ops, dtype: torch.dtype = torch.bfloat16):
        self.ops, self.parameters = ops, [p for p in network.parameters() if p.requires_grad]
        self.master = torch.cat([p.detach().flatten() for p in self.parameters])
        self.states = [torch.zeros_like(self.master), torch.zeros_like(self.master), self.master.clone()]
        network.to(dtype)
        self.copy = self.master.to(dtype)  # of float32 it is the master itself
        start = 0
        for p in self.parameters:
            p.data = self.copy[start : start + p.numel()].view(p.shape)
            start += p.numel()
        self._one = torch.ones((), device=self.master.device)
        self._step, self._lr = torch.zeros_like(self._one), torch.full_like(self._one, LR)
        self.norm = self._one

    def step(self) -> None:
        """Take the gradients, and forget them."""
        gradient = torch.cat([p.grad.flatten() for p in self.parameters])
        for p in self.parameters:
            p.grad = None
        self.norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
        self._step += 1
        self.ops.adamw_ema_(
            self.master,
            gradient,
            *self.states,
            step=self._step,
            lr=self._lr,
            betas=BETAS,
            eps=EPS,
            weight_decay=0.0,
            ema_decay=EMA_DECAY,
            grad_scale=self._one,
            skip=~torch.isfinite(self.norm),
            bf16_param=None if self.copy is self.master else self.copy,
        )


class BareStep:
    """The network without DeepSpeed: weights in bfloat16, the optimizer and the average in one pass."""

    def __init__(self, variant: TrainingVariant, config: ModelConfig, batch: int, device: torch.device | str):
        ops, config = variant.ops(), network_config(variant, config)
        network = make_network(config, ops, device, getattr(torch, variant.residual))
        self.inputs = INPUTS[variant.objective](config, batch, device)
        self.optimizer = FlatAdamW(network, ops)
        compile_module(network, variant.compile, ops, variant.deterministic)
        self._network = network

    def __call__(self) -> torch.Tensor:
        loss, compared = self.inputs.losses(self._network)
        loss.backward()
        self.optimizer.step()
        return compared.detach()


class PlainStep:
    """The plain model, with torch's fused AdamW (on CUDA) and a moving average over lists of tensors."""

    def __init__(self, variant: TrainingVariant, config: ModelConfig, batch: int, device: torch.device | str):
        config = network_config(variant, config)
        network = make_network(config, kernels.select("reference"), device)
        self.inputs = INPUTS[variant.objective](config, batch, device)
        self._parameters = [p for p in network.parameters() if p.requires_grad]
        self._average = [p.detach().clone() for p in self._parameters]
        fused = True if torch.device(device).type == "cuda" else None
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0, fused=fused
        )
        self._network = PlainLightningDiT(network)
        compile_module(self._network, variant.compile, deterministic=variant.deterministic)
        self.norm = torch.ones(())

    def __call__(self) -> torch.Tensor:
        loss, compared = self.inputs.losses(self._network)
        loss.backward()
        self.norm = torch.stack(torch._foreach_norm([p.grad for p in self._parameters])).norm()
        self._optimizer.step()
        self._optimizer.zero_grad()
        torch._foreach_lerp_(self._average, [p.detach() for p in self._parameters], 1 - EMA_DECAY)
        return compared.detach()


class TrainerLoop:
    """Steps of the trainer's own loop: loader, DeepSpeed, logging sums, and noise of its own, so that losses differ."""

    def __init__(self, run: Any, kind: str):
        from launch.training.build import make_trainer
        from launch.training.engine import start_processes

        self._trainer = make_trainer(run, kind, start_processes())
        self._stream = self._trainer.stream()

    def __call__(self) -> None:
        self._trainer.train_step(self._stream)

    def close(self) -> None:
        self._stream.close()
        self._trainer.close()


class TrainerStep(TrainerLoop):
    """The run is `launch/configs/lightningdit_xl_64ep.yaml` but for the sizes asked for, its latents on disk."""

    def __init__(
        self,
        variant: TrainingVariant,
        config: ModelConfig,
        batch: int,
        device: torch.device | str,
        images: int = 4096,
        workers: int = 8,
        steps: int = 1_000_000,
    ):
        from launch.config import load

        self._directory = tempfile.TemporaryDirectory()
        directory = Path(self._directory.name)
        shape = (config.in_channels, config.input_size, config.input_size)
        write_latents(directory / "latents", shape, images, config.num_classes)
        overrides = [
            f"data.data_path={directory / 'latents'}",
            f"data.num_classes={config.num_classes}",
            f"data.image_size={16 * config.input_size}",
            f"data.num_workers={workers}",
            "data.verify=false",
            f"train.output_dir={directory}",
            "train.exp_name=bench",
            "train.tensorboard=false",
            f"train.global_batch_size={batch}",
            f"train.max_steps={steps}",
            f"train.compile={variant.compile}",
            f"train.deterministic={str(variant.deterministic).lower()}",
            f"train.residual_dtype={variant.residual}",
            f"train.use_checkpoint={str(variant.recompute).lower()}",
            f"kernels={json.dumps({'default': 'auto', **backends.per_op(variant.kernels, variant.named)})}",
            "model.model_type=null",
            f"model.in_chans={config.in_channels}",
            *(f"model.{key}={getattr(config, key)}" for key in ("hidden_size", "depth", "num_heads", "patch_size")),
        ]
        super().__init__(load(CONFIG, overrides, kind="lightningdit")[0], "lightningdit")


CONFIG = Path(__file__).parents[2] / "launch" / "configs" / "lightningdit_xl_64ep.yaml"
INPUTS = {"flow": Inputs, "meanflow": MeanInputs}
STEPS = {"trainer": TrainerStep, "bare": BareStep, "plain": PlainStep}
