"""The process with the disk: runs a program once with room, then once for each call, each time in a child."""

import ctypes
import hashlib
import json
import os
import runpy
import shutil
import signal
import sys
import traceback
from pathlib import Path

import torch

import kernels
import launch.extract
import launch.sample
import launch.train
import launch.training.engine
import launch.training.trainer  # noqa: F401 — here and above: once, before the children
from launch.config import load
from launch.training.checkpoint import newest
from lightningdit.model import LightningDiT
from lightningdit.weights import save_published
from tests import toy
from tests.run_rows import rows
from vavae.config import AutoencoderConfig
from vavae.model import AutoencoderKL
from vavae.weights import write_export

#: In the state of a checkpoint: they differ from run to run.
TIMES = ("hours", "gpu_hours", "started")
TIMEOUT = 120  # seconds for one run
OPS = kernels.select("reference")
disk = ctypes.CDLL(None)


def train(inputs: Path, out: Path) -> list[str]:
    toy.write_latents(inputs / "latents")
    train = {"output_dir": str(out), "ckpt_every": 2, "keep_checkpoints": 2, "max_steps": 4, "tensorboard": True}
    run = toy.write_run(inputs / "dit.yaml", toy.LIGHTNINGDIT, data={"data_path": str(inputs / "latents")}, train=train)
    return ["train", "lightningdit", str(run)]


def extract(inputs: Path, out: Path) -> list[str]:
    toy.write_images(inputs / "images")
    torch.manual_seed(0)
    config = AutoencoderConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in toy.VAVAE["model"].items()})
    write_export(inputs / "vae.safetensors", AutoencoderKL(config, OPS).state_dict(), config)
    run = toy.write_run(inputs / "vae.yaml", toy.VAVAE, data={"data_path": str(inputs / "images")})
    return [
        "extract",
        str(run),
        f"ckpt_path={inputs / 'vae.safetensors'}",
        "--output",
        str(out / "set"),
        "--least-psnr",
        "0",
        "--batch-size",
        "4",
    ]


def sample(inputs: Path, out: Path) -> list[str]:
    toy.write_latents(inputs / "latents")
    config = AutoencoderConfig(
        embed_dim=4, z_channels=4, ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, attn_resolutions=(), resolution=16
    )
    settings = {"num_sampling_steps": 3, "fid_num": 8, "per_proc_batch_size": 4, "cfg_scale": 1.0}
    run = toy.write_run(
        inputs / "dit.yaml", toy.LIGHTNINGDIT, data={"data_path": str(inputs / "latents")}, sample=settings
    )
    torch.manual_seed(0)
    write_export(inputs / "vae.safetensors", AutoencoderKL(config, OPS).state_dict(), config)
    network = LightningDiT(load(run, kind="lightningdit")[0].network(), OPS).state_dict()
    save_published(inputs / "dit.pt", network, network)
    return [
        "sample",
        str(run),
        f"ckpt_path={inputs / 'dit.pt'}",
        f"vae.ckpt_path={inputs / 'vae.safetensors'}",
        "--output",
        str(out / "samples"),
    ]


#: What a program is given first, with room, so that there is something to lose.
BEFORE = {"train": ["train.max_steps=2"], "extract": None, "sample": None}


def result(out: Path) -> dict:
    """What counts below `out`: rows of a log without their timing, a state without its times, SHA-256 of the others."""
    found: dict[str, object] = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file() and "tensorboard" not in p.parts):
        if path.name == "metrics.jsonl":
            found[path.name] = rows(path.parent)
        elif path.name == "state.json":
            found[str(path.relative_to(out))] = {
                k: v for k, v in json.loads(path.read_text()).items() if k not in TIMES
            }
        elif path.name == "manifest.json" and "checkpoints" in path.parts:
            newest(path.parents[1]).verify()  # has the hash of the state
        elif not path.name.startswith("."):
            found[str(path.relative_to(out))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def run(command: list[str], log: Path) -> tuple[int, str]:
    """`python -m launch …` in a child → its status (−9: it had not ended in time) and what it said."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            signal.alarm(TIMEOUT)
            sys.argv = ["launch", *command]
            runpy.run_module("launch", run_name="__main__")
            status = 0
        except SystemExit as e:
            status = e.code if isinstance(e.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), log.read_text()


def fault(status: int, said: str, out: Path) -> str:
    """What is wrong with how a program ended on a full disk, or ""."""
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    if status <= 0:
        return f"ended with status {status}"
    if "Traceback" in said or len(errors) != 1:
        return f"{len(errors)} lines of error{', and a traceback' if 'Traceback' in said else ''}"
    return "" if str(out) in errors[0] else "the error names no file"


def main(program: str, directory: Path, every: int) -> None:
    inputs, out, kept, log = (directory / name for name in ("inputs", "out", "kept", "log"))
    inputs.mkdir()
    out.mkdir()
    command = {"train": train, "extract": extract, "sample": sample}[program](inputs, out)
    if BEFORE[program]:
        status, said = run([*command, *BEFORE[program]], log)
        assert status == 0, said
    shutil.copytree(out, kept)
    disk.full_disk(str(out).encode(), ctypes.c_long(0))
    status, said = run(command, log)
    assert status == 0, said
    expected, calls = result(out), disk.full_disk_calls()
    for call in range(1, calls + 1, every):
        shutil.rmtree(out)
        shutil.copytree(kept, out)
        disk.full_disk(str(out).encode(), ctypes.c_long(call))
        status, said = run(command, log)
        wrong = fault(status, said, out)
        disk.full_disk(str(out).encode(), ctypes.c_long(0))
        status_after, said_after = run(command, log)
        if not wrong and (status_after != 0 or result(out) != expected):
            wrong, said = f"something is lost: status {status_after} with room again", said_after
        print(json.dumps({"call": call, "status": status, "said": said[-3000:], "wrong": wrong}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
