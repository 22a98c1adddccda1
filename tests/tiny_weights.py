"""Weights of a tiny tokenizer and a tiny network as files of every kind, and the run file that names them."""

from pathlib import Path

import torch
import yaml

import kernels
from launch.config import LightningDiTRun
from launch.training import checkpoint
from lightningdit.latents import LatentStatistics
from lightningdit.model import LightningDiT
from lightningdit.weights import save_published
from tests import toy
from vavae.config import AutoencoderConfig
from vavae.model import AutoencoderKL
from vavae.weights import write_export

TOKENIZER = dict(ch=32, ch_mult=[1, 2], num_res_blocks=1, embed_dim=4, z_channels=4, attn_resolutions=[], resolution=8)
STATISTICS = LatentStatistics(torch.tensor([0.5, -1.0, 0.0, 2.0]), torch.tensor([1.0, 2.0, 0.5, 1.5]))


def write_weights(root: Path) -> Path:
    """Files of a tokenizer, and of a network with weights that are not zero: a checkpoint and a published .pt."""
    ops = kernels.select("reference")
    torch.manual_seed(0)
    tokenizer = AutoencoderKL(AutoencoderConfig(**yaml.safe_load(yaml.safe_dump(TOKENIZER))), ops)
    write_export(root / "tokenizer.safetensors", tokenizer.state_dict(), tokenizer.config)
    run = LightningDiTRun.model_validate(document(root))
    network = LightningDiT(run.network(), ops)
    state = {k: v.detach() for k, v in network.state_dict().items()}
    trained = {k for k, p in network.named_parameters() if p.requires_grad}
    state |= {k: torch.randn_like(state[k]) * 0.05 for k in trained}
    ema = {k: state[k] + 0.01 for k in trained}
    save_published(root / "published.pt", state, state | ema)
    description = toy.checkpoint_state(
        7,
        "lightningdit",
        config=run.model_dump(mode="json"),
        task={"latents": STATISTICS.to_json(), "num_images": 60, "classes": ["cat", "dog", "été"]},
    )
    checkpoint.save(root / "run" / "checkpoints", description, {"model": {"model": state, "ema": ema}})
    return root


def document(root, **sample_keys) -> dict:
    settings = dict(num_sampling_steps=4, fid_num=10, per_proc_batch_size=4, cfg_scale=2.0) | sample_keys
    return {
        "preset": "default",
        "ckpt_path": str(root / "run"),
        "data": {"data_path": str(root / "latents"), "image_size": 8, "num_classes": 3},
        "vae": {"model_name": "tiny", "downsample_ratio": 2, "ckpt_path": str(root / "tokenizer.safetensors")},
        "model": {
            "hidden_size": 32,
            "depth": 2,
            "num_heads": 2,
            "patch_size": 1,
            "in_chans": 4,
            "use_rope": True,
            "use_rmsnorm": True,
            "use_swiglu": True,
        },
        "sample": settings,
        "kernels": "reference",
    }


def a_run(root, **sample_keys) -> LightningDiTRun:
    return LightningDiTRun.model_validate(document(root, **sample_keys))
