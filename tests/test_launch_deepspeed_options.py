"""Options of DeepSpeed that a run may set: the names, what is refused, and real steps with everything else."""

import gc
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import NoneType, SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels
from launch.__main__ import main
from launch.config import ConfigError, load
from launch.config_files import merge
from launch.train import run_training
from launch.training import checkpoint
from launch.training.build import make_trainer
from launch.training.checks import check_run
from launch.training.deepspeed_options import (
    DeepSpeedConfig,
    DeepSpeedOptions,
    Options,
    deepspeed_config,
)
from launch.training.engine import Engine, start_processes
from launch.training.optimizer import STATE_KEYS, AdamWEma
from tests import toy
from tests.children import call

STAGES = (0, 1, 2, 3)
STEPS, MICRO_BATCHES = 3, 4


def zero(**keys) -> dict:
    return {"zero_optimization": keys}


#: Options that are tried together, by what they are called here. Results are those without them, to the last bit …
EXACT = {
    "offloaded_optimizer": zero(offload_optimizer={"device": "cpu"}),
    "offloaded_unpinned": zero(offload_optimizer={"device": "cpu", "pin_memory": False}),
    "offloaded_weights": zero(offload_param={"device": "cpu", "pin_memory": False}),
    "offloaded_both": zero(offload_param={"device": "cpu"}, offload_optimizer={"device": "cpu"}),
    "overlapped": zero(overlap_comm=True),
    "not_overlapped": zero(overlap_comm=False),
    "not_contiguous": zero(contiguous_gradients=False),
    "reduced_in_parts": zero(reduce_bucket_size=100),
    "gathered_in_parts": zero(allgather_bucket_size=100),
    "scattered": zero(reduce_scatter=True),
    "scattered_one_by_one": zero(reduce_scatter=True, use_multi_rank_bucket_allreduce=False),
    "small_pieces": zero(
        stage3_prefetch_bucket_size=100,
        stage3_param_persistence_threshold=10,
        stage3_model_persistence_threshold=100,
        stage3_max_live_parameters=500,
        stage3_max_reuse_distance=100,
    ),
    "whole_modules": zero(stage3_module_granularity_threshold=1000),
    "fetched_by_all_reduce": zero(stage3_use_all_reduce_for_fetch_params=True),
    "gathered_one_by_one": zero(stage3_allgather_sequential=True),
    "torchs_linear": zero(memory_efficient_linear=False),
    "profiled": {
        "flops_profiler": {
            "enabled": True,
            "profile_step": 2,
            "module_depth": 1,
            "top_modules": 2,
            "detailed": False,
            "recompute_fwd_factor": 1.0,
            "output_file": "/dev/null",
        }
    },
    "timed": {"wall_clock_breakdown": True},
    "weighed": {"memory_breakdown": True},
}
#: … or to rounding in the order of a sum, or to a gradient's in bfloat16.
ROUNDED = {
    "aligned": (zero(parameter_alignment=True), 1e-6),
    "summed_in_float32": ({"data_types": {"grad_accum_dtype": "fp32"}}, 1e-2),
    "sent_in_bfloat16": ({"communication_data_type": "bf16"}, 1e-2),
    "sent_in_float32": ({"communication_data_type": "fp32"}, 1e-2),
}
TRIED = {name: (options, 0.0) for name, options in EXACT.items()} | ROUNDED


def allowed(stage: int, options: dict, precision: str) -> bool:
    try:
        DeepSpeedConfig(zero_stage=stage, overrides=options).merged_overrides(precision)
    except ConfigError as e:
        assert "means nothing under ZeRO" in str(e) or "sums gradients in bfloat16 only" in str(e)
        return False
    return True


def cases() -> Iterator[tuple[str, int, str]]:
    """What is tried, under which stages and in which precisions."""
    for name, (options, _) in TRIED.items():
        for stage in STAGES:
            for precision in ("float32", "bfloat16"):
                if allowed(stage, options, precision):
                    yield name, stage, precision


def trained(stage: int, precision: str, options: dict, micro_batches: int = MICRO_BATCHES) -> tuple[list[float], dict]:
    """Gradient norms of a small network's steps, and its state after them."""

    def optimizer(parameters, partitioned: bool) -> AdamWEma:
        return AdamWEma(
            parameters,
            kernels.select("reference"),
            lr=1e-2,
            betas=(0.9, 0.95),
            eps=1e-8,
            weight_decay=0.1,
            ema_decay=0.9,
            max_grad_norm=0.5,
            partitioned=partitioned,
        )

    processes = start_processes()
    rank, together = processes.rank, processes.world_size
    config = deepspeed_config(
        stage=stage,
        bf16=precision == "bfloat16",
        micro_batch_size=2,
        accumulation=micro_batches,
        world_size=together,
        overrides=DeepSpeedConfig(zero_stage=stage, overrides=options).merged_overrides(precision),
    )
    torch.manual_seed(0)
    layers = [torch.nn.Linear(16, 24), torch.nn.SiLU(), torch.nn.Linear(24, 17), torch.nn.SiLU()]
    engine = Engine(torch.nn.Sequential(*layers, torch.nn.Linear(17, 5)), optimizer, config)
    generator, norms = torch.Generator().manual_seed(1), []
    for _ in range(STEPS):
        for _ in range(micro_batches):
            x = torch.randn(2 * together, 16, generator=generator)[2 * rank : 2 * rank + 2]
            engine.backward(engine(x.to(getattr(torch, precision))).float().square().mean())
            engine.step()
        norms.append(engine.optimizer.grad_norm.item())
    assert engine.optimizer.read_counters()["applied"] == STEPS
    state = engine.full_state(keep=True)
    engine.close()
    return norms, state


@cache
def plain(stage: int, precision: str) -> tuple[list[float], dict]:
    return trained(stage, precision, {})


def difference(name: str, stage: int, precision: str) -> float:
    """How far norms (relatively) and states are from those without the options."""
    want_norms, want = plain(stage, precision)
    gc.freeze()  # "memory_breakdown" collects garbage many times in a step
    norms, state = trained(stage, precision, TRIED[name][0])
    gc.unfreeze()
    assert state.keys() == want.keys() == {"model", *STATE_KEYS}
    apart = [abs(a - b) / b for a, b in zip(norms, want_norms, strict=True)]
    return max(apart + [float((state[key][n] - t).abs().max()) for key in want for n, t in want[key].items()])


@pytest.mark.parametrize("name", TRIED)
def test_an_option_changes_no_number(name):
    """Under every stage and in every precision in which it has an effect; one process."""
    found = {(stage, precision): difference(name, stage, precision) for n, stage, precision in cases() if n == name}
    assert found and max(found.values()) <= TRIED[name][1], found


def test_an_option_changes_no_number_on_two_processes(tmp_path):
    assert call(compare_all, tmp_path / "found.json", world_size=2) == [0, 0]
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) == len(list(cases()))
    assert not [case for case in found if case[-1] > TRIED[case[0]][1]]


def compare_all(path: Path) -> None:
    found = [(*case, difference(*case)) for case in cases()]
    if start_processes().is_main:
        path.write_text(json.dumps(found))


def leaves(section: type[Options], at: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        kinds = {*getattr(field.annotation, "__args__", (field.annotation,))} - {NoneType}
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Options)]
        yield from leaves(inner[0], f"{at}{name}.") if inner else (f"{at}{name}",)


def said(options: dict, at: str = "") -> Iterator[str]:
    for name, value in options.items():
        yield from said(value, f"{at}{name}.") if isinstance(value, dict) else (f"{at}{name}",)


def test_every_key_that_may_be_set_is_tried():
    tried = {key for options, _ in TRIED.values() for key in said(options)}
    assert set(leaves(DeepSpeedOptions)) == tried | {"zero_optimization.stage"}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_sums_in_float32_are_nearer_to_those_of_a_float32_run(stage):
    (want, *_), _ = trained(stage, "float32", {}, micro_batches=8)
    (rounded, *_), _ = trained(stage, "bfloat16", {}, micro_batches=8)
    (summed, *_), _ = trained(stage, "bfloat16", TRIED["summed_in_float32"][0], micro_batches=8)
    assert abs(summed - want) < abs(rounded - want) / 5


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("data")
    latents, images = toy.write_latents(directory / "latents"), toy.write_images(directory / "images")
    return {"lightningdit": latents, "vavae": images}


def run_file(tmp_path: Path, data: dict[str, Path], kind: str) -> Path:
    content = toy.LIGHTNINGDIT if kind == "lightningdit" else toy.VAVAE
    train = {"output_dir": str(tmp_path), "log_every": 10}
    return toy.write_run(tmp_path / f"{kind}.yaml", content, data={"data_path": str(data[kind])}, train=train)


def test_a_dry_run_refuses_them_too(tmp_path, data, capsys):
    path = str(run_file(tmp_path, data, "lightningdit"))
    for options in ("{zero_optimisation: {overlap_comm: true}}", "{zero_optimization: {sub_group_size: 5}}"):
        for more in ([], ["--dry-run"]):
            assert main(["train", "lightningdit", path, f"deepspeed.overrides={options}", *more]) == 2
            assert "error:" in (text := capsys.readouterr().err) and "Traceback" not in text


@pytest.mark.parametrize(
    ("kind", "stage", "options"),
    [
        ("lightningdit", 1, EXACT["offloaded_optimizer"]),
        ("lightningdit", 3, EXACT["offloaded_both"]),
        ("vavae", 2, EXACT["offloaded_optimizer"]),
        ("lightningdit", 1, EXACT["profiled"]),
        ("vavae without a GAN", 2, merge(EXACT["profiled"], EXACT["timed"])),
    ],
)
def test_a_run_trains_and_resumes_with_them_as_without(tmp_path, data, kind, stage, options):
    kind, *without_gan = kind.split(" ", 1)
    path, flops = run_file(tmp_path, data, kind), tmp_path / "flops.txt"
    if profiled := "flops_profiler" in options:
        options = merge(options, {"flops_profiler": {"output_file": str(flops)}})
    for name, last, overrides in (("without", 4, {}), ("with", 3, options), ("with", 4, options)):
        changes = [
            f"train.exp_name={name}",
            f"train.max_steps={last}",
            f"deepspeed.zero_stage={stage}",
            "train.precision=bfloat16",
            f"deepspeed.overrides={json.dumps(overrides)}",
        ]
        changes += ["loss.disc_weight=0"] if without_gan else []
        run_training(load(path, changes, kind=kind)[0], kind)
    one, other = (checkpoint.newest(tmp_path / name / "checkpoints") for name in ("without", "with"))
    for network in one.state["counters"]:
        for key in checkpoint.KEYS:
            want, got = one.tensors(network, key), other.tensors(network, key)
            assert want.keys() == got.keys() and all(torch.equal(got[n], t) for n, t in want.items()), key
    assert not profiled or "Flops Profiler" in flops.read_text()


@pytest.mark.parametrize("options", [{"flops_profiler": {"enabled": True}}, {"wall_clock_breakdown": True}])
def test_deepspeeds_clock_is_refused_with_a_gan(tmp_path, data, capsys, options):
    """The discriminator passes twice before it goes back, and that clock knows one pass."""
    command = ["train", "vavae", str(run_file(tmp_path, data, "vavae")), f"deepspeed.overrides={json.dumps(options)}"]
    for more in ([], ["--dry-run"]):
        assert main([*command, *more]) == 2
        assert f"deepspeed: {next(iter(options))} " in capsys.readouterr().err
    assert main([*command, "loss.disc_weight=0", "--dry-run"]) == 0


def test_what_is_profiled_is_not_compiled(tmp_path, data, monkeypatch):
    """The profiler looks into modules: "auto" leaves them, and what compiles them is refused."""
    told, path, processes = [], run_file(tmp_path, data, "lightningdit"), start_processes()
    monkeypatch.setattr("launch.training.engine.uses_cuda", lambda: True)
    monkeypatch.setattr(
        "launch.training.trainer.Engine", lambda network, optimizer, config, mode, *_: told.append(mode)
    )
    profiled = f"deepspeed.overrides={json.dumps({'flops_profiler': {'enabled': True}})}"
    for changes in ([], [profiled]):
        with pytest.raises(AttributeError):  # there is no engine
            make_trainer(load(path, changes, kind="lightningdit")[0], "lightningdit", processes)
    assert told == ["inductor", "none"]
    for mode in ("aot_eager", "inductor"):
        with pytest.raises(ConfigError, match=f"flops_profiler looks into modules, and train.compile {mode} leaves"):
            check_run(load(path, [profiled, f"train.compile={mode}"], kind="lightningdit")[0])


def test_what_is_offloaded_from_a_gpu_is_updated_in_host_memory():
    """By the op's definition; partitions lie there, norm and counters on the GPU, and mixing them is an error."""

    def of_the_gpu(*args, **kwargs):
        raise AssertionError("no kernel of the GPU reads what lies in host memory")

    with FakeTensorMode():
        weights = torch.nn.Parameter(torch.zeros(6, device="cuda"))
        optimizer = AdamWEma(
            [weights],
            SimpleNamespace(adamw_ema_=of_the_gpu),
            lr=1e-2,
            betas=(0.9, 0.95),
            eps=1e-8,
            weight_decay=0.1,
            ema_decay=0.9,
            max_grad_norm=0.5,
            partitioned=True,
        )
        partition = torch.nn.Parameter(torch.zeros(6))
        optimizer.param_groups[0]["params"] = [partition]
        optimizer.init_states()
        optimizer.check_loss(torch.zeros((), device="cuda"))
        partition.grad = torch.zeros(6)
        optimizer.step()
    assert {value.device.type for value in optimizer.state[partition].values()} == {"cpu"}
    assert {value.device.type for value in (optimizer.grad_norm, *optimizer.counters.values())} == {"cuda"}
