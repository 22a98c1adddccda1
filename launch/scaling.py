"""`python -m launch scaling CONFIG [key=value …] --gpus 8,64,1024 --network PRESET`: many GPUs, on paper.

Computes from what one GPU does what the run of CONFIG would take on many: the parts of a step, what is sent over NVLink
and InfiniBand under each ZeRO stage, where more GPUs stop to help, what saves and failures cost, hours in all. Nothing
is measured and nothing is run: `launch/scaling.md` has the formulas, their sources and what they leave out.

The rate of one GPU is given by one of
    --rows FILE                                a measured step of the bench, such as bench/results/nvidia-h200.jsonl
    --images-per-second N --micro-batch B      a rate measured elsewhere
    --mfu F                                    a share of the GPU's peak
"""

import argparse
import json
import math
import sys
from collections.abc import Callable

from launch.arguments import add_run_file, local_path
from launch.config import KINDS, ConfigError, LightningDiTRun, VavaeRun, load
from launch.scaling_model.gpu import HALF_BATCH
from launch.scaling_model.inputs import gather_inputs
from launch.scaling_model.network import PRESETS
from launch.scaling_model.plan import Surroundings
from launch.scaling_model.report import as_json, as_text


def main(argv: list[str]) -> int:
    """Print the plan; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m launch scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_run_file(parser, "YAML file of the run", "train.global_batch_size=4096")
    _add_options(parser)
    args = parser.parse_intermixed_args(argv)
    run, notes = load(args.config, args.overrides, kind=args.kind)
    assert isinstance(run, LightningDiTRun | VavaeRun)
    for note in notes:
        print(f"{args.config}: {note}", file=sys.stderr)
    if args.efficiency and args.half_batch != HALF_BATCH:
        raise ConfigError("--efficiency and --half-batch both say how a GPU slows down: give one")
    inputs = gather_inputs(args, run, args.kind)
    if args.json:
        print(json.dumps(as_json(inputs, args.gpus, args.least_efficiency), indent=1, allow_nan=False))
    else:
        print(as_text(inputs, args.gpus, args.least_efficiency))
    return 0


def _add_options(parser: argparse.ArgumentParser) -> None:
    defaults = Surroundings()
    parser.add_argument("--kind", choices=list(KINDS), default="lightningdit", help="of CONFIG (default: %(default)s)")
    parser.add_argument("--gpus", type=_counts, default=[8, 64, 512], metavar="N,…", help="default: 8,64,512")
    parser.add_argument(
        "--network",
        default="h100-ndr",
        metavar="NAME",
        help=f"{', '.join(PRESETS)} (default: %(default)s), or intra=GB/s,inter=GB/s,latency=µs,per_node=N,"
        "utilization=F, also behind a name",
    )
    parser.add_argument("--rows", type=local_path, metavar="FILE", help="JSON lines of the bench")
    parser.add_argument("--variant", default="trainer", help="which of its steps (default: %(default)s)")
    parser.add_argument("--images-per-second", type=_positive, metavar="N", help="of one GPU")
    parser.add_argument("--mfu", type=_share, metavar="F", help="between 0 and 1, of --peak")
    parser.add_argument("--peak", type=_positive, metavar="TFLOP/s", help="default: an H100's in train.precision")
    parser.add_argument("--micro-batch", type=_count, metavar="B", help="of that rate")
    parser.add_argument("--optimizer-ms", type=_positive, metavar="MS", help="the optimizer's part of its step")
    parser.add_argument("--efficiency", metavar="B:F,…", help="of a GPU by micro-batch, such as 8:0.5,128:1")
    parser.add_argument(
        "--half-batch", type=_positive, default=HALF_BATCH, metavar="B", help="micro-batch of half of its best rate"
    )
    parser.add_argument("--gradients", choices=["bfloat16", "float32"], help="as they travel (default: by the file)")
    parser.add_argument(
        "--overlap", choices=["auto", "yes", "no"], default="auto", help="sums during the backward pass"
    )
    parser.add_argument("--epochs", type=_positive, metavar="N", help="default: the length of the file's run")
    parser.add_argument("--critical-batch", type=_positive, metavar="B", help="for weak scaling (arXiv 1812.06162)")
    parser.add_argument("--mtbf-hours", type=_positive, metavar="H", help="between failures of one GPU")
    parser.add_argument("--restart-minutes", type=_positive, default=defaults.restart * 60, metavar="MIN")
    parser.add_argument("--host-rate", type=_positive, default=defaults.host_rate / 1e9, metavar="GB/s")
    parser.add_argument("--storage-rate", type=_positive, default=defaults.storage_rate / 1e9, metavar="GB/s")
    parser.add_argument("--least-efficiency", type=_share, default=0.5, metavar="F", help="default: %(default)g")
    parser.add_argument("--json", action="store_true", help="all figures, in seconds, hours and bytes; null: infinite")


def _number(text: str, wanted: str, fits: Callable[[float], bool]) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and fits(value)):
        raise argparse.ArgumentTypeError(f"{wanted} is wanted (got {text!r})")
    return value


def _positive(text: str) -> float:
    return _number(text, "a number above 0", lambda value: value > 0)


def _share(text: str) -> float:
    return _number(text, "a number above 0, at most 1,", lambda value: 0 < value <= 1)


def _count(text: str) -> int:
    return int(_number(text, "a whole number above 0", lambda value: value >= 1 and value == int(value)))


def _counts(text: str) -> list[int]:
    return sorted({_count(part) for part in text.split(",")})
