"""Start and steps of processes on a GPU, with stand-ins for what needs one."""

import json

import pytest
import torch
import torch.distributed as dist

import kernels
from launch.training import engine
from launch.training.deepspeed_options import DEEPSPEED_FILES, deepspeed_config
from launch.training.optimizer import AdamWEma


class Refusing:
    """In place of a module: whoever asks for anything of it fails."""

    def __getattr__(self, name: str):
        raise AssertionError(f"asked for {name}")


@pytest.mark.parametrize("launched", [False, True])
def test_a_gpu_joins_nccl_and_no_compiler_is_asked(launched, monkeypatch):
    """DeepSpeed finds out which of its ops could be compiled, with compilers, when its list of them is looked at."""
    asked = {}
    said = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "there", "MASTER_PORT": "29500"}
    for name, value in said.items():
        monkeypatch.setenv(name, value)
        if not launched:
            monkeypatch.delenv(name)
    monkeypatch.setattr(engine, "uses_cuda", lambda: True)
    monkeypatch.setattr(engine.deepspeed, "ops", Refusing())
    monkeypatch.setattr(engine.deepspeed, "init_distributed", lambda **settings: asked.update(settings))
    monkeypatch.setattr(engine, "rendezvous", lambda environment: asked.update(met=environment))
    monkeypatch.setattr(engine.heartbeat, "start", lambda environment, *_: asked.update(watched=environment.rank))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.update(device=device))
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **settings: asked.update(backend=backend))
    monkeypatch.setattr(dist, "new_group", lambda **settings: settings["backend"])
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2 if launched else 1)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    found = engine.start_processes()
    assert found.device == asked["device"] == torch.device("cuda", int(launched))
    assert asked["backend"] == asked["dist_backend"] == "nccl" and asked["dist_init_required"] is False
    assert found.host_group == ("gloo" if launched else None) and ("met" in asked) == launched
    assert ("watched" in asked) == launched
    assert not torch.backends.cudnn.allow_tf32 and torch.backends.cudnn.deterministic


@pytest.mark.parametrize("stage", [1, 2])
def test_one_process_waits_for_no_device(stage, monkeypatch):
    """With the shipped files and on an accelerator with streams, where the host has to ask for order."""
    engine.start_processes()
    accelerator, waits = engine.deepspeed.get_accelerator(), []
    monkeypatch.setattr(accelerator, "resolves_data_dependency", lambda: False)
    monkeypatch.setattr(accelerator, "synchronize", lambda *device: waits.append(device))
    shipped = json.loads((DEEPSPEED_FILES / f"zero{stage}.json").read_text())
    config = deepspeed_config(
        stage=stage, bf16=True, micro_batch_size=2, accumulation=1, world_size=1, overrides=shipped
    )

    def optimizer(parameters, partitioned: bool) -> AdamWEma:
        return AdamWEma(
            parameters,
            kernels.select("reference"),
            lr=1e-2,
            betas=(0.9, 0.95),
            eps=1e-8,
            weight_decay=0.0,
            ema_decay=0.9,
            max_grad_norm=0.0,
            partitioned=partitioned,
        )

    network = engine.Engine(torch.nn.Linear(8, 8), optimizer, config)
    waits.clear()
    for _ in range(2):
        network.backward(network(torch.ones(2, 8).bfloat16()).float().sum())
        network.step()
    assert network.optimizer.read_counters()["applied"] == 2 and not waits
