"""The plan that --dry-run prints: steps, parameters, memory, FLOPs and disk of a run, without running it."""

import torch

import kernels
from launch.config import ConfigError, LightningDiTRun, Run, VavaeRun
from launch.config_files import find_config
from launch.runtime import launcher
from launch.training.checks import check_run
from launch.training.costs import network_costs, own_kind, setup_of
from launch.training.deepspeed_options import DEEPSPEED_FILES
from launch.training.gradient_sums import engine_options
from launch.training.loader import BatchSplit
from launch.training.memory import GIB, STAGES, Setup
from launch.training.micro_batches import Costs, Fit, nearest_that_divide
from launch.training.plan import RunPlan
from launch.training.planned_data import device_here, latents_on_device, open_data, reading_lines, stored_width
from launch.training.remarks import remarks, stage_lines
from vavae.decoders.choice import lacking

#: By ZeRO stage, the file of `launch/deepspeed/`.
SHIPPED_FILES = (None, "zero1.json", "zero2.json", "zero3.json")


def planned_processes(gpus: int | None) -> tuple[int, str | None]:
    """How many processes a plan is for (`--gpus`, else as launched, else the GPUs here), and a note if that is a guess.

    Raises ConfigError for less than one.
    """
    if gpus is not None:
        if gpus < 1:
            raise ConfigError(f"--gpus must be at least 1, got {gpus}")
        return gpus, None
    environment = launcher.launch_environment()
    if environment is not None:
        return environment.world_size, None
    here = torch.cuda.device_count()
    if here:
        return here, None
    return 1, "planned for 1 process: there is no GPU here; --gpus N plans for N of them, --memory M for GPUs of M GiB"


def card_bytes(memory: float | None) -> float | None:
    """Bytes of a card of `--memory` GiB; raises ConfigError for what no card has."""
    if memory is None:
        return None
    if not 1 <= memory <= 10_000:
        raise ConfigError(f"--memory is the GiB of one GPU, from 1 to 10,000, got {memory:g}")
    return memory * GIB


def plan_run(
    run: Run,
    kind: str,
    processes: int,
    *,
    card: float | None = None,
    processes_note: str | None = None,
    on_gpus: bool = True,
) -> RunPlan:
    """The figures of a run on so many processes, without making any of it; with `card`, what fits so many bytes.

    on_gpus: whether the processes are GPUs' (those of CPUs pin no host memory).
    Raises ValueError for what the run itself would refuse, but that its data or a backend is missing: the plan may be
    for another machine, and says so.
    """
    check_run(run)
    train, absent = run.train, _backends_missing(run)
    if isinstance(run, VavaeRun) and (why := lacking(run.data.decoder, device_here())):
        absent.append(f"data.decoder {run.data.decoder} ({why})")
    opened = open_data(run, kind, absent)
    num_images = len(opened["data_path"]) if "data_path" in opened else run.data.num_images
    micro_batch_size = _micro_batch_size(run, processes)
    own = own_kind(run)
    kinds = [own] if card is None else _kinds(run, own)
    costs, frozen, latents = network_costs(run, kinds)
    networks = costs[own]
    reading: tuple[str, ...] = ()
    if isinstance(run, VavaeRun):
        flops = sum(network.flops for network in networks)
        gpus = min(processes, max(torch.cuda.device_count(), 1))
        reading = reading_lines(run, opened.get("data_path"), gpus, flops)
    steps, stage, stages = train.steps(num_images), run.deepspeed.zero_stage, _stages(run)
    samples = opened.get("data_path")
    store_bytes, store_lines = latents_on_device(run, samples, latents, num_images, processes)
    setup = setup_of(run, processes, frozen=frozen, latents=store_bytes)
    return RunPlan(
        title=f"plan for {kind} ({getattr(run.model, 'model_type', None) or 'sizes of its own'}), "
        f"preset {run.preset}, {train.precision}",
        networks=tuple(networks),
        num_images=num_images,
        images_assumed="data_path" not in opened,
        steps=steps,
        global_batch_size=train.global_batch_size,
        micro_batch_size=micro_batch_size,
        setup=setup,
        stage=stage,
        stages_allowed=tuple(stages),
        processes_note=processes_note,
        fit=None if card is None else _fit(run, costs, setup, card, own, stages),
        background_save=getattr(train, "background_save", True),
        pinned=on_gpus,
        latents=latents,
        stored=stored_width(run, samples),
        latent_store=store_lines,
        keep_checkpoints=train.keep_checkpoints,
        checkpoints=-(-steps // train.ckpt_every),
        ckpt_every=train.ckpt_every,
        keep_every=train.keep_every,
        reading=reading,
        absent=tuple(absent),
        downloads=_downloads(run),
        losses=tuple(stage_lines(run, num_images)),
        remarks=tuple(remarks(run, steps, num_images)),
    )


def _fit(
    run: Run, costs: Costs, setup: Setup, card: float, own: bool | int | str, stages: dict[int, str | None]
) -> Fit:
    in_model = bool(getattr(run.model, "use_checkpoint", False))
    return Fit(
        costs,
        setup,
        card,
        per_process=run.train.global_batch_size // setup.processes,
        stage=run.deepspeed.zero_stage,
        kind=own,
        stages=tuple(stages),
        files=stages,
        kind_key="model.use_checkpoint" if in_model else "train.use_checkpoint",
    )


def _micro_batch_size(run: Run, processes: int) -> int:
    """Images at once of each process; raises ConfigError, with the nearest numbers that do, where a step has rests."""
    total, micro = run.train.global_batch_size, run.train.micro_batch_size
    if total % processes:
        raise ConfigError(
            f"train.global_batch_size {total} is no multiple of {processes} processes; the nearest numbers that divide "
            f"it are {nearest_that_divide(total, processes)} (--gpus)"
        )
    share = total // processes
    if micro is not None and share % micro:
        raise ConfigError(
            f"train.micro_batch_size {micro} does not divide the {share} images of each of {processes} processes "
            f"(train.global_batch_size {total}); the nearest that do are {nearest_that_divide(share, micro)}"
        )
    return BatchSplit(total, processes, micro or share).micro_batch_size


def _stages(run: Run) -> dict[int, str | None]:
    """The ZeRO stages that the run could have with everything else as it is, each with its `deepspeed.file` then.

    That is the run's own; a shipped one of another stage is replaced by that stage's (ZeRO 0 has none).
    """
    own = run.deepspeed
    found: dict[int, str | None] = {}
    shipped = own.file in SHIPPED_FILES[1:] and find_config(own.file, DEEPSPEED_FILES) == DEEPSPEED_FILES / own.file
    for stage in STAGES:
        files = [own.file, SHIPPED_FILES[stage]] if shipped else [own.file]
        fitting = [file for file in files if _allows(run, deepspeed={"zero_stage": stage, "file": file})]
        if stage == own.zero_stage:
            found[stage] = own.file
        elif fitting:
            found[stage] = fitting[0]
    return found


def _kinds(run: Run, own: bool | int | str) -> list[bool | int | str]:
    """Values of `use_checkpoint` that the run could have, from the least that is computed again to the most."""
    usual: list[bool | int | str] = [False, "pointwise", 2, True]
    if isinstance(run, VavaeRun):
        usual.remove(2)
    allowed = [kind for kind in usual if kind == own or _allows(run, use_checkpoint=kind)]
    if own not in allowed:  # every k-th block, before all
        allowed.insert(len(allowed) - 1, own)
    return allowed


def _allows(run: Run, *, deepspeed: dict | None = None, use_checkpoint: bool | int | str | None = None) -> bool:
    """Whether the run's own checks pass with these keys of `deepspeed`, or with that."""
    document = run.model_dump()
    document["deepspeed"] |= deepspeed or {}
    if use_checkpoint is not None:
        document["train"]["use_checkpoint"] = use_checkpoint
        document["model"].pop("use_checkpoint", None)
    try:
        changed = type(run).model_validate(document)
        engine_options(changed.train, changed.deepspeed)
    except ValueError:
        return False
    return True


def _backends_missing(run: Run) -> list[str]:
    """Backends that the run names for single ops and that cannot serve on this machine, with the reasons."""
    named = {} if isinstance(run.kernels, str) else run.kernels
    rows = [(op, backend) for op, backend in named.items() if op != "default" and backend != "auto"]
    reasons = {f"kernels.{op} {backend}": kernels.OPS[op].reasons(backend) for op, backend in rows}
    return [f"{choice} ({'; '.join(why)})" for choice, why in reasons.items() if why]


def _downloads(run: Run) -> tuple[str, ...]:
    """Weights that the run would download."""
    if isinstance(run, LightningDiTRun):
        return ()
    from vavae import foundation, loss  # import timm and lpips: seconds of their own

    features = foundation.to_download(run.features()) if run.loss.use_vf else None
    return tuple(what for what in (features, loss.to_download(run.loss)) if what is not None)
