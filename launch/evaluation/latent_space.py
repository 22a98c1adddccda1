"""Uniformity of a set of latents: the figures by which arXiv 2501.01423 compares tokenizers."""

import hashlib
from dataclasses import asdict
from statistics import fmean, stdev

import numpy as np
import torch
from torch import Tensor

from common.seeds import mix, torch_seed
from launch.evaluation.moments import NOT_STATED
from launch.evaluation.uniformity import Uniformity, latent_uniformity
from lightningdit.data import LatentDataset

VECTORS = 10_000  # of the published figures
_BLOCK = 256  # latents in memory at once


def latent_vectors(latents: LatentDataset, count: int, seed: int) -> Tensor:
    """`count` vectors `[count, C]` float32, each from another image, at a random position, normalised.

    As published: images without repetition, positions uniform, the mirrored latent for half of them (none of a set
    opened with `latent_flip` false). A function of the arguments alone.
    """
    _, height, width = latents.shape
    rng = np.random.default_rng(int(mix(seed)))
    images = rng.permutation(len(latents))[:count]
    flips = rng.random(count) < 0.5 if latents.latent_flip else np.zeros(count, dtype=bool)
    positions = torch.from_numpy(rng.integers(0, height * width, count))
    vectors = []
    for start in range(0, count, _BLOCK):
        block = slice(start, start + _BLOCK)
        x = latents.batch(np.zeros_like(images[block]), images[block], flips[block])["x"].flatten(2)
        vectors.append(x[torch.arange(len(x)), :, positions[block]])
    return torch.cat(vectors)


def evaluate_latents(latents: LatentDataset, *, vectors: int | None = None, repeats: int = 1, seed: int = 0) -> dict:
    """`density_cv`, `gini` and `normalized_entropy` of a set's vectors in a t-SNE plane, see `latent_uniformity`.

    Args:
        latents: opened with `latent_norm`.
        vectors: how many; None takes 10,000, or one of each image where there are fewer.
        repeats: draws to average over (published: ten); each takes a minute for 10,000 vectors.
        seed: of the draws.

    Returns:
        A JSON-ready dict: `metrics`, `spread` (their standard deviation over the draws, where there are several),
        what was measured, `skipped`, `notes`.

    Raises:
        ValueError: more vectors than images, or too few for t-SNE.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    count = min(VECTORS, len(latents)) if vectors is None else vectors
    if not 1 <= count <= len(latents):
        raise ValueError(
            f"{count} vectors of {latents.path}, which holds {len(latents)} latents: each vector comes "
            "from another image"
        )
    digest, found = hashlib.sha256(), []
    for repeat in range(repeats):
        drawn = latent_vectors(latents, count, torch_seed(seed, repeat))
        digest.update(drawn.numpy().tobytes())
        try:
            found.append(asdict(latent_uniformity(drawn)))
        except ValueError as e:
            raise ValueError(f"{latents.path}: {e}") from None
    means = {name: fmean(one[name] for one in found) for name in Uniformity.__annotations__}
    spread = {name: stdev(one[name] for one in found) for name in means} if repeats > 1 else None
    few = [f"{count} vectors; the published figures are of {VECTORS:,}, and fewer are not comparable with them"]
    tokenizer = latents.manifest.tokenizer if latents.manifest else NOT_STATED
    return {
        "metrics": means,
        "spread": spread,
        "vectors": count,
        "vectors_sha256": digest.hexdigest(),
        "repeats": repeats,
        "seed": seed,
        "mirrored": latents.latent_flip,
        "latents": str(latents.path),
        "images": len(latents),
        "shape": list(latents.shape),
        "tokenizer": tokenizer,
        "skipped": {},
        "notes": few if count < VECTORS else [],
    }
