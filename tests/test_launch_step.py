"""Guards of a training step: no wait for the device, and no copy that is not needed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from kernels.stacked_linear.library_impl import evenly_spaced
from launch.config import load
from launch.training.build import make_trainer
from launch.training.deepspeed_options import deepspeed_config
from launch.training.engine import Engine, compile_mode, start_processes
from launch.training.optimizer import AdamWEma
from launch.training.trainer import Trainer
from lightningdit.config import ModelConfig
from lightningdit.model import LightningDiT
from tests import toy
from tests.host_reads import HostReads
from tests.operator_costs import moved_bytes

ROOT = Path(__file__).parents[1]


COPIED = 16  # bytes of each trained parameter that DeepSpeed reads and writes in a step, on one process in bfloat16
OPS = kernels.select("reference")
NETWORK = ModelConfig(
    input_size=4,
    patch_size=2,
    in_channels=4,
    hidden_size=24,
    num_heads=2,
    depth=3,
    num_classes=3,
    use_swiglu=True,
    use_rope=True,
    use_rmsnorm=True,
)


def engine(stage: int, bf16: bool, **changes) -> Engine:
    """A small network, in this process alone. changes: to DeepSpeed's bf16 section."""

    def optimizer(parameters, partitioned: bool) -> AdamWEma:
        return AdamWEma(
            parameters,
            OPS,
            lr=1e-2,
            betas=(0.9, 0.95),
            eps=1e-8,
            weight_decay=0.1,
            ema_decay=0.9,
            max_grad_norm=0.0,
            partitioned=partitioned,
        )

    start_processes()
    config = deepspeed_config(stage=stage, bf16=bf16, micro_batch_size=2, accumulation=1, world_size=1, overrides={})
    config["bf16"] |= changes
    torch.manual_seed(0)
    return Engine(LightningDiT(NETWORK, OPS), optimizer, config)


@pytest.mark.parametrize(("stage", "bf16"), [(1, False), (1, True), (2, True)])
def test_one_product_can_read_the_modulation_of_all_blocks(stage, bf16):
    """DeepSpeed's flat buffer holds equal layers at equal distances, so that no weight is copied for it."""
    linears = [block.adaLN_modulation[1] for block in engine(stage, bf16).module.blocks]
    assert evenly_spaced([linear.weight for linear in linears]) is not None
    assert evenly_spaced([linear.bias for linear in linears]) is not None


def train(network: Engine, steps: int) -> dict:
    """Its state after so many steps."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x, target = torch.randn(2, 2, 4, 4, 4, generator=generator)
        loss = (network(x, torch.rand(2, generator=generator), torch.tensor([0, 2])) - target).square().mean()
        network.backward(loss)
        network.step()
    return network.full_state(keep=True)


def test_master_weights_of_the_optimizer_are_those_that_deepspeed_would_keep():
    """Bit for bit, with states in float32, and the weights in use are their rounding."""
    own, deepspeeds = engine(1, True), engine(1, True, bf16_master_weights_and_grads=False, bf16_optimizer_states=False)
    (kept,) = own.optimizer.state
    assert kept.dtype == torch.bfloat16 and {t.dtype for t in own.optimizer.state[kept].values()} == {torch.float32}
    state, want = train(own, 4), train(deepspeeds, 4)
    assert not deepspeeds.optimizer.state.keys() & {kept} and state.keys() == want.keys()
    for key, tensors in want.items():
        assert all(torch.equal(state[key][name], tensor) for name, tensor in tensors.items()), key
    weights = state["model"]
    assert any(not torch.equal(t, t.bfloat16().float()) for t in weights.values())
    for network in (own, deepspeeds):
        assert all(torch.equal(p, weights[name].to(p.dtype)) for name, p in network.module.named_parameters())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_master_weights_and_average_start_from_unrounded_weights(stage):
    """In bfloat16 too, in which DeepSpeed rounds them before the optimizer sees them."""
    torch.manual_seed(0)
    weights = {name: p for name, p in LightningDiT(NETWORK, OPS).named_parameters() if p.requires_grad}
    assert any(not torch.equal(p, p.bfloat16().float()) for p in weights.values())
    state = engine(stage, True).full_state(keep=True)
    for name, want in weights.items():
        assert torch.equal(state["model"][name], want) and torch.equal(state["ema"][name], want), name


def test_master_weights_are_written_and_read_unrounded():
    network = engine(2, True)
    state = train(network, 2)
    fresh = engine(2, True)
    fresh.load_states({key: state[key] for key in ("model", "exp_avg", "exp_avg_sq", "ema")})
    again = fresh.full_state(keep=True)
    assert all(torch.equal(again[key][name], t) for key in state for name, t in state[key].items())


@pytest.mark.parametrize(
    ("overrides", "own"),
    [
        ({}, True),
        ({"zero_optimization": {"offload_optimizer": {"device": "none"}}}, True),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, False),
        ({"data_types": {"grad_accum_dtype": "fp32"}}, False),
    ],
)
def test_where_float32_gradients_are_wanted_deepspeed_keeps_master_weights(overrides, own):
    def asked(stage: int, bf16: bool) -> bool:
        config = deepspeed_config(
            stage=stage, bf16=bf16, micro_batch_size=1, accumulation=1, world_size=1, overrides=overrides
        )
        return config["bf16"].get("bf16_master_weights_and_grads", False)

    assert [asked(stage, True) for stage in range(4)] == [False, own, own, False]
    assert not any(asked(stage, False) for stage in range(4))


def toy_trainer(folder: Path, *overrides: str) -> Trainer:
    data = {**toy.LIGHTNINGDIT["data"], "data_path": str(toy.write_latents(folder / "latents"))}
    path = toy.write_run(folder / "run.yaml", toy.LIGHTNINGDIT, data=data, train={"output_dir": str(folder)})
    run, _ = load(path, list(overrides), kind="lightningdit")
    return make_trainer(run, "lightningdit", start_processes())


@pytest.mark.parametrize("deterministic", [True, False])
def test_the_compiler_is_told_the_ops_of_the_run(tmp_path, monkeypatch, capsys, deterministic):
    """It may be they that a backward pass hands its weight gradients to. And whether it may time what sums."""
    told = []
    monkeypatch.setattr("launch.training.engine.compile_module", lambda module, *how: told.append(how))
    choice = "kernels={default: reference, weight_gradients: triton}"
    toy_trainer(
        tmp_path,
        "train.compile=inductor",
        "train.precision=bfloat16",
        choice,
        f"train.deterministic={str(deterministic).lower()}",
    )
    ((mode, ops, timed),) = told
    assert mode == "inductor" and ops.table()["weight_gradients"]["backend"] == "triton" and timed == deterministic
    assert "what is compiled is kept in " in capsys.readouterr().out


def test_what_a_graph_would_read_stays_at_its_addresses(tmp_path, monkeypatch):
    """Weights and the step's random numbers; the numbers themselves are new ones in every step."""
    trainer, seen = toy_trainer(tmp_path, "train.precision=bfloat16", "train.micro_batch_size=4"), []
    step = trainer.task.train_step

    def watched(engines, batch, draws, number, backward):
        seen.append({name: (value.data_ptr(), value.clone()) for name, value in draws.items()})
        return step(engines, batch, draws, number, backward)

    monkeypatch.setattr(trainer.task, "train_step", watched)
    weights = dict(trainer.task.networks["model"].named_parameters())
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in weights.items() if p.requires_grad}
    stream = trainer.stream()
    for _ in range(3):
        trainer.train_step(stream)
    for micro in range(2):
        first, *later = seen[micro::2]
        for draws in later:
            assert {name: address for name, (address, _) in draws.items()} == {k: v[0] for k, v in first.items()}
            assert not torch.equal(draws["noise"][1], first["noise"][1])
            assert not torch.equal(draws["t"][1], first["t"][1])
    assert all(weights[name].data_ptr() == address for name, (address, _) in before.items())
    assert any(not torch.equal(weights[name], value) for name, (_, value) in before.items())


def test_graphs_whose_gradients_the_next_one_would_overwrite_are_refused():
    for stage in (0, 1):
        with pytest.raises(ValueError, match=rf"cuts a step into 2 parts and deepspeed\.zero_stage {stage} "):
            compile_mode("cudagraphs", stage, accumulation=2)
    assert [compile_mode("cudagraphs", *at) for at in ((0, 1), (1, 1), (2, 2))] == ["cudagraphs"] * 3
    assert compile_mode("inductor", 1, accumulation=2) == "inductor"


def test_reads_and_copies_are_seen():
    reads, numbers = HostReads(), torch.ones(3)
    with reads:
        numbers.sum().item()
        if numbers[0] > 0:
            numbers.nonzero()
        numbers * 2
    assert sum(reads.seen.values()) == 3 and all("test_launch_step.py" in key for key in reads.seen)
    a, b, aten = torch.ones(6), torch.ones(6, dtype=torch.bfloat16), torch.ops.aten
    calls = [(aten.copy_.default, a, b), (aten.add_.Tensor, a, b), (aten.cat.default, [a, a])]
    calls.append((aten.view.default, a, [2, 3]))
    assert [moved_bytes(function, args, {}, function(*args)) for function, *args in calls] == [36, 60, 96, 0]


@pytest.mark.parametrize(
    "overrides",
    [
        ("train.precision=bfloat16",),
        ("train.precision=bfloat16", "train.micro_batch_size=4", "train.compile=aot_eager"),
        ("train.precision=bfloat16", "deepspeed.zero_stage=2"),
    ],
    ids=["bfloat16", "accumulated_compiled", "zero2"],
)
def test_what_a_step_reads_on_the_host_and_copies(tmp_path, overrides):
    """Neither this project nor DeepSpeed reads, from the first step on, checkpoints and log lines aside.

    DeepSpeed reads and writes every gradient three times (into a bucket, its owner's part, one flat tensor) and every
    weight once, however many micro-batches a step has: 16 bytes of each trained parameter.
    """
    data = {**toy.LIGHTNINGDIT["data"], "data_path": str(toy.write_latents(tmp_path / "latents"))}
    train = {"output_dir": str(tmp_path), "max_steps": 3}
    config = toy.write_run(tmp_path / "run.yaml", toy.LIGHTNINGDIT, data=data, train=train)
    command = [
        sys.executable,
        "-m",
        "tests.host_reads",
        "lightningdit",
        str(config),
        str(tmp_path / "reads.json"),
        *overrides,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "reads.json").read_text())
    assert found["reads"] == {}
    assert sum(found["copies"].values()) == pytest.approx(COPIED, abs=0.1), found["copies"]
