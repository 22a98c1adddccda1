"""The tokenizer's training task: networks, batches, random draws, the training step of both networks."""

import copy
import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from common.seeds import generator, torch_seed
from common.tensors import load_strict, read_tensors
from common.text import shortened
from kernels.backends.layout import memory_format
from kernels.compile.modes import compile_module
from kernels.registry import Ops
from vavae import seeds
from vavae.config import (
    AutoencoderConfig,
    DataConfig,
    FoundationConfig,
    LossConfig,
    StageConfig,
    balances_both,
    check_sections,
    loss_at,
)
from vavae.data import ImageDataset
from vavae.discriminator import NLayerDiscriminator, adopt_weight, frozen
from vavae.foundation import FoundationModel
from vavae.images import to_uint8
from vavae.loss import (
    AutoencoderOutput,
    Perceptual,
    discriminator_loss,
    generator_loss,
    kl_term,
    reconstruction_nll,
    vf_term,
)
from vavae.measure import measured
from vavae.model import AutoencoderKL
from vavae.watch import Logs, collapse_warnings, latent_activity, reconstruction_figures, similarity_to_centre
from vavae.weights import PROJECTION_PREFIX, log_dropped, split_tokenizer

log = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]
WATCHED_IMAGES = 2  # of a micro-batch, that `measure` takes
Criterion = Callable[[AutoencoderOutput], tuple[torch.Tensor, Logs]]


class AlignedAutoencoder(AutoencoderKL):
    """The autoencoder and the projection between its latents and a foundation model's features.

    Args:
        config, ops: as for `AutoencoderKL`.
        feature_dim: channels F of the features; None without a foundation model (then there is no projection).
        reverse: project latents to `feature_dim` channels (no bias); else features to `embed_dim` (with bias).
        fixed: the projection is not trained.
    """

    def __init__(self, config: AutoencoderConfig, ops: Ops, feature_dim: int | None, *, reverse: bool, fixed: bool):
        super().__init__(config, ops)
        self.reverse = reverse
        if feature_dim is not None:
            channels = (config.embed_dim, feature_dim) if reverse else (feature_dim, config.embed_dim)
            self.linear_proj = nn.Conv2d(*channels, 1, bias=not reverse).requires_grad_(not fixed)

    @property
    def compiled_methods(self) -> list[tuple[nn.Module, str]]:
        """Modules and their methods that are compiled, each as one graph; the terms are balanced between them."""
        return [(self.encoder, "hidden"), (self.decoder, "hidden")]

    def forward(  # type: ignore[override]  # trained through the loss, unlike the tokenizer that it is afterwards
        self, images: torch.Tensor, noise: torch.Tensor, features: torch.Tensor | None, criterion: Criterion
    ) -> tuple[torch.Tensor, torch.Tensor, Logs]:
        """One pass and its loss.

        The loss is computed in here because it needs gradients at inner layers, and a network under DeepSpeed hooks
        every gradient that passes its outputs: computed outside, those of the adaptive weights would look like training
        ones.

        Args:
            images: [B, in_channels, H, W] in [−1, 1].
            noise: [B, embed_dim, h, w], standard normal.
            features: [B, feature_dim, h, w] of a foundation model, or None.
            criterion: from the pass to the loss and scalars to log.

        Returns:
            The loss, the reconstructions [B, out_ch, H, W] (detached) and the scalars.
        """
        posterior = self.encode(images)
        z = posterior.sample(noise=noise)  # [B, embed_dim, h, w]
        z = z.contiguous(memory_format=memory_format(images))
        reconstruction = self.decode(z)  # [B, out_ch, H, W]
        latents = None if features is None else z
        if features is not None:
            dtype = self.linear_proj.weight.dtype
            if self.reverse:
                latents = self.linear_proj(z.to(dtype))  # [B, feature_dim, h, w]
            else:
                features = self.linear_proj(features.to(dtype))  # [B, embed_dim, h, w]
        layers = (self.encoder.conv_out.weight, self.decoder.conv_out.weight)
        trained = tuple(p for p in (*self.post_quant_conv.parameters(), *self.decoder.parameters()) if p.requires_grad)
        output = AutoencoderOutput(images, reconstruction, posterior, z, latents, features, *layers, trained)
        loss, logs = criterion(output)
        return loss, reconstruction.detach(), logs


class VavaeTask:
    """The training task of a tokenizer.

    Args:
        model, foundation, loss, data: the sections of the run; `foundation` is None where the loss uses no VF term.
        ops: of `kernels.select`, for the networks and the VF loss.
        seed: of initial weights, crops and noise.
        global_batch_size: images per step, which turns steps into epochs for the stages.
        stages: changes of the loss over the epochs; empty for a constant loss.
        device: where images may be decoded.
        use_checkpoint: as `train.use_checkpoint`.
        frozen_dtype: in which the foundation model and the VGG of LPIPS compute.
        num_pictures: of how many validation images `pictures` are wanted.
        picture_similarities: whether they show similarities among features and latents too.

    Attributes:
        networks: `autoencoder` (an `AlignedAutoencoder`) and, where the loss has a GAN term, `discriminator`.
        batches: the training images.
        validated: the networks that validation calls.

    Raises:
        ValueError: sections that contradict each other, each named; missing data or weights.
    """

    validated = ("autoencoder",)

    def __init__(
        self,
        *,
        model: AutoencoderConfig,
        foundation: FoundationConfig | None,
        loss: LossConfig,
        data: DataConfig,
        ops: Ops,
        seed: int,
        global_batch_size: int,
        stages: Iterable[StageConfig] = (),
        device: torch.device | str = "cpu",
        use_checkpoint: bool | str = False,
        frozen_dtype: torch.dtype = torch.float32,
        num_pictures: int = 16,
        picture_similarities: bool = False,
    ):
        stages = tuple(stages)
        check_sections(model, foundation, loss, data, stages)
        self.model, self.loss, self.stages, self.ops, self.seed = model, loss, stages, ops, seed
        self.use_checkpoint, self._cudagraphs = use_checkpoint, False
        self.global_batch_size = global_batch_size
        self.num_pictures, self._picture_similarities = num_pictures, picture_similarities
        self.grid = data.image_size // model.downsample_ratio
        self.batches = ImageDataset(data, seed, device=device)
        self.foundation = None
        if loss.use_vf:
            assert foundation is not None  # see check_sections
            self.foundation = FoundationModel.from_config(foundation, self.grid)
        self.perceptual = Perceptual.from_weights(loss.perceptual_weights) if loss.perceptual == "lpips" else None
        if self.foundation is not None:
            self.foundation.to(frozen_dtype)
        self._validated_by = self.perceptual  # LPIPS in float32
        if self.perceptual is not None and frozen_dtype != torch.float32:
            self._validated_by = copy.deepcopy(self.perceptual)
            self.perceptual.cast(frozen_dtype)
        width = self.foundation.width if self.foundation else None
        self.networks = build_networks(model, loss, ops, seed, width, use_checkpoint)

    def load_weights(self, path: str) -> None:
        """Start from the weights of a tokenizer file (ours or published), strictly; with its discriminator if any."""
        parts = split_tokenizer(read_tensors(path), path)
        _fit_projection(self.networks["autoencoder"], parts.autoencoder, path)
        load_strict(self.networks["autoencoder"], parts.autoencoder, f"{path} as a tokenizer in training")
        if parts.discriminator and "discriminator" in self.networks:
            load_strict(self.networks["discriminator"], parts.discriminator, f"{path} as a discriminator")
        log_dropped(path, parts.dropped)

    def to(self, device: torch.device) -> None:
        """Move the frozen networks."""
        for network in self._frozen():
            network.to(device)
            if device.type == "cuda":
                network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def compile(self, mode: str, deterministic: bool = True) -> None:
        """Compile the frozen networks in a mode of `kernels.compile.modes`."""
        twice = balances_both(self.loss, self.stages)
        if mode == "none" and self.use_checkpoint == "pointwise" and twice:
            raise ValueError(
                "train.use_checkpoint is pointwise, which keeps results for one backward pass, but balancing both the "
                "VF and the GAN term takes two through the decoder: use true, or compile inductor (train.compile)"
            )
        if mode != "none" and twice:  # the decoder's graph is kept after its first backward pass
            torch._functorch.config.donated_buffer = False
        self._cudagraphs = mode == "cudagraphs"
        for network in self._frozen():
            compile_module(network, mode, self.ops, deterministic)

    def _begin_graphs(self) -> None:
        """Tell CUDA graphs that what those of the step before gave is not needed any more, and only now.

        Otherwise any call of a graph while no backward pass is due counts as the beginning of a step, such as the
        encoder's after the foundation model's, whose features the loss still reads.
        """
        if self._cudagraphs:
            torch.compiler.cudagraph_mark_step_begin()

    def _frozen(self) -> list[nn.Module]:
        return [network for network in (self.foundation, self.perceptual) if network is not None]

    def state_dict(self) -> dict:
        """What `load_state_dict` compares: class names, and which images; networks and optimizers are the engines'."""
        classes = {} if self.batches.classes is None else {"classes": list(self.batches.classes)}
        return {"images": self.batches.identity} | classes

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError where the checkpoint was trained on other classes, as far as it names them.

        Of other images or labels it warns.
        """
        saved, present = state.get("classes"), self.batches.classes
        if saved is not None and present is not None and saved != list(present):
            raise ValueError(
                f"the checkpoint was trained on {len(saved):,} other classes ({shortened(saved, 5)}) "
                f"than the {len(present):,} of {self.batches.source.description} ({shortened(present, 5)})"
            )
        if state.get("images") not in (None, self.batches.identity):
            log.warning(
                "%s holds other images, or labels, than the checkpoint was trained on: its epoch goes on with them",
                self.batches.source.description,
            )

    def draw(
        self,
        step: int,
        batch_size: int,
        device: torch.device | str,
        out: Tensors | None = None,
        *,
        seed: int | None = None,
    ) -> Tensors:
        """The posterior noise of the global batch of a step: `noise` [batch_size, embed_dim, h, w] float32.

        With `out`, the result of an earlier call of the same sizes, its tensor is overwritten and returned. seed: the
        task's where none is given.
        """
        shape = (batch_size, self.model.embed_dim, self.grid, self.grid)
        seed = self.seed if seed is None else seed
        noise = generator(seed, seeds.POSTERIOR_NOISE, step, device=device)
        draws = out or {"noise": torch.empty(shape, device=device)}
        draws["noise"].normal_(generator=noise)
        return draws

    def loss_at(self, step: int) -> LossConfig:
        """The loss in force at a step (from 1)."""
        return loss_at(self.loss, self.stages, (step - 1) * self.global_batch_size / len(self.batches))

    def objective(self, step: int) -> tuple[LossConfig, bool]:
        """The loss in force at a step (from 1), and whether its GAN term is."""
        config = self.loss_at(step)
        gan_weight = config.disc_factor * config.disc_weight
        return config, config.disc_start is not None and adopt_weight(gan_weight, step - 1, config.disc_start) > 0

    def train_step(
        self,
        networks: Mapping[str, Callable],
        batch: Tensors,
        draws: Tensors,
        step: int,
        backward: Callable[[str, torch.Tensor], None],
    ) -> Logs:
        """One micro-batch through the autoencoder and, once the GAN has begun, through the discriminator.

        Args:
            networks: for each of `self.networks` the callable: the module itself or the engine that wraps it.
            batch: as `ImageDataset.batch` gives it, on the device.
            draws: this micro-batch's part of `draw`.
            step: of the run, from 1.
            backward: called with a network's name and its loss.

        Returns:
            Detached scalars to log, means over the micro-batch; numbers (integers) of unreadable images and
            of those that Pillow decoded in place of another decoder.
        """
        self._begin_graphs()
        (config, gan), images = self.objective(step), _laid_out(batch["image"])
        # The module itself, not its engine: here the discriminator only passes gradients on.
        discriminator = self.networks["discriminator"] if gan else None
        criterion = partial(generator_loss, config, self.ops, perceptual=self.perceptual, discriminator=discriminator)
        with frozen(discriminator) if discriminator is not None else nullcontext():
            features = self._features(images) if config.aligns else None
            inputs = (images, draws["noise"], features, criterion)
            loss, reconstruction, logs = networks["autoencoder"](*inputs)
            backward("autoencoder", loss)
        if gan:
            real, fake = networks["discriminator"](images), networks["discriminator"](reconstruction)
            loss, more = discriminator_loss(config, real, fake)
            backward("discriminator", loss)
            logs |= more
        logs |= {name: batch[name].count_nonzero() for name in ("unreadable", "by_pillow") if name in batch}
        return logs

    def validation_draws(self, number: int, batch_size: int, device: torch.device | str) -> Tensors:
        """As `draw`, for the global batch `number` (from 0) of validation."""
        return self.draw(-1 - number, batch_size, device)

    @torch.no_grad()
    def validate(self, networks: Mapping[str, Callable], batch: Tensors, draws: Tensors) -> Logs:
        """Errors of the reconstruction from a posterior sample, without gradients, under the loss of the run's section
        whatever the stage.

        `psnr` (dB), `ssim` and `lpips` are of 8-bit images; see `vavae.watch.reconstruction_figures`.
        """
        reconstruction, logs = self._reconstruct(networks, batch, draws, self._measure, align=self.loss.aligns)
        pair = to_uint8(batch["image"]), to_uint8(reconstruction)
        if self._validated_by is not None:
            self._validated_by.to(reconstruction.device)  # not there before: a run may have no validation
        return logs | reconstruction_figures(*pair, self._validated_by)

    @torch.no_grad()
    def pictures(self, networks: Mapping[str, Callable], batch: Tensors, draws: Tensors) -> dict[str, Tensors]:
        """Picture → rows to show below each other, one image or map for each image of the batch.

        Images are uint8 [B, H, W, 3], maps of similarity to the centre, where they are asked for, float32 [B, h, w].
        """
        align = self._picture_similarities
        reconstruction, maps = self._reconstruct(networks, batch, draws, self._similarities, align=align)
        original, decoded = (to_uint8(x).permute(0, 2, 3, 1) for x in (batch["image"], reconstruction))
        found = {"reconstructions": {"original": original, "decoded": decoded}}
        return found | {"similarities": {"original": original, **maps}} if maps else found

    @torch.no_grad()
    def measure(
        self, names: Collection[str], networks: Mapping[str, Callable], batch: Tensors, draws: Tensors
    ) -> Tensors:
        """Figures of `vavae.measure` that have these names, of the autoencoder on the first images of a micro-batch."""
        few = {name: value[:WATCHED_IMAGES] for name, value in {**batch, **draws}.items()}
        network: Any = networks["autoencoder"]
        autoencoder: Any = self.networks["autoencoder"]
        training = autoencoder.training
        network.train(False)  # dropout would move the random numbers of training
        try:
            with measured(autoencoder, names) as found:
                network(_laid_out(few["image"]), few["noise"], None, _no_loss)
        finally:
            network.train(training)
        return found

    def warnings(self, row: Mapping[str, float | None]) -> dict[str, str]:
        """Cause → what is wrong with the latents, by the means in a row of the log."""
        return collapse_warnings(row, self.model.embed_dim)

    def _reconstruct(
        self,
        networks: Mapping[str, Callable],
        batch: Tensors,
        draws: Tensors,
        criterion: Criterion,
        *,
        align: bool,
    ) -> tuple[torch.Tensor, Logs]:
        """Reconstructions [B, 3, H, W] float32 from posterior samples, and what the criterion logs.

        align: whether the criterion is given features of the foundation model, if there is one.
        """
        self._begin_graphs()
        images = _laid_out(batch["image"])
        inputs = (images, draws["noise"], self._features(images) if align else None, criterion)
        _, reconstruction, logs = networks["autoencoder"](*inputs)
        return reconstruction.float(), logs

    def _measure(self, output: AutoencoderOutput) -> tuple[torch.Tensor, Logs]:
        nll, logs = reconstruction_nll(self.loss, output.images, output.reconstruction, self.perceptual)
        logs |= {"nll": nll.mean(), "kl": kl_term(self.loss, output.posterior)}
        logs |= latent_activity(output.posterior.mean)
        if output.latents is not None and output.features is not None:
            logs |= vf_term(self.loss, self.ops, output.latents, output.features)[1]
        return nll.mean(), logs

    def _similarities(self, output: AutoencoderOutput) -> tuple[torch.Tensor, Logs]:
        maps = {}
        if self._picture_similarities and output.latents is not None and output.features is not None:
            maps = {
                "features": similarity_to_centre(output.features),
                "latents": similarity_to_centre(output.latents),
            }
        return output.reconstruction.new_zeros(()), maps

    def _features(self, images: torch.Tensor) -> torch.Tensor | None:
        return self.foundation(images) if self.foundation is not None else None


def _fit_projection(network: nn.Module, tensors: Tensors, path: str) -> None:
    """Leave out a projection to features that the network has not, and keep its own where the file has none."""
    ours = {k: v for k, v in network.state_dict().items() if k.startswith(PROJECTION_PREFIX)}
    theirs = [key for key in tensors if key.startswith(PROJECTION_PREFIX)]
    if ours and not theirs:
        log.warning("%s has no %s*: the projection to features starts as initialised", path, PROJECTION_PREFIX)
        tensors.update(ours)
    elif theirs and not ours:
        log.info("%s: left out %s*, as this run has no VF term", path, PROJECTION_PREFIX)
        for key in theirs:
            del tensors[key]


def _no_loss(output: AutoencoderOutput) -> tuple[torch.Tensor, Logs]:
    return output.reconstruction.new_zeros(()), {}


def _laid_out(images: torch.Tensor) -> torch.Tensor:
    """Images channels-last on a GPU, whose convolutions are faster so; all that follows keeps the layout."""
    return images.contiguous(memory_format=torch.channels_last) if images.is_cuda else images


def build_networks(
    model: AutoencoderConfig,
    loss: LossConfig,
    ops: Ops,
    seed: int,
    feature_dim: int | None,
    use_checkpoint: bool | str = False,
) -> dict[str, nn.Module]:
    """The trained networks by name; their initial weights depend on the seed alone.

    Args:
        feature_dim: channels of the foundation model's features, or None without one.
        use_checkpoint: as `train.use_checkpoint`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(seed, seeds.INITIAL_WEIGHTS))
        autoencoder = AlignedAutoencoder(model, ops, feature_dim, reverse=loss.reverse_proj, fixed=loss.proj_fix)
        autoencoder.encoder.use_checkpoint = autoencoder.decoder.use_checkpoint = use_checkpoint
        networks: dict[str, nn.Module] = {"autoencoder": autoencoder}
        if loss.use_gan:
            networks["discriminator"] = NLayerDiscriminator(model.out_ch, loss.disc_ndf, loss.disc_n_layers)
    return networks
