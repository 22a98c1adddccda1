"""A sweep's command line for tests: a tiny network, a tiny foundation model to judge by, real images of noise."""

import json
from pathlib import Path

import torch
import yaml

from tests.measured import images, save_folder
from tests.tiny_weights import document, write_weights
from vavae.config import FoundationConfig
from vavae.foundation import FoundationModel

SIDE, N, REAL = 8, 16, 30


def write_foundation(path: Path) -> Path:
    """A small vision transformer's weights with the JSON that says how to build it; six features."""
    torch.manual_seed(1)
    arguments = {"img_size": SIDE, "patch_size": 4, "embed_dim": 6, "depth": 1, "num_heads": 2}
    config = FoundationConfig(model_name="vit_tiny_patch16_224", model_args=arguments, normalization="published")
    FoundationModel.classifier(config, 2, 10).save(path)
    path.with_suffix(".json").write_text(json.dumps({"config": config.model_dump(mode="json"), "grid": 2}))
    return path


def write_sweep(root: Path) -> list[str]:
    """All files that a sweep needs, below `root` → its command line without axes and --output."""
    write_weights(root)
    content = document(root, per_proc_batch_size=8, num_sampling_steps=3)
    (root / "run.yaml").write_text(yaml.safe_dump(content))
    save_folder(root / "real", images(3, REAL, size=SIDE))
    foundation = write_foundation(root / "foundation.safetensors")
    judged = ["--figure", "fid", "--foundation", str(foundation), "--reference", str(root / "real")]
    return [str(root / "run.yaml"), "--samples", str(N), *judged]


def contents(directory: Path) -> dict[str, bytes]:
    """All files of a sweep by their names below it."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}
