"""Breakdown of a step's GPU time by kind of kernel, from the profiler."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

#: Kind → what kernels of it are called; the first that matches counts.
KINDS = {
    "optimizer": re.compile(r"adamw_ema|multi_tensor|FusedAdam|lpnorm|lerp", re.IGNORECASE),
    "attention": re.compile(r"rope_attention|flash|fmha|cudnn_generated_fort_native_sdpa|sdpa", re.IGNORECASE),
    "gemm": re.compile(r"gemm|nvjet|cutlass|xmma|cublas|splitK|_mm_|wgrad", re.IGNORECASE),
    "communication": re.compile(r"nccl", re.IGNORECASE),
}
OTHER = "memory"  # norms, activations, casts, copies: what moves bytes


@dataclass(frozen=True)
class Interval:
    """One kernel or copy on the device: its name, and when it ran in seconds."""

    name: str
    start: float
    end: float


def kind_of(name: str) -> str:
    """The part of a step that a kernel of that name belongs to."""
    return next((kind for kind, pattern in KINDS.items() if pattern.search(name)), OTHER)


def breakdown(intervals: Iterable[Interval], steps: int) -> dict[str, float]:
    """Milliseconds of a step by kind, and "idle": what of the time from first to last no kernel was running in."""
    intervals = sorted(intervals, key=lambda interval: interval.start)
    spent = dict.fromkeys((*KINDS, OTHER, "idle"), 0.0)
    reached = intervals[0].start if intervals else 0.0
    for interval in intervals:
        spent[kind_of(interval.name)] += interval.end - interval.start
        spent["idle"] += max(0.0, interval.start - reached)
        reached = max(reached, interval.end)
    return {kind: seconds * 1e3 / steps for kind, seconds in spent.items()}


def longest(intervals: Iterable[Interval], steps: int, count: int = 12) -> list[dict]:
    """The kernels that take the most time together: name, kind, calls and milliseconds of a step."""
    together: dict[str, list[float]] = {}
    for interval in intervals:
        together.setdefault(interval.name, []).append(interval.end - interval.start)
    ranked = sorted(together.items(), key=lambda item: -sum(item[1]))[:count]
    return [
        {"kernel": name[:120], "kind": kind_of(name), "calls": len(times) / steps, "ms": sum(times) * 1e3 / steps}
        for name, times in ranked
    ]


def where_time_goes(step: Callable[[], object], device: str, steps: int = 3) -> dict:
    """ "breakdown_ms" and "longest" of a step, by the profiler; nothing where `device` is no GPU."""
    if device != "cuda":
        return {}
    found = profiled(step, steps)
    return {"breakdown_ms": breakdown(found, steps), "longest": longest(found, steps)}


def profiled(step: Callable[[], object], steps: int) -> list[Interval]:
    """Kernels and copies on the GPU during so many steps."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    return on_device(profile.events())


def on_device(events: Iterable) -> list[Interval]:
    """Kernels and copies among a profiler's events; without the names of regions, which it lays over their kernels."""
    kept = (
        event
        for event in events
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    )
    spans = ((event.name, event.time_range.start / 1e6, event.time_range.end / 1e6) for event in kept)
    return [Interval(*span) for span in spans if span[2] > span[1]]
