"""The plan that --dry-run prints: steps, parameters, memory, FLOPs and disk of a run, without running it."""

from collections.abc import Sequence

import torch

import kernels
from launch.config import ConfigError, LightningDiTRun, Run, VavaeRun
from launch.runtime import launcher
from launch.training.checks import check_run
from launch.training.costs import BYTES, lightningdit_costs, setup_of
from launch.training.loader import BatchSplit
from launch.training.memory import GIB, STAGES, NetworkCost, Setup, device_latents_bytes
from launch.training.micro_batches import Costs, Fit, nearest_that_divide
from launch.training.plan import RunPlan
from launch.training.planned_data import device_here, open_data, reading_lines
from launch.training.remarks import remarks, stage_lines
from vavae.decoders.choice import lacking


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
    run: Run, kind: str, processes: int, *, card: float | None = None, processes_note: str | None = None
) -> RunPlan:
    """The figures of a run on so many processes, without making any of it; with `card`, what fits so many bytes.

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
    own = run.network().use_checkpoint if isinstance(run, LightningDiTRun) else train.use_checkpoint
    kinds = [own] if card is None else _kinds(run, own)
    costs, frozen, latents = _vavae_costs(run, kinds) if isinstance(run, VavaeRun) else _lightningdit_costs(run, kinds)
    networks = costs[own]
    reading: tuple[str, ...] = ()
    if isinstance(run, VavaeRun):
        flops = sum(network.flops for network in networks)
        gpus = min(processes, max(torch.cuda.device_count(), 1))
        reading = reading_lines(run, opened.get("data_path"), gpus, flops)
    steps, stage = train.steps(num_images), run.deepspeed.zero_stage
    store_bytes, store_lines = _latents_on_device(run, latents, num_images, processes)
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
        stages_allowed=_stages(run),
        processes_note=processes_note,
        fit=None if card is None else _fit(run, costs, setup, card, own),
        background_save=getattr(train, "background_save", True),
        latents=latents,
        latent_store=store_lines,
        keep_checkpoints=train.keep_checkpoints,
        checkpoints=-(-steps // train.ckpt_every),
        reading=reading,
        absent=tuple(absent),
        downloads=_downloads(run),
        losses=tuple(stage_lines(run, num_images)),
        remarks=tuple(remarks(run, steps, num_images)),
    )


def _fit(run: Run, costs: Costs, setup: Setup, card: float, own: bool | int | str) -> Fit:
    in_model = bool(getattr(run.model, "use_checkpoint", False))
    return Fit(
        costs,
        setup,
        card,
        per_process=run.train.global_batch_size // setup.processes,
        stage=run.deepspeed.zero_stage,
        kind=own,
        stages=_stages(run),
        deepspeed_file=run.deepspeed.file,
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


def _stages(run: Run) -> tuple[int, ...]:
    """The ZeRO stages that the run could have with everything else as it is."""
    return tuple(stage for stage in STAGES if stage == run.deepspeed.zero_stage or _allows(run, zero_stage=stage))


def _kinds(run: Run, own: bool | int | str) -> list[bool | int | str]:
    """Values of `use_checkpoint` that the run could have, from the least that is computed again to the most."""
    usual: list[bool | int | str] = [False, "pointwise", 2, True]
    if isinstance(run, VavaeRun):
        usual.remove(2)
    allowed = [kind for kind in usual if kind == own or _allows(run, use_checkpoint=kind)]
    if own not in allowed:  # every k-th block, before all
        allowed.insert(len(allowed) - 1, own)
    return allowed


def _allows(run: Run, *, zero_stage: int | None = None, use_checkpoint: bool | int | str | None = None) -> bool:
    """Whether the run's own checks pass with that; what DeepSpeed is told of a stage is of its own file."""
    document = run.model_dump()
    if zero_stage is not None:
        document["deepspeed"]["zero_stage"] = zero_stage
    if use_checkpoint is not None:
        document["train"]["use_checkpoint"] = use_checkpoint
        document["model"].pop("use_checkpoint", None)
    try:
        type(run).model_validate(document)
    except ValueError:
        return False
    return True


def _latents_on_device(run: Run, shape: tuple[int, int], num_images: int, processes: int) -> tuple[float, tuple]:
    """Bytes of a process's share of the latents where the run says that they are on the device, and what to say."""
    if not isinstance(run, LightningDiTRun) or run.data.placement == "host":
        return 0.0, ()
    dtype = run.data.latent_dtype
    held = device_latents_bytes(num_images, *shape, width=BYTES[dtype], flip=run.data.latent_flip, processes=processes)
    amount = f"{held / GIB:,.1f} GiB per GPU of latents in {dtype}"
    if run.data.placement == "device":
        return held, (f"data.placement device: {amount}, counted above",)
    return 0.0, (f"data.placement auto: {amount} where they fit beside the above, else they are read from files",)


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


def _lightningdit_costs(run: LightningDiTRun, kinds: Sequence[bool | int | str]) -> tuple[Costs, int, tuple[int, int]]:
    """The network's costs under values of `use_checkpoint`, frozen parameters, and the latents' shape."""
    network = run.network()
    costs = {kind: (cost,) for kind, cost in lightningdit_costs(run, kinds).items()}
    return costs, 0, (network.in_channels, network.input_size)


def _vavae_costs(run: VavaeRun, kinds: Sequence[bool | int | str]) -> tuple[Costs, int, tuple[int, int]]:
    """The same of a tokenizer's two networks."""
    import vavae.cost as vae_cost  # imports timm and lpips: seconds of their own

    width, latents = (
        BYTES[run.train.precision],
        (run.model.embed_dim, run.data.image_size // run.model.downsample_ratio),
    )
    counted = vae_cost.training_costs(run.model, run.features(), run.loss, run.data.image_size, kinds)
    frozen = counted[kinds[0]]["frozen"]

    def cost(kind: bool | int | str) -> tuple[NetworkCost, ...]:
        return tuple(
            NetworkCost(
                name,
                c.parameters,
                c.trainable,
                c.flops + (frozen.flops if name == "autoencoder" else 0),
                c.saved_elements * width,
            )
            for name, c in counted[kind].items()
            if name != "frozen"
        )

    return {kind: cost(kind) for kind in kinds}, frozen.parameters, latents
