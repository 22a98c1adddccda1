"""Does the VF loss help? Tokenizers trained with and without it, and a LightningDiT on the latents of each.

python -m bench.vf_study                          handwritten digits, on a CPU or a GPU
python -m bench.vf_study --seeds 0 1 2 --tokenizer digits_vavae.yaml train.max_steps=300
python -m bench.vf_study --images TRAIN --heldout VAL --tokenizer CONFIG --lightningdit CONFIG [key=value …]

Same run file, budget, images and initial weights: `loss.use_vf` is all that differs between the two tokenizers of a
seed, and their latents all that differs between the two LightningDiTs. Every stage is a program of `launch`. The same
command goes on where an interrupted one stopped, and more --seeds add to those that are there.

In OUTPUT lie a folder for each seed and alignment, and unless --out names another file `vf_study.jsonl`: a row for
each, with a page (.md) and a picture (.svg) beside it.
"""

import argparse
import hashlib
import json
import logging
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.measure import program
from bench.measure.host import host
from bench.measure.rows import Row, complete, key, line, machine, read
from bench.pages import alignment as pages
from bench.workloads.alignment import Arm, Material, RunFile, digits
from common.files import make_directory, read_json, require_writable, write_json, write_text
from launch.arguments import local_path
from launch.config import Run

MODULE = "bench.vf_study"
OUTPUT = Path("output") / "vf_study"
DIGITS = {"tokenizer": ["digits_vavae.yaml"], "lightningdit": ["digits.yaml"]}
#: Options that mean nothing without --images.
_OF_FOLDERS = ("heldout", "foundation", "inception_weights", "allow_few")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options; wrong ones end the program."""
    made = argparse.ArgumentParser(
        prog=f"python -m {MODULE}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, (default,) in DIGITS.items():
        what = f"its run file, and what to change in it (default: {default})"
        made.add_argument(f"--{name}", nargs="+", metavar=("CONFIG", "key=value"), help=what)
    made.add_argument("--seeds", nargs="+", type=program.whole_number(0), default=[0, 1], metavar="N")
    made.add_argument("--repeats", type=program.whole_number(1), default=3, help="draws of latents to average over")
    made.add_argument("--output", type=local_path, default=OUTPUT, help=f"folder of the runs (default: {OUTPUT})")
    made.add_argument("--out", type=local_path, metavar="ROWS", help="put the rows into this file, pages beside it")
    folders = made.add_argument_group("image folders")
    folders.add_argument("--images", type=local_path, help="to train on, in place of the digits: class folders, tars …")
    folders.add_argument("--heldout", type=local_path, help="to be reconstructed, and for samples to be compared with")
    folders.add_argument("--foundation", type=local_path, help="network for Fréchet distances, with its .json beside")
    folders.add_argument("--inception-weights", type=local_path, help="torch-fidelity's file (default: download)")
    folders.add_argument("--allow-few", action="store_true", help="compare no more images than there are features")
    options = made.parse_args(argv)
    _check(made, options)
    return options


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.images is None:
        for name in _OF_FOLDERS:
            if getattr(options, name) != parser.get_default(name):
                parser.error(f"--{name.replace('_', '-')} changes nothing without --images")
    elif missing := [name for name in ("heldout", *DIGITS) if getattr(options, name) is None]:
        parser.error(f"--images needs {', '.join(f'--{name}' for name in missing)}")
    if options.foundation and options.inception_weights:
        parser.error("--inception-weights changes nothing beside --foundation: give one of them")
    if len(set(options.seeds)) != len(options.seeds):
        parser.error(f"--seeds {' '.join(map(str, options.seeds))}: each once")


def material(options: argparse.Namespace) -> Material:
    """What the study is of; the digits are made where they are not there yet. Raises ValueError where it is wrong."""
    path, *overrides = options.tokenizer or DIGITS["tokenizer"]
    tokenizer = RunFile("vavae", path, tuple(overrides))
    path, *overrides = options.lightningdit or DIGITS["lightningdit"]
    lightningdit = RunFile("lightningdit", path, tuple(overrides))
    if options.images is None:
        made = digits(options.output, tokenizer, lightningdit, options.repeats)
    else:
        made = Material(
            name="/".join(options.images.absolute().parts[-2:]),
            images=options.images,
            heldout=options.heldout,
            tokenizer=tokenizer,
            lightningdit=lightningdit,
            foundation=options.foundation,
            inception_weights=options.inception_weights,
            repeats=options.repeats,
            allow_few=options.allow_few,
        )
    made.check()
    return made


def claim(output: Path, settings: dict) -> str:
    """Note in a study's folder what it is of → a short name of that.

    Raises:
        ValueError: the folder holds a study of other settings.
    """
    path = output / "study.json"
    earlier = read_json(path) if path.is_file() else settings
    if changed := sorted(name for name in earlier | settings if earlier.get(name) != settings.get(name)):
        raise ValueError(
            f"{output} holds a study with other settings ({', '.join(changed)}): name another --output, or give "
            "the options that it was begun with"
        )
    write_json(path, settings)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def configs(made: Material) -> dict[str, dict]:
    """The two run files as rows state them: name, overrides, steps, batch, and a hash of all that they say."""
    tokenizer, lightningdit = made.runs
    files: dict[str, tuple[RunFile, Run]] = {
        "tokenizer": (made.tokenizer, tokenizer),
        "LightningDiT": (made.lightningdit, lightningdit),
    }
    found = {}
    for name, (file, run) in files.items():
        said = json.dumps(file.settings(run), sort_keys=True)
        found[name] = {
            "file": Path(file.path).name,
            "overrides": [text for text in file.overrides if not text.startswith("foundation.weights=")],
            "steps": run.train.max_steps,
            "batch": run.train.global_batch_size,
            "sha256": hashlib.sha256(said.encode()).hexdigest(),
        }
    return found


def merge(path: Path, fresh: Sequence[Row]) -> None:
    """Put rows into a file, each in the place of the one with its names, if there is one."""
    have = {key(row): row for device in ("cpu", "cuda") for row in (read(path, device) if path.exists() else ())}
    have |= {key(row): row for row in fresh}
    write_text(path, "".join(line(row) for row in have.values()))


def run(options: argparse.Namespace) -> pages.Study:
    """The whole study, with pages of all in its file of rows → what is there of it."""
    from launch.training.engine import uses_cuda  # imports DeepSpeed

    out = options.out or pages.rows_in(options.output)
    require_writable(out)
    make_directory(options.output)
    common = machine("cuda" if uses_cuda() else "cpu") | {name: host()[name] for name in ("cpu", "cores")}
    common |= {"threads": torch.get_num_threads(), "run": uuid.uuid4().hex[:12]}
    made = material(options)
    settings = made.settings()
    study = claim(options.output, settings)
    facts = {"study": study, "digits": made.digits, "settings": settings, "configs": configs(made)}
    for seed in options.seeds:
        for use_vf in (False, True):
            folder = options.output / f"seed{seed}-{'vf' if use_vf else 'no-vf'}"
            make_directory(folder)
            found = Arm(folder, made, seed, use_vf).run()
            if not (folder / "row.json").is_file():
                row = {"kind": pages.KIND, "seed": seed, "use_vf": use_vf, "status": "ok", "reason": "", **facts}
                write_json(folder / "row.json", complete(row | found, common))
            merge(out, [read_json(folder / "row.json")])
    for path in (out, *pages.write(out)):
        print(path)
    return next(each for each in pages.load(out) if each.name == study)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    for package in ("lightningdit", "vavae", "launch"):
        logging.getLogger(package).setLevel(logging.INFO)
    try:
        study = run(options)
    except (ValueError, OSError) as error:
        print(f"{MODULE}: {error}", file=sys.stderr)
        return program.USAGE
    print(f"\n{pages.results_table(study)}\n\n{pages.verdict(study)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
