"""A scaling plan as tables for people, and as JSON."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from launch.scaling_model.inputs import Inputs
from launch.scaling_model.plan import (
    Step,
    Training,
    Workload,
    largest_loss,
    last_efficient,
    plan_step,
    plan_training,
    weak,
    why_not,
)
from launch.scaling_model.zero import STAGES, exchanges, step_traffic
from launch.text_tables import markdown

Plan = tuple[Step, Training]
GB = 1e9


def plans(inputs: Inputs, gpus: Sequence[int], *, growing: bool = False) -> dict[int, Plan | str]:
    """Number of GPUs → the step and the run, or why it cannot be. growing: the batch with the GPUs."""
    found: dict[int, Plan | str] = {}
    for count in gpus:
        work = weak(inputs.work, inputs.gpu, count) if growing else inputs.work
        reason = why_not(work, count, inputs.network)
        if reason is not None:
            found[count] = reason
            continue
        step = plan_step(work, inputs.gpu, inputs.network, count)
        found[count] = step, plan_training(work, step, inputs.around, inputs.work.global_batch)
    return found


def _of_steps(found: dict[int, Plan | str]) -> str:
    head = ["GPUs", "images per GPU", "compute ms", "optimizer ms", "waiting ms", "images/s", "efficiency"]
    grown = any(not isinstance(plan, str) and plan[1].growth != 1 for plan in found.values())
    head += [*(["images needed"] if grown else []), "hours", "lost", "hours in all"]
    rows = []
    for count, plan in found.items():
        if isinstance(plan, str):
            rows.append([f"{count:,}", *["–"] * (len(head) - 1)])
            continue
        step, run = plan
        images = f"{step.per_gpu}" + (f" = {step.accumulation} × {step.micro_batch}" if step.accumulation > 1 else "")
        times = [f"{seconds * 1e3:,.1f}" for seconds in (step.compute, step.optimizer, step.exposed)]
        speed = [f"{step.images_per_second:,.0f}", f"{step.efficiency:.0%}"]
        speed += [f"{run.growth:.2f} ×"] if grown else []
        rows.append([f"{count:,}", images, *times, *speed, _hours(run.hours), _lost(run.lost), _hours(run.total)])
    reasons = [f"\n{count:,} GPUs: {plan}." for count, plan in found.items() if isinstance(plan, str)]
    return markdown(head, rows, left=0) + "".join(reasons)


def _of_stages(inputs: Inputs, gpus: Sequence[int]) -> str:
    """What one GPU sends in a step under each ZeRO stage."""
    head = ["GPUs", "ZeRO", "GB within a node", "GB across", "GB at least", "sending ms", "waiting ms", "step ms"]
    work, rows = inputs.work, []
    for count in gpus:
        for stage in STAGES:
            if why_not(work, count, inputs.network):
                continue
            step = plan_step(work, inputs.gpu, inputs.network, count, stage)
            fewest = exchanges(stage, step.accumulation, work.weight_bytes, work.gradient_bytes, least=True)
            least = step_traffic(work.parameters, count, inputs.network, fewest).total
            mark = " ←" if stage == work.stage else ""
            volumes = [f"{size / GB:.2f}" for size in (step.intra_bytes, step.inter_bytes, least)]
            times = [f"{seconds * 1e3:,.1f}" for seconds in (step.sending, step.exposed, step.seconds)]
            rows.append([f"{count:,}", f"{stage}{mark}", *volumes, *times])
    return markdown(head, rows, left=0)


def _of_failures(work: Workload, found: dict[int, Plan | str]) -> str:
    head = ["GPUs", "a failure in", "pause", "writing", "save every", "GB/s of that", "lost"]
    head += [f"lost, every {work.ckpt_every:,} steps"]
    rows = []
    for count, plan in found.items():
        if isinstance(plan, str):
            continue
        step, run = plan
        rate = run.checkpoint_bytes / (run.interval * 3600) / GB
        steps = max(1, round(run.interval * 3600 / step.seconds))
        rows.append(
            [
                f"{count:,}",
                f"{run.mean_time:,.0f} h",
                f"{run.pause_seconds:.3f} s",
                f"{run.write_seconds:.1f} s",
                f"{run.interval * 60:.1f} min ({steps:,} steps)",
                f"{rate:.3f}",
                _lost(run.lost),
                _lost(run.lost_as_set),
            ]
        )
    return markdown(head, rows, left=0)


def ending(inputs: Inputs, least: float) -> str:
    """Where a step of the file's batch is still worth its GPUs."""
    last = last_efficient(inputs.work, inputs.gpu, inputs.network, least)
    if last is None:
        return f"No number of GPUs reaches an efficiency of {least:.0%}."
    text = f"At a global batch of {last.global_batch:,} the most GPUs with an efficiency of at least {least:.0%} are "
    text += f"{last.gpus:,}: {last.per_gpu} images for each, {last.images_per_second:,.0f} images/s. "
    return text + f"Of that step the most is lost to {largest_loss(last, inputs.gpu)}."


def _finite(figures: dict[str, float]) -> dict[str, float | None]:
    """JSON has no infinity, which a run that failures let come to no end takes and loses."""
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def _lost(share: float) -> str:
    return f"{share:.2%}" if math.isfinite(share) else "all"


def _hours(hours: float) -> str:
    return f"{hours:.3g}" if math.isfinite(hours) else "no end"


def as_text(inputs: Inputs, gpus: Sequence[int], least: float) -> str:
    """All tables. They are computed; what they are computed from stands first."""
    fixed, growing = plans(inputs, gpus), plans(inputs, gpus, growing=True)
    stated = markdown(["input", "value", "source"], [[name, *said] for name, said in inputs.stated.items()], left=3)
    size = 16 * inputs.work.parameters / GB
    return "\n\n".join(
        [
            f"Scaling of {inputs.title}: computed, not measured, from these inputs:",
            stated,
            f"Strong scaling, computed: a global batch of {inputs.work.global_batch:,} shared by more GPUs.",
            _of_steps(fixed),
            ending(inputs, least),
            f"Weak scaling, computed: {inputs.gpu.micro_batch} images for each GPU, so a larger batch"
            + ("; more images are needed then." if inputs.around.critical_batch else ", as many images in all."),
            _of_steps(growing),
            "Sent by one GPU in a step, computed, by ZeRO stage (strong scaling). At least: as the paper of ZeRO "
            "counts. What stage 3 waits is a lower bound, with weights always gathered in time.",
            _of_stages(inputs, gpus),
            f"Checkpoints of {size:.1f} GB and failures, computed (strong scaling).",
            _of_failures(inputs.work, fixed),
        ]
    )


def as_json(inputs: Inputs, gpus: Sequence[int], least: float) -> dict[str, Any]:
    """Everything with its inputs; seconds, hours, bytes and bytes/s unless a name says otherwise. Infinite is None."""

    def plain(found: dict[int, Plan | str]) -> list[dict[str, Any]]:
        return [
            {"gpus": count, "impossible": plan}
            if isinstance(plan, str)
            else asdict(plan[0])
            | {"seconds": plan[0].seconds, "images_per_second": plan[0].images_per_second}
            | {"training": _finite(asdict(plan[1]) | {"total": plan[1].total})}
            for count, plan in found.items()
        ]

    possible = [count for count in gpus if not why_not(inputs.work, count, inputs.network)]
    stages = [
        asdict(plan_step(inputs.work, inputs.gpu, inputs.network, count, stage)) | {"stage": stage}
        for count in possible
        for stage in STAGES
    ]
    last = last_efficient(inputs.work, inputs.gpu, inputs.network, least)
    return {
        "computed": True,
        "inputs": {name: {"value": value, "source": source} for name, (value, source) in inputs.stated.items()},
        "work": asdict(inputs.work),
        "gpu": asdict(inputs.gpu),
        "network": asdict(inputs.network),
        "surroundings": asdict(inputs.around),
        "strong": plain(plans(inputs, gpus)),
        "weak": plain(plans(inputs, gpus, growing=True)),
        "stages": stages,
        "last_efficient": None if last is None else asdict(last) | {"least": least},
    }
