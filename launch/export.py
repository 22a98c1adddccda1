"""`python -m launch export CHECKPOINT NAME [--weights ema|model]`: weights for others to use, of either model.

CHECKPOINT is a checkpoint's directory, or a run's (its newest is taken). Writes NAME.safetensors and NAME.json, and
NAME.pt in the published layout (`model` and `ema`; for a tokenizer `state_dict`).
"""

import argparse
from pathlib import Path

from common.tensors import save_pickled
from launch.arguments import local_path
from launch.checkpoint import Checkpoint
from launch.config import stored_run
from launch.trained import find_checkpoint, from_checkpoint
from lightningdit.weights import save_export, save_published
from vavae.weights import write_export


def main(argv: list[str]) -> int:
    """Export and say what was written; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m launch export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=local_path)
    parser.add_argument("name", type=local_path, help="path of the files to write, without a suffix")
    parser.add_argument("--weights", choices=["ema", "model"], default="ema", help="for the safetensors (default: ema)")
    args = parser.parse_args(argv)
    checkpoint = find_checkpoint(args.checkpoint)
    for path in export(checkpoint, args.name, args.weights):
        print(f"{path}: {checkpoint.state['kind']}, step {checkpoint.step:,}, {path.stat().st_size / 1e6:,.1f} MB")
    return 0


def export(checkpoint: Checkpoint, name: Path, weights: str = "ema") -> list[Path]:
    """Write the three files of a checkpoint's weights → their paths: safetensors, JSON, pt."""
    published = name.with_name(f"{name.name}.pt")
    if checkpoint.state["kind"] == "lightningdit":
        written = save_export(name, from_checkpoint(checkpoint, weights))
        save_published(published, checkpoint.weights("model", "model"), checkpoint.weights("model", "ema"))
        return [*written, published]
    run = stored_run(checkpoint.state["config"], checkpoint.path / "state.json", kind="vavae")
    tensors = checkpoint.weights("autoencoder", weights)
    path = name.with_name(f"{name.name}.safetensors")
    write_export(path, tensors, run.model, step=checkpoint.step, weights=weights, checkpoint=str(checkpoint.path))
    save_pickled(published, {"state_dict": tensors})
    return [path, path.with_suffix(".json"), published]
