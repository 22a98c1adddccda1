"""The inputs of a scaling plan, out of a run file and options, each with where it is from."""

import argparse
from dataclasses import dataclass, field

from common.data_sheets import SHEETS
from launch.config import ConfigError, LightningDiTRun, Run
from launch.scaling_model import gpu as single
from launch.scaling_model.gpu import Gpu, optimizer_seconds, parse_efficiencies
from launch.scaling_model.network import Network, parse_network
from launch.scaling_model.plan import MTBF_HOURS, MTBF_SOURCE, Surroundings, Workload
from launch.scaling_model.zero import STAGES
from launch.training.checks import check_run
from launch.training.config import TrainConfig
from launch.training.costs import network_costs, own_kind

PEAK_OF = "NVIDIA H100 80GB HBM3"
DEFAULT_BUCKET = 500_000_000  # DeepSpeed's reduce_bucket_size
DEFAULT_MICRO_BATCH = 128


@dataclass(frozen=True)
class Inputs:
    """What a plan is computed from. stated: name → (value, source), for people."""

    title: str
    work: Workload
    gpu: Gpu
    network: Network
    around: Surroundings
    stated: dict[str, tuple[str, str]] = field(default_factory=dict)


def gather_inputs(args: argparse.Namespace, run: Run, kind: str) -> Inputs:
    """Raises ConfigError where the rate of one GPU is given not once, or a value is not possible."""
    stated: dict[str, tuple[str, str]] = {}
    check_run(run)
    networks = network_costs(run, [own_kind(run)])[0][own_kind(run)]
    parameters = sum(network.trainable for network in networks)
    flops = sum(network.flops for network in networks)
    stated["trained parameters"] = f"{parameters:,}", "counted"
    stated["training FLOPs of an image"] = f"{flops / 1e9:,.2f} GFLOP", "counted"
    gpu = _gpu(args, run, parameters, flops, stated)
    network = parse_network(args.network)
    links = f"{network.intra:g} GB/s within {network.per_node} GPUs, {network.inter:g} GB/s across, each way"
    stated["network"] = f"{network.name}: {links}", network.source
    stated["links reach"] = (
        f"{network.utilization:.0%} of that, {network.latency:g} µs a round",
        _said(args.network, "utilization"),
    )
    work = _workload(args, run, parameters, flops, gpu, stated)
    around = _surroundings(args, stated)
    model = getattr(run.model, "model_type", None) or kind
    return Inputs(f"{model}, global batch {work.global_batch:,}, ZeRO {work.stage}", work, gpu, network, around, stated)


def _said(text: str, key: str) -> str:
    return "given" if f"{key}=" in text else "assumed"


def _gpu(args: argparse.Namespace, run: Run, parameters: int, flops: float, stated: dict) -> Gpu:
    given = [name for name in ("rows", "images_per_second", "mfu") if getattr(args, name) is not None]
    if len(given) != 1:
        raise ConfigError(
            "the rate of one GPU is wanted once: --rows FILE (measured steps of the bench), --images-per-second N with "
            f"--micro-batch B, or --mfu F (got {', '.join(given) or 'none'})"
        )
    micro, measured = args.micro_batch, None
    if args.rows is not None:
        if not isinstance(run, LightningDiTRun) or run.model.model_type is None:
            raise ConfigError("--rows has steps of LightningDiT by model_type: give --images-per-second or --mfu")
        rate, micro, measured, source = single.from_rows(args.rows, run.model.model_type, args.variant, micro)
    elif args.images_per_second is not None:
        if micro is None:
            raise ConfigError("--images-per-second is the rate at a micro-batch: give --micro-batch")
        rate, source = args.images_per_second, "given"
    else:
        micro = micro or run.train.micro_batch_size or DEFAULT_MICRO_BATCH
        peak, of = _peak(args.peak, run.train.precision)
        rate, source = args.mfu * peak * 1e12 / flops, f"given: {args.mfu:.1%} of {peak:g} TFLOP/s{of}"
    stated["one GPU"] = f"{rate:,.1f} images/s at micro-batch {micro}", source
    if args.optimizer_ms is not None:
        optimizer, how = args.optimizer_ms / 1e3, "given"
    elif measured is not None:
        optimizer, how = measured, "measured, in the same step"
    else:
        optimizer = optimizer_seconds(parameters)
        how = f"computed: {single.OPTIMIZER_BYTES} bytes a parameter at {single.COPY_RATE / 1e12:g} TB/s"
    stated["optimizer"] = f"{optimizer * 1e3:.1f} ms of that step", how
    if optimizer >= micro / rate:
        raise ConfigError(
            f"the optimizer's {optimizer * 1e3:.1f} ms are no part of a step of {micro / rate * 1e3:.1f} ms"
        )
    points = parse_efficiencies(args.efficiency) if args.efficiency else {}
    curve = args.efficiency or f"b/(b + {args.half_batch:g}) at micro-batch b"
    stated["efficiency of a GPU"] = curve, "given" if points or args.half_batch != single.HALF_BATCH else "assumed"
    return Gpu(rate, micro, optimizer, args.half_batch, points)


def _peak(asked: float | None, precision: str) -> tuple[float, str]:
    """TFLOP/s, and where they are from if that is not said: of a GPU whose sheet states them for the precision."""
    if asked is not None:
        return asked, ""
    stated = SHEETS[PEAK_OF].peak(precision)
    assert stated is not None, "the sheet has both precisions"
    return stated / 1e12, f", dense {precision} of H100 and H200 (NVIDIA data sheets)"


def _workload(args, run: Run, parameters: int, flops: float, gpu: Gpu, stated: dict) -> Workload:
    options = run.deepspeed.merged_overrides(run.train.precision)
    zero, stage = options.get("zero_optimization", {}), run.deepspeed.zero_stage
    count, batch = run.data.num_images, run.train.global_batch_size
    epochs = args.epochs or run.train.steps(count) * batch / count
    told = "given" if args.epochs else "run file"
    stated["training"] = f"{epochs:.1f} epochs of {count:,} images", f"{told}; images: data.num_images"
    weight = 2 if run.train.precision == "bfloat16" else 4
    named = {"bf16": "bfloat16", "fp32": "float32"}.get(str(options.get("communication_data_type")))
    travel = args.gradients or run.train.grad_sum_dtype or named
    gradient = {"bfloat16": 2, "float32": 4}[travel] if travel else weight
    stated["bytes that travel"] = (
        f"{gradient} of a gradient, {weight} of a weight",
        "given" if args.gradients else "run file",
    )
    overlaps = [overlap_of(run.train, each, zero.get("overlap_comm"), args.overlap) for each in STAGES]
    overlapped, why = overlaps[stage]
    bucket = zero.get("reduce_bucket_size") or DEFAULT_BUCKET
    text = f"in buckets of {bucket:,}, while others are made" if overlapped else "when the backward pass has ended"
    stated["gradients are summed"] = text, why
    return Workload(
        parameters=parameters,
        flops_per_image=flops,
        images=epochs * count,
        global_batch=batch,
        micro_batch=run.train.micro_batch_size or gpu.micro_batch,
        stage=stage,
        weight_bytes=weight,
        gradient_bytes=gradient,
        overlapped=tuple(each for each, _ in overlaps),
        bucket=bucket,
        ckpt_every=run.train.ckpt_every,
    )


def overlap_of(train: TrainConfig, stage: int, overlap_comm: bool | None, asked: str = "auto") -> tuple[bool, str]:
    """Whether gradients travel during the backward pass that makes them, and why. asked: "yes", "no" or "auto".

    A network compiled whole hands all its gradients over at once, when its graph has ended.
    """
    if stage == 0:
        return False, "ZeRO 0: DeepSpeed sums afterwards"
    if asked != "auto":
        return asked == "yes", "given"
    if not (stage == 3 if overlap_comm is None else overlap_comm):
        return False, "overlap_comm is false"
    mode = train.compile if train.compile != "auto" else "inductor" if stage < 3 else "none"
    if mode in ("none", "regional"):
        return True, f"overlap_comm, train.compile {mode}"
    return False, f"train.compile {mode} makes one graph of the backward pass"


def _surroundings(args: argparse.Namespace, stated: dict) -> Surroundings:
    defaults = Surroundings()
    around = Surroundings(
        MTBF_HOURS if args.mtbf_hours is None else args.mtbf_hours,
        args.restart_minutes / 60,
        args.host_rate * 1e9,
        args.storage_rate * 1e9,
        args.critical_batch,
    )
    source = MTBF_SOURCE if args.mtbf_hours is None else "given"
    stated["failures of a GPU"] = f"one in {around.mtbf:,.0f} hours", source
    for name, value, default, text in (
        ("starting again", around.restart, defaults.restart, f"{around.restart * 60:g} minutes"),
        ("a GPU's copy to its host", around.host_rate, defaults.host_rate, f"{around.host_rate / 1e9:g} GB/s"),
        ("storage, of all together", around.storage_rate, defaults.storage_rate, f"{around.storage_rate / 1e9:g} GB/s"),
    ):
        stated[name] = text, "assumed" if value == default else "given"
    if around.critical_batch is not None:
        stated["critical batch"] = f"{around.critical_batch:,.0f}", "given"
    return around
