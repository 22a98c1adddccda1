"""Training steps of the tokenizer: the trainer's own, the same task without DeepSpeed, and the plain formulation.

The run is `launch/configs/vavae_f16d32_dinov2.yaml` with the GAN running from the first step. What would have to be
downloaded, the vision transformer and LPIPS's VGG-16, is written with random weights; images are random pictures on
disk. The task then reads all of it as it reads the real ones.
"""

import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import kernels
from bench.workloads.plain_tokenizer import PlainAutoencoder, discriminator_loss
from bench.workloads.tokenizers import set_numerics
from bench.workloads.training import FlatAdamW, TrainerLoop
from bench.workloads.variants import TokenizerVariant
from common.tensors import write_tensors
from kernels.compile.modes import compile_module
from launch.config import VavaeRun, load
from launch.training.build import vavae_task
from vavae.cost import training_cost
from vavae.discriminator import frozen
from vavae.foundation import FoundationModel
from vavae.loss import lpips_network
from vavae.task import AlignedAutoencoder

CONFIG = Path(__file__).parents[2] / "launch" / "configs" / "vavae_f16d32_dinov2.yaml"
IMAGES, FOREVER = 256, 1_000_000
#: A training step; returns the first losses where it tells them.
Step = Callable[[], dict[str, torch.Tensor] | None]


class TrainingSetup:
    """State that all ways to train share: a run file, random weights and images on disk.

    Attributes:
        flops: of an image, all networks together.
        about: further keys of rows.
    """

    def __init__(self, batch: int, device: torch.device | str, overrides: tuple[str, ...] = (), images: int = IMAGES):
        set_numerics()
        self.device, self._directory = torch.device(device), tempfile.TemporaryDirectory()
        folder = Path(self._directory.name)
        self.run: VavaeRun = load(
            CONFIG,
            [
                f"data.data_path={folder / 'images'}",
                "data.valid_path=null",
                "loss.disc_start=0",
                f"foundation.weights={folder / 'foundation.safetensors'}",
                f"train.global_batch_size={batch}",
                f"loss.perceptual_weights={folder / 'vgg.safetensors'}",
                "train.max_epochs=null",
                f"train.max_steps={FOREVER}",
                f"train.output_dir={folder}",
                "train.exp_name=bench",
                "train.tensorboard=false",
                *overrides,
            ],
            kind="vavae",
        )[0]
        run = self.run
        write_images(folder / "images", max(images, batch), run.data.image_size)
        write_vgg(folder / "vgg.safetensors", self.device)
        grid = run.data.image_size // run.model.downsample_ratio
        FoundationModel.from_config(run.features(), grid, pretrained=False).save(folder / "foundation.safetensors")
        costs = training_cost(run.model, run.features(), run.loss, run.data.image_size)
        self.flops = sum(cost.flops for cost in costs.values())
        self.about = {"frozen_weights": "random", "images": "random pictures, JPEG"}

    def provider(self, variant: TokenizerVariant) -> tuple[Callable[[], object], dict[str, float] | None]:
        """A step to call, and the losses of the first one where it tells them."""
        engines: dict[str, Callable[..., Step]] = {"trainer": TrainerStep, "bare": BareStep, "plain": PlainStep}
        step = engines[variant.engine](variant, self)
        losses = step()
        return step, losses and {name: float(loss) for name, loss in losses.items()}


class TrainerStep(TrainerLoop):
    def __init__(self, variant: TokenizerVariant, setup: TrainingSetup):
        super().__init__(setup.run.model_copy(update={"kernels": variant.kernels}), "vavae")


class TaskStep:
    """The task of the run, with its networks and images on the device."""

    def __init__(self, variant: TokenizerVariant, setup: TrainingSetup):
        train = setup.run.train.model_copy(update={"precision": variant.precision})
        self._size, self._ops = train.global_batch_size, kernels.select(variant.kernels)
        self._task, _ = vavae_task(setup.run.model_copy(update={"train": train}), self._ops)
        self._task.to(setup.device)
        self._networks = {name: network.to(setup.device).train() for name, network in self._task.networks.items()}
        first = torch.arange(self._size)
        self._batch = {"image": self._task.batches.batch(torch.zeros_like(first), first)["image"].to(setup.device)}
        self._step = 0

    def _draw(self) -> dict[str, torch.Tensor]:
        """The random numbers of the next step."""
        self._step += 1
        return self._task.draw(self._step, self._size, self._batch["image"].device)


class BareStep(TaskStep):
    """The task's own step, one optimizer pass for each network."""

    def __init__(self, variant: TokenizerVariant, setup: TrainingSetup):
        super().__init__(variant, setup)
        dtype = getattr(torch, variant.precision)
        self._optimizers = {name: FlatAdamW(network, self._ops, dtype) for name, network in self._networks.items()}
        self._optimize = variant.optimizer
        self._task.compile(variant.compile, deterministic=variant.ours)
        for network in self._networks.values():
            compile_module(network, variant.compile, self._ops, deterministic=variant.ours)

    def __call__(self) -> dict[str, torch.Tensor]:
        draws = self._draw()
        stepped = []

        def backward(name: str, loss: torch.Tensor) -> None:
            loss.backward()
            stepped.append(name)

        logs = self._task.train_step(self._networks, self._batch, draws, self._step, backward)
        for name in stepped:
            if self._optimize:
                self._optimizers[name].step()
            else:
                self._networks[name].zero_grad()
        return logs


class PlainStep(TaskStep):
    """The plain formulation of the same step, with torch's own Adam (fused on CUDA) and no moving average."""

    def __init__(self, variant: TokenizerVariant, setup: TrainingSetup):
        super().__init__(variant, setup)
        optimizer, autoencoder = setup.run.optimizer, self._networks["autoencoder"]
        assert isinstance(autoencoder, AlignedAutoencoder) and self._task.foundation is not None
        self._foundation, self._discriminator = self._task.foundation, self._networks["discriminator"]
        perceptual = self._task.perceptual.net if self._task.perceptual is not None else None
        self._autoencoder = PlainAutoencoder(autoencoder, self._task.loss_at(1), perceptual, self._discriminator)
        self._optimize = variant.optimizer
        betas, fused = (optimizer.beta1, optimizer.beta2), setup.device.type == "cuda"
        self._optimizers = [
            torch.optim.Adam(network.parameters(), lr=optimizer.lr, betas=betas, fused=fused)
            for network in self._networks.values()
        ]

    def __call__(self) -> dict[str, torch.Tensor]:
        images, noise = self._batch["image"], self._draw()["noise"]
        with frozen(self._discriminator):
            total, reconstruction, logs = self._autoencoder(images, noise, self._foundation(images))
            total.backward()
        loss = discriminator_loss(self._autoencoder.loss, self._discriminator, images, reconstruction)
        loss.backward()
        for optimizer in self._optimizers:
            if self._optimize:
                optimizer.step()
            optimizer.zero_grad()
        return logs | {"d_loss": loss.detach()}


def write_images(folder: Path, count: int, size: int) -> None:
    """Random pictures of one class: blots of colour, as noise of single pixels would cost a decoder more."""
    random = np.random.default_rng(0)
    (folder / "class").mkdir(parents=True)
    for number in range(count):
        blots = random.integers(0, 256, (max(size // 8, 1), max(size // 8, 1), 3), dtype=np.uint8)
        picture = Image.fromarray(blots).resize((size, size), Image.Resampling.BICUBIC)
        picture.save(folder / "class" / f"{number:04d}.jpg", quality=90)


def write_vgg(path: Path, device: torch.device) -> None:
    """Random weights of VGG-16 in torchvision's layout, of a size that keeps activations' (arXiv 1502.01852)."""
    generator, found = torch.Generator(device).manual_seed(0), {}
    for key, value in lpips_network("meta").net.state_dict().items():
        drawn = torch.zeros(value.shape, device=device)
        if value.ndim > 1:
            drawn.normal_(std=math.sqrt(2 / value[0].numel()), generator=generator)
        found[f"features.{key.split('.', 1)[1]}"] = drawn.cpu()
    write_tensors(path, found)
