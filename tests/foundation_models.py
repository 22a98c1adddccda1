"""Small foundation models for tests: arguments that shrink the documented ones, and networks of timm's own."""

import timm
import torch
from torch import nn

from vavae.config import FoundationConfig
from vavae.foundation.names import SHORT_NAMES

GRID, PIXELS = 4, 64  # latent positions along a side, and pixels

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
#: Mean and std as the papers' own code has them, by the family that a short name begins with.
STATED = {
    **dict.fromkeys(("dinov2", "dinov3", "mae", "sam"), IMAGENET),
    **dict.fromkeys(("clip", "eva02"), OPENAI),
    **dict.fromkeys(("siglip2", "pe"), HALF),
}


def small(name: str) -> dict:
    """Arguments that make a model tiny and keep its kind."""
    arguments: dict = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    if name.startswith("sam"):
        arguments |= {"global_attn_indexes": [1], "window_size": 3, "neck_chans": 24}
    return arguments


def section(name: str, **fields) -> FoundationConfig:
    return FoundationConfig(model_name=name, model_args={**small(name), **fields.pop("model_args", {})}, **fields)


def timm_network(name: str, **arguments) -> nn.Module:
    """timm's own with 7 classes, its positions of a 3 × 3 grid, with weights that leave no layer without effect."""
    patch = int(SHORT_NAMES[name].partition("patch")[2][:2])
    arguments = {**small(name), "img_size": 3 * patch, **arguments}
    if not name.startswith("sam"):  # which takes any size
        arguments["dynamic_img_size"] = True
    network = timm.create_model(SHORT_NAMES[name].partition(".")[0], num_classes=7, **arguments).eval()
    generator = torch.Generator().manual_seed(len(name))
    for parameter in network.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = parameter.data * 0.5 + noise * 0.2
    return network.requires_grad_(False)


def images(seed: int = 0, size: int = PIXELS) -> torch.Tensor:
    """[2, 3, size, size] in [−1, 1]."""
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def normalised(x: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """Images in [−1, 1] as a model with this mean and std, of pixels from 0 to 1, is fed them; in float64."""
    column = lambda values: torch.tensor(values, dtype=torch.float64).view(3, 1, 1)  # noqa: E731
    return ((x.double() + 1) / 2 - column(mean)) / column(std)
