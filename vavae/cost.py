"""FLOPs, parameters and saved activations of a tokenizer, counted in a training step on the meta device."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import kernels
from vavae.config import AutoencoderConfig, FoundationConfig, LossConfig
from vavae.discriminator import frozen
from vavae.foundation import FoundationModel
from vavae.loss import discriminator_loss, generator_loss, lpips_network
from vavae.model import AutoencoderKL, Level, MidBlock
from vavae.task import build_networks


@dataclass(frozen=True)
class Cost:
    """Cost of one network.

    Fields:
        parameters, trainable: number of all and of the trained ones.
        flops: of a training step's passes through it, per image (a multiply-add is two; norms and activations are not
            counted). The autoencoder's include LPIPS, the VF loss, the discriminator's pass that the GAN term takes,
            and the passes that balance the terms.
        saved_elements: numbers saved for the backward pass, per image, by the reference ops. With activation
            checkpointing those of each level are its input (pointwise also what its convolutions give), and those of
            the largest level, which is computed again.
    """

    parameters: int
    trainable: int
    flops: int
    saved_elements: int


def training_cost(
    model: AutoencoderConfig,
    foundation: FoundationConfig | None,
    loss: LossConfig,
    image_size: int,
    use_checkpoint: bool | str = False,
) -> dict[str, Cost]:
    """Costs of the trained networks by name (with the GAN terms, if the loss has them) and of the `frozen` ones.

    No weights are read and nothing is downloaded.
    """
    return training_costs(model, foundation, loss, image_size, [use_checkpoint])[use_checkpoint]


def training_costs(
    model: AutoencoderConfig,
    foundation: FoundationConfig | None,
    loss: LossConfig,
    image_size: int,
    kinds: Iterable[bool | int | str] = (False, "pointwise", True),
) -> dict[bool | int | str, dict[str, Cost]]:
    """`training_cost` under each of several values of `use_checkpoint`, of which only the saved numbers differ."""
    ops, grid = kernels.select("reference"), image_size // model.downsample_ratio
    with torch.device("meta"):
        images, noise = torch.empty(1, 3, image_size, image_size), torch.empty(1, model.embed_dim, grid, grid)
        vit = None
        if loss.use_vf:
            assert foundation is not None  # see check_sections
            vit = FoundationModel.from_config(foundation, grid, pretrained=False)
        networks = build_networks(model, loss, ops, 0, vit.width if vit else None)
    perceptual = lpips_network("meta").requires_grad_(False) if loss.perceptual == "lpips" else None
    autoencoder, discriminator = networks["autoencoder"], networks.get("discriminator")
    assert isinstance(autoencoder, AutoencoderKL)
    frozen_networks = [network for network in (vit, perceptual) if network is not None]
    features = None if vit is None else vit(images)
    costs = {"frozen": _count(frozen_networks, lambda: None if vit is None else vit(images))}

    def generator_step() -> None:
        criterion = partial(generator_loss, loss, ops, perceptual=perceptual, discriminator=discriminator)
        autoencoder(images, noise, features, criterion)[0].backward()

    with frozen(discriminator) if discriminator is not None else nullcontext():
        costs["autoencoder"] = _count([autoencoder], generator_step)
    if discriminator is not None:
        logits = partial(discriminator, images)
        costs["discriminator"] = _count(
            [discriminator], lambda: discriminator_loss(loss, logits(), logits())[0].backward()
        )
    full = costs["autoencoder"]
    found: dict[bool | int | str, dict[str, Cost]] = {}
    for kind in kinds:
        less = _saved_by_checkpointing(autoencoder, images, kind == "pointwise") if kind else 0
        found[kind] = costs | {"autoencoder": replace(full, saved_elements=full.saved_elements - less)}
    return found


def _saved_by_checkpointing(autoencoder: AutoencoderKL, images: torch.Tensor, pointwise: bool) -> int:
    """How many fewer numbers are held for the backward pass when levels are computed again."""
    inputs: dict[nn.Module, torch.Tensor] = {}
    blocks = [module for module in autoencoder.modules() if isinstance(module, Level | MidBlock)]
    hooks = [block.register_forward_pre_hook(lambda block, args: inputs.update({block: args[0]})) for block in blocks]
    with torch.no_grad():
        autoencoder.decode(autoencoder.encode(images).mode())
    for hook in hooks:
        hook.remove()
    inner, kept = [], 0
    for block, x in inputs.items():
        inner.append(_count([block], partial(block, x)).saved_elements)
        kept += x.numel() + (_convolved(block, x) if pointwise else 0)
    return sum(inner) - kept - max(inner)


def _convolved(block: nn.Module, x: torch.Tensor) -> int:
    """Numbers that the convolutions of a block give."""
    given: list[int] = []
    convolutions = [module for module in block.modules() if isinstance(module, nn.Conv2d)]
    hooks = [module.register_forward_hook(lambda module, args, y: given.append(y.numel())) for module in convolutions]
    with torch.no_grad():
        block(x)
    for hook in hooks:
        hook.remove()
    return sum(given)


def _count(modules: list[nn.Module], run: Callable[[], None]) -> Cost:
    """Cost of `run`, with the parameters of `modules`."""
    parameters = [p for module in modules for p in module.parameters()]
    parameter_storages = {p.untyped_storage()._cdata for p in parameters}
    saved: dict[int, torch.Tensor] = {}  # by storage; the tensors are held so that no storage is used twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        run()
    activations = [tensor for storage, tensor in saved.items() if storage not in parameter_storages]
    elements = sum(t.untyped_storage().nbytes() // t.element_size() for t in activations)
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    return Cost(sum(p.numel() for p in parameters), trainable, counter.get_total_flops(), elements)
