"""`python -m launch export SOURCE NAME [--weights ema|model]`: weights for others to use, of either model.

SOURCE is a checkpoint's directory, or a run's (its newest is taken). Writes NAME.safetensors and NAME.json, and NAME.pt
in the published layout (`model` and `ema`; for a tokenizer `state_dict`).

SOURCE may also be a weights file, such as a published .pt: then NAME.safetensors and NAME.json are written. The sizes
of a tokenizer are read off its tensors; for a LightningDiT `--config CONFIG [key=value …]` names the run file that
tells its network and, by `data.data_path`, the statistics of its latents.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from common.tensors import model_of, read_entry, save_pickled
from launch.arguments import load_run, local_path
from launch.checkpoint import Checkpoint
from launch.config import ConfigError, select_ops, stored_run
from launch.trained import build_diffusion, diffusion_weights, find_checkpoint, from_checkpoint
from lightningdit.weights import save_export, save_published
from vavae.sizes import infer_config
from vavae.weights import build_tokenizer, write_export


def main(argv: list[str]) -> int:
    """Export and say what was written; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m launch export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=local_path, help="checkpoint, directory of a run, or weights file")
    parser.add_argument("name", type=local_path, help="path of the files to write, without a suffix")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for --config")
    parser.add_argument("--weights", choices=["ema", "model"], default="ema", help="for the safetensors (default: ema)")
    parser.add_argument("--config", type=local_path, help="run file of a weights file")
    args = parser.parse_intermixed_args(argv)
    if args.source.is_file():
        what = f"from {args.source}"
        written = export_file(args.source, args.name, args.weights, args.config, args.overrides)
    elif args.config is not None or args.overrides:
        raise ConfigError(f"{args.source} is no weights file: a checkpoint holds its own run, without --config")
    else:
        checkpoint = find_checkpoint(args.source)
        what = f"{checkpoint.state['kind']}, step {checkpoint.step:,}"
        written = export(checkpoint, args.name, args.weights)
    for path in written:
        print(f"{path}: {what}, {path.stat().st_size / 1e6:,.1f} MB")
    return 0


def export_file(source: Path, name: Path, weights: str = "ema", config: Path | None = None,
                overrides: Sequence[str] = ()) -> list[Path]:
    """Write a weights file as an export → its paths: safetensors, JSON; see the module for `config`.

    Raises ValueError where the file cannot be read, is neither model's, or does not fit.
    """
    taken, tensors = read_entry(source, (weights, "state_dict", "model", "ema"))
    if model_of(tensors) == "LightningDiT":
        if config is None:
            raise ConfigError(f"{source} is a LightningDiT, and its file tells neither the network nor the latents: "
                              "give --config, the run file it was trained with")
        run = load_run(config, overrides, "lightningdit").model_copy(update={"ckpt_path": str(source)})
        found = diffusion_weights(run, weights)
        build_diffusion(found, select_ops("reference"), str(source))  # it fits
        return list(save_export(name, found))
    sizes = infer_config(tensors, source) if config is None else load_run(config, overrides, "vavae").model
    tokenizer = build_tokenizer(tensors, sizes, select_ops("reference"), source)
    path = name.with_name(f"{name.name}.safetensors")
    write_export(path, tokenizer.state_dict(), sizes, step=None, weights=taken or "unnamed", source=str(source))
    return [path, path.with_suffix(".json")]


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
