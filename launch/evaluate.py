"""`python -m launch evaluate`: samples against a reference, reconstructions against originals, latents, in figures.

    evaluate --samples samples.npz --reference imagenet256.npz --inception-weights inception.pth
    evaluate CONFIG --samples samples/                       # reference: the config's data.fid_reference_file
    evaluate --write-reference imagenet256.npz --reference imagenet/train --image-size 256
    evaluate --tokenizer vavae.safetensors --originals imagenet/val --image-size 256
    evaluate --reconstructions decoded/ --originals images/
    evaluate --latents latents/ --repeats 10                 # how evenly they fill their space
    deepspeed --module launch evaluate …                     # samples, references, reconstructions: a process per GPU

Samples, originals and reconstructions are folders of images, tars, or npz files with `arr_0`; a reference may also be
an npz with the statistics `mu` and `sigma` (and `mu_s`, `sigma_s` for sFID). What made the samples is read from the
JSON beside them: `samples.json` for `samples.npz`, `folder/samples.json` for `folder`. With a CONFIG, latents are
mirrored where its `data.latent_flip` says so, else half of them are, as published. Image files are decoded as
published, unless --decoder or a tokenizer's CONFIG (`data.decoder`, `data.exif_rotation`, `data.image_size`) says
otherwise. Nothing is downloaded without --download. How each figure is computed, and what it compares with:
launch/evaluation/README.md.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch

from common.files import JSON_LIMIT, open_regular, require_writable, write_json
from launch.arguments import load_run
from launch.config import VavaeRun, select_ops
from launch.evaluation.dinov2 import ClassTokenFeatures
from launch.evaluation.encoded_images import Decoding, EncodedImages
from launch.evaluation.features import Extractor, FoundationFeatures, InceptionFeatures, TogetherFeatures
from launch.evaluation.image_source import ImageSource, open_images
from launch.evaluation.labels import read_labels
from launch.evaluation.latent_space import evaluate_latents
from launch.evaluation.metadata import labels_beside, read_metadata, repeatable, require_described, require_promised
from launch.evaluation.moments import NOT_STATED
from launch.evaluation.one_pass import measure_together
from launch.evaluation.options import mode, parse
from launch.evaluation.reconstructions import (
    Reconstructions,
    evaluate_reconstructions,
    perceptual_distance,
    require_pairs,
)
from launch.evaluation.reference import open_reference, require_one_size, write_reference
from launch.evaluation.result import as_text
from launch.evaluation.runner import evaluate_samples
from launch.evaluation.self_test import check_extractor, self_test
from launch.hub import tokenizer_copy
from launch.runtime import launcher
from launch.runtime.processes import Processes
from lightningdit.data import LatentDataset
from vavae.weights import fingerprint, load_tokenizer

_COMMON_ENTRIES = {"metrics", "skipped", "notes"}
_FILE_ENTRIES = {"decoder", "decoded_on", "exif_rotation", "crop", "image_size"}
_NETWORK_ENTRIES = {"features", "networks"}
_SAMPLES_ENTRIES = {"samples", "samples_sha256", "reference", "basis", "self_test"}
#: Mode → the entries of its result that are no metadata.
_RESULT_ENTRIES = {
    "samples": _COMMON_ENTRIES | _SAMPLES_ENTRIES | _NETWORK_ENTRIES | _FILE_ENTRIES,
    "originals": _COMMON_ENTRIES | {"images", "originals", "reconstructions"} | _NETWORK_ENTRIES | _FILE_ENTRIES,
    "latents": _COMMON_ENTRIES
    | {"spread", "vectors", "vectors_sha256", "repeats", "seed", "mirrored", "latents", "images", "shape"},
}


def main(argv: list[str]) -> int:
    """Measure, print, and write JSON; returns the exit status."""
    args = _parse(argv)
    if args.write_reference is not None:
        return _write_reference(args)
    if args.output:
        _require_output(args.output)
    measure = _samples if args.samples else _reconstructions if args.originals else _latents
    result = measure(args)
    if wrong := [name for name, value in result["metrics"].items() if not math.isfinite(value)]:
        raise ValueError(
            f"not finite, so no figure, of {args.samples or args.originals or args.latents}: {', '.join(wrong)}"
        )
    if launcher.rank() == 0:
        print(as_text(result))
        if args.output:
            write_json(args.output, result)
            print(f"written to {args.output}")
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    return parse(argv, __doc__)


def _require_output(path: Path) -> None:
    """Raise ValueError or WriteError, before anything is measured, where the result cannot or should not go there."""
    require_writable(path)
    if not path.exists():
        return
    try:
        with open_regular(path) as f:
            earlier = json.loads(f.read(JSON_LIMIT))  # NaN and infinity, too, which earlier versions wrote
    except (ValueError, RecursionError):
        earlier = None
    if not (isinstance(earlier, dict) and "metrics" in earlier):
        raise ValueError(f"--output {path} is already there and is no result of evaluate: give another name")


def _processes(args: argparse.Namespace) -> Processes:
    """The processes that measure together, on the device that is asked for; raises LaunchError where they cannot."""
    environment = launcher.launch_environment()
    if environment is None or environment.world_size == 1:
        # As several processes have it: float32 products are IEEE, and figures repeat.
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = False, True
        return Processes(0, 1, torch.device(args.device))
    if mode(args) == "latents":
        error = launcher.LaunchError("evaluate --latents runs as one process: start it with `python -m launch`")
        error.reported_by_main = True  # type: ignore[attr-defined]
        raise error
    if args.device not in ("cpu", "cuda"):
        raise launcher.LaunchError(f"--device {args.device}: of several processes each has a GPU of its own (cuda)")
    # Imports DeepSpeed: seconds that one process need not wait.
    from launch.training.engine import start_processes

    started = start_processes(timeout_minutes=24 * 60)  # processes wait for the slowest, and for the figures
    device = started.device if args.device == "cuda" else torch.device("cpu")
    return Processes(started.rank, started.world_size, device, started.host_group)


def _samples(args: argparse.Namespace) -> dict:
    reference, num_classes = args.reference, args.num_classes
    if args.config is not None:
        run = load_run(args.config, args.overrides, "lightningdit")
        reference, num_classes = run.data.fid_reference_file, num_classes or run.data.num_classes
    if reference is None:
        raise ValueError("no reference: give --reference, or a config with data.fid_reference_file")
    processes = _processes(args)
    files = args.image_size, args.crop, _decoding(args, processes)
    metadata = _metadata(args, args.samples)
    samples = open_images(args.samples, *files, by_index=metadata.get("by_class") is True or None)
    known = open_reference(reference, *files)
    require_promised(samples, metadata, args.expect)
    processes.on_main(lambda: require_described(samples, metadata))
    labels = read_labels(samples, metadata, num_classes, labels_beside(args.samples))
    if known.images is not None:
        require_one_size(samples, known.images)  # before networks are loaded, which may be a download
    return evaluate_samples(
        samples,
        known,
        _extractors(args, processes.device),
        metadata=repeatable(samples, metadata) | _decoder_of(samples),
        batch_size=args.batch_size,
        allow_few=args.allow_few,
        labels=labels,
        processes=processes,
    )


def _write_reference(args: argparse.Namespace) -> int:
    """Measure the images of --reference once, for all evaluations; returns the exit status."""
    if args.reference is None:
        raise ValueError("--write-reference needs --reference, the images that it is made of")
    if args.write_reference.suffix != ".npz":
        raise ValueError(f"--write-reference {args.write_reference}: the name has to end in .npz")
    require_writable(args.write_reference)
    if args.write_reference.exists():
        raise ValueError(f"--write-reference {args.write_reference} is already there: give another name, or remove it")
    processes = _processes(args)
    images = open_images(args.reference, args.image_size, args.crop, _decoding(args, processes))
    require_promised(images, {}, args.expect)
    extractor = _extractors(args, processes.device)
    self_test(str(processes.device))
    check_extractor(extractor, next(iter(images.batches(2))))
    measured = measure_together(images, extractor, args.batch_size, processes, keep=())

    def write() -> None:
        assert measured is not None
        facts = write_reference(args.write_reference, images, measured, extractor, args.reference_images)
        kept = f"{facts['kept_images']:,} of them inside"
        print(f"{args.write_reference}: statistics of {facts['images']:,} images, {kept}")

    processes.on_main(write)
    return 0


def _decoding(args: argparse.Namespace, processes: Processes) -> Decoding:
    return Decoding(args.decoder or "pil", device=str(processes.device))


def _reconstructions(args: argparse.Namespace) -> dict:
    processes = _processes(args)
    image_size, decoding = args.image_size, _decoding(args, processes)
    if args.config is not None:
        run = load_run(args.config, args.overrides, "vavae")
        assert isinstance(run, VavaeRun)
        data = run.images()
        image_size = image_size or data.image_size
        decoding = Decoding(args.decoder or data.decoder, data.exif_rotation, str(processes.device))
    files = image_size, args.crop, decoding
    originals = open_images(args.originals, *files)
    if args.tokenizer:
        tokenizer = load_tokenizer(tokenizer_copy(args.tokenizer), select_ops("auto")).to(processes.device)
        decoded: ImageSource = Reconstructions(originals, tokenizer, posterior=args.posterior, seed=args.seed)
        hashes = {"tokenizer": fingerprint(tokenizer)}
        made = {"dtype": "float32", "posterior": args.posterior, "seed": args.seed, "hashes": hashes}
    else:
        decoded, made = open_images(args.reconstructions, *files), {}
    require_pairs(originals, decoded)
    metadata = made | _metadata(args, args.reconstructions) | _decoder_of(originals)
    skipped: dict[str, str] = {}
    extractor = _unless_missing(
        lambda: _extractor(args, processes.device), "rfid", skipped, args.inception_weights or args.foundation
    )
    lpips = _unless_missing(lambda: _lpips(args, processes.device), "lpips", skipped, args.lpips_weights)
    if lpips is None:
        skipped["lpips"] += " (here: --lpips-weights)"
    return evaluate_reconstructions(
        originals,
        decoded,
        extractor=extractor,
        lpips=lpips,
        metadata=metadata,
        batch_size=args.batch_size,
        allow_few=args.allow_few,
        skipped=skipped,
        processes=processes,
    )


def _decoder_of(images: ImageSource) -> dict:
    """How image files were decoded and cropped, as facts of the result; empty where they were not cropped."""
    return images.facts if isinstance(images, EncodedImages) else {}


def _latents(args: argparse.Namespace) -> dict:
    _processes(args)
    flip = True
    if args.config is not None:
        run = load_run(args.config, args.overrides, "lightningdit")
        flip = run.data.latent_flip
    latents, metadata = LatentDataset(args.latents, latent_flip=flip), _metadata(args, None)
    result = evaluate_latents(latents, vectors=args.vectors, repeats=args.repeats, seed=args.seed)
    if result["tokenizer"] in (NOT_STATED, None):  # by the latents; then the metadata may
        result["tokenizer"] = metadata.get("tokenizer", NOT_STATED)
    return metadata | result


def _unless_missing(build: Callable, figure: str, skipped: dict[str, str], named: Path | None):
    """A network, or None with the reason where its weights cannot be had; the other figures do not need it.

    Weights that were `named` are asked for: without them there is no result.
    """
    try:
        return build()
    except (ValueError, RuntimeError) as e:
        if named is not None:
            raise
        skipped[figure] = str(e)
        return None


def _extractors(args: argparse.Namespace, device: torch.device) -> Extractor:
    """All networks that samples go through: Inception or a foundation model in its place, and DINOv2 where named."""
    if args.dinov2_weights is None:
        return _extractor(args, device)
    return TogetherFeatures(_extractor(args, device), ClassTokenFeatures.from_file(args.dinov2_weights, device))


def _extractor(args: argparse.Namespace, device: torch.device) -> Extractor:
    if args.foundation is not None:
        return FoundationFeatures.from_file(args.foundation, device)
    return InceptionFeatures(args.inception_weights, device, sha256=args.inception_sha256, download=args.download)


def _lpips(args: argparse.Namespace, device: torch.device) -> Callable:
    return perceptual_distance(args.lpips_weights, device, args.download)


def _metadata(args: argparse.Namespace, images: Path | None) -> dict:
    """The facts in the JSON that was named or lies beside the images, changed by --set."""
    return read_metadata(args.metadata, images, args.set, frozenset(_RESULT_ENTRIES[mode(args)]))
