"""Small directories of runs for the page of `gallery`: a log, checkpoints, pictures, samples, results, and damage."""

import json
import math
from pathlib import Path

import numpy as np
from PIL import Image

from common.files import write_json
from launch.config import load
from launch.config_files import merge
from tests.test_launch_run_directory import save

#: Text of a run that a page must show as it is: the names of its classes, a key of its file.
SCRIPT = "<script>document.title = 'taken'</script>"
CLASSES = ["zero", f"one {SCRIPT}", "two & <b>more</b>"]
STARTED = 1_800_000_000.0


def a_run(path: Path, *, rows: int = 60, lr: float = 2e-3, scale: float = 1.0) -> Path:
    """A LightningDiT's run: a falling loss, validation, a resume and a rollback, one checkpoint, three previews."""
    write_log(path / "metrics.jsonl", rows, scale)
    run, _ = load("digits.yaml", [f"optimizer.lr={lr}"], kind="lightningdit")
    config = merge(run.model_dump(mode="json"), {"train": {"exp_name": f"name {SCRIPT}"}})
    ops = {"swiglu": {"backend": "triton", "reason": "first choice"}, "vf_loss": {"backend": "reference", "reason": ""}}
    save(path / "checkpoints", rows * 10, config=config, ops=ops, versions={"torch": "2.11.0"}, started=STARTED)
    for i, step in enumerate((100, 300, 600)):
        write_picture(path / "previews" / f"step_{step:07d}.png", (80 * i, 40, 200 - 60 * i))
    return path


def write_log(path: Path, rows: int, scale: float) -> None:
    lines = []
    for i in range(1, rows + 1):
        loss = scale * (1 + 2 / math.sqrt(i)) + 0.01 * math.sin(37.0 * i)
        rate = {"images_per_second": 100.0 + i % 7, "seconds_per_step": 0.08, "mfu": 0.4, "data_wait": 0.01}
        times = {"hours": i / 100, "wall_hours": i / 90}
        position = {"step": 10 * i, "last_step": 10 * rows, "epoch": i / 10, "images": 80 * i, "global_batch_size": 8}
        lines.append({**position, "loss": loss + 1, "mse": loss, "grad_norm": 1 / i, "lr": 1e-3, **rate, **times})
    lines.insert(rows // 2, {"step": 5 * rows, "valid_ema/mse": 1.5 * scale, "valid/mse": 1.6 * scale})
    time = "2027-01-15T09:00:00+0000"
    lines.insert(rows // 2, {"step": 5 * rows, "event": "saved", "bytes": 7, "time": time})
    lines.insert(rows // 3, {"step": 100, "event": "resumed", "checkpoint": f"of {SCRIPT}", "time": time})
    lines.append({"step": 10 * rows - 50, "event": "rollback", "first": 1, "time": time})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_picture(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (120, 60)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def write_samples(folder: Path, step: int, *, count: int = 60, size: int = 16) -> Path:
    """A set as `sample` writes it: image i is of class i modulo 3, and all of the colour (step, i, class)."""
    labels = np.arange(count) % 3
    colours = np.stack([np.full(count, step % 256), np.arange(count), 80 * labels], 1).astype(np.uint8)
    images = np.broadcast_to(colours[:, None, None], (count, size, size, 3))
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "samples.npz", arr_0=np.ascontiguousarray(images), arr_1=labels)
    facts = {"num_samples": count, "solver": "ODE euler, 30 points", "guidance": "scale 2", "step": step}
    hashes = {"model": "a1b2" * 16, "tokenizer": "c3d4" * 16}
    write_json(folder / "samples.json", {**facts, "weights": "ema", "hashes": hashes, "classes": CLASSES})
    return folder


def write_result(path: Path, **metrics: float) -> Path:
    facts = {"samples": 50_000, "samples_sha256": "e5f6" * 16, "solver": "ODE dopri5", "guidance": "scale 4.5"}
    reference = {"path": "imagenet.npz", "images": 10_000, "sha256": "9a8b" * 16}
    path.parent.mkdir(parents=True, exist_ok=True)
    more = {"features": "inception", "reference": reference, "hashes": {"model": "a1b2" * 16}}
    write_json(path, {"metrics": metrics, **facts, **more, "skipped": {"sfid": "no spatial"}, "notes": ["few <i>"]})
    return path


def whole_directory(path: Path) -> Path:
    """Two runs, two sets of samples, two results and another picture."""
    a_run(path / "first")
    a_run(path / "second", lr=1e-3, scale=0.8)
    write_result(write_samples(path / "samples", 300) / "evaluation.json", fid=12.345, precision=0.71)
    write_samples(path / "samples_later", 600)
    write_result(path / "rfid.json", rfid=0.51)
    write_picture(path / "reconstructions.png", (200, 200, 0))
    return path
