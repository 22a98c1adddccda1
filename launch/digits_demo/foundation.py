"""A small vision transformer trained on the embedded digits, to stand where DINOv2 stands in a real run.

DINOv2's weights are a download of more than a gigabyte. The stand-in learns to classify the training digits (never the
held-out ones); its patch tokens, one for each latent position, are what the tokenizer aligns to.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.files import write_json
from launch.digits_demo.dataset import CLASSES, Digits
from vavae.config import FoundationConfig
from vavae.foundation import FoundationModel
from vavae.images import to_float_batch

GRID = 8  # tokens a side: 32 pixels in patches of 4
MODEL = FoundationConfig(
    model_name="vit_tiny_patch16_224",  # the layout; every size is set below
    normalization="published",  # fed [-1, 1] as it is, in training and afterwards
    model_args={
        "img_size": 32,
        "patch_size": 4,
        "embed_dim": 96,
        "depth": 3,
        "num_heads": 3,
        "class_token": False,
        "global_pool": "avg",  # the class is read from the mean of the tokens, so all of them learn
        "fc_norm": False,  # and the norm that the features go through is trained too
    },
)
STEPS = 300
BATCH_SIZE = 64
PEAK_LR = 2e-3
MIN_ACCURACY = 0.95


def train_foundation(
    path: str | Path,
    train: Digits,
    heldout: Digits,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    steps: int = STEPS,
) -> tuple[FoundationConfig, float]:
    """Train the stand-in and write `path` (.safetensors) with a `.json` beside it.

    A function of the digits, the seed and the steps alone: same arguments, same weights (bit for bit on the CPU).

    Returns:
        What to put into a tokenizer's `foundation` section, and the accuracy on held-out digits.

    Raises:
        RuntimeError: the accuracy is below 95 %, so its features are not worth aligning to.
    """
    with torch.random.fork_rng(devices=[]):  # building draws from the global generator; `fit` draws all of it anew
        model = FoundationModel.classifier(MODEL, GRID, CLASSES)
    fit(model.to(device), train, seed=seed, steps=steps)
    accuracy = classification_accuracy(model, heldout)
    if accuracy < MIN_ACCURACY:
        raise RuntimeError(
            f"the stand-in foundation model knows {accuracy:.1%} of held-out digits, not {MIN_ACCURACY:.0%}"
        )
    path = Path(path)
    model.save(path)
    config = MODEL.model_copy(update={"weights": str(path)})
    facts = {"config": config.model_dump(mode="json"), "grid": GRID}
    facts |= {"seed": seed, "steps": steps, "heldout_accuracy": accuracy}
    write_json(path.with_suffix(".json"), {"kind": "foundation", **facts})
    return config, accuracy


def fit(model: FoundationModel, digits: Digits, *, seed: int, steps: int) -> None:
    """Train a classifier in place: AdamW, a short warm-up then a cosine, label smoothing, shifted and scaled digits."""
    generator = torch.Generator().manual_seed(seed)
    initialise(model.vit, generator)
    device = next(model.parameters()).device
    images, labels = to_float_batch(digits.images), digits.labels
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _schedule(step, steps))
    epochs = range(math.ceil(steps * BATCH_SIZE / len(labels)))
    order = torch.cat([torch.randperm(len(labels), generator=generator) for _ in epochs])
    model.train()
    for index in order[: steps * BATCH_SIZE].split(BATCH_SIZE):
        batch = augment(images[index], generator).to(device)
        loss = F.cross_entropy(model.logits(batch), labels[index].to(device), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


def _schedule(step: int, steps: int) -> float:
    warm = max(steps // 10, 1)
    return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))


@torch.no_grad()
def initialise(vit: nn.Module, generator: torch.Generator) -> None:
    """Weights scaled to this narrow width (Xavier) and positions large enough to be told apart from the first step.

    The usual 0.02, meant for wide models trained for long, leaves it at half this accuracy after as many steps.
    """
    for module in vit.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.flatten(1), generator=generator)
            nn.init.zeros_(module.bias)
    nn.init.zeros_(vit.head.weight)
    nn.init.normal_(vit.pos_embed, std=0.2, generator=generator)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """`images [B, 3, H, W]` in [-1, 1], sides scaled by up to a tenth, shifted by up to a twentieth, black around."""
    draws = torch.rand(len(images), 4, generator=generator) * 2 - 1
    theta = torch.zeros(len(images), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = 1 + 0.1 * draws[:, 0], 1 + 0.1 * draws[:, 1]
    theta[:, :, 2] = 0.1 * draws[:, 2:]  # of half the width
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


@torch.no_grad()
def classification_accuracy(model: FoundationModel, digits: Digits) -> float:
    """Share of digits whose class scores highest."""
    device = next(model.parameters()).device
    hits = [
        model.logits(to_float_batch(images).to(device)).argmax(1).cpu() == labels
        for images, labels in zip(digits.images.split(250), digits.labels.split(250), strict=True)
    ]
    return torch.cat(hits).double().mean().item()
