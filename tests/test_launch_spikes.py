"""Loss spikes, figures by block and their warnings, against float64, numpy and other ways to the same numbers."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import kernels
from launch.config import ConfigError, load
from launch.training.block_norms import BlockNorms, block_of
from launch.training.build import make_trainer
from launch.training.config import MEASURED, TrainConfig
from launch.training.engine import start_processes
from launch.training.figures import Figures
from launch.training.loader import SampleOrder
from launch.training.log import describe
from launch.training.spikes import Spikes, StepLosses
from launch.training.trainer import Trainer
from launch.training.watch import Watch
from lightningdit.watch import LOGITS, largest_logit
from tests import toy
from tests.children import call
from tests.host_reads import HostReads

HEAD = {"step": 1, "last_step": 9, "epoch": 0.1, "images": 8, "global_batch_size": 8, "eta_seconds": 1.0}


def spikes(lasting: int | None = 3, **changes) -> Spikes:
    return Spikes(**{"factor": 7.0, "window": 16, "lasting": lasting, "objective": lambda step: 0} | changes)


def losses(count: int) -> list[float]:
    return (2 + 0.1 * np.random.default_rng(0).standard_normal(count)).tolist()


def test_a_spike_is_seven_robust_deviations_above_the_median():
    watch, values = spikes(), losses(40)
    for step, loss in enumerate(values, 1):
        watch.add(step, loss)
    window = np.array(values[-16:])
    deviation = np.median(np.abs(window - np.median(window))) / 0.6744897501960817  # the normal's third quartile
    assert watch.threshold() == pytest.approx(np.median(window) + 7 * deviation, rel=1e-4)
    assert watch.figures() == {"loss_spikes": 0, "loss_median": np.median(window)}
    edge = watch.threshold()
    watch.add(41, edge)
    watch.add(42, 1.1 * edge)
    assert watch.figures()["loss_spikes"] == 1 and watch.figures()["loss_spikes"] == 0


def test_losses_that_are_all_but_equal_have_a_least_deviation_and_few_no_spike():
    watch = spikes()
    for step in range(1, 4):
        watch.add(step, 2.0)
    assert watch.threshold() == math.inf
    watch.add(4, 2.0)
    assert watch.threshold() == pytest.approx(2.0 * 1.07)


def test_a_spike_lasts_over_skipped_steps_and_a_restart_until_a_loss_is_none():
    watch = spikes()
    for step, loss in enumerate(losses(16), 1):
        watch.add(step, loss)
    watch.add(17, 9.0)
    watch.add(18, math.nan)
    again = spikes()
    again.load_state_dict(watch.state_dict())
    for each in (watch, again):
        each.add(19, 9.0)
        assert each.found is None
        each.add(20, 9.0)
        assert each.found == (17, 20)
        each.add(21, 9.0)
        assert each.found == (17, 21)
        each.found = None
        for step, loss in ((22, 2.0), (23, 9.0), (24, 9.0)):
            each.add(step, loss)
        assert each.found is None and each.first == 23 and each.count == 6
    never = spikes(None)
    never.load_state_dict(watch.state_dict())
    never.add(25, 9.0)
    assert never.found is None and never.in_a_row == 3


def test_losses_of_another_objective_are_not_compared():
    watch = spikes(objective=lambda step: step >= 17)
    for step, loss in enumerate(losses(16), 1):
        watch.add(step, loss)
    watch.add(17, 9.0)
    assert watch.count == 0 and watch.median() == 9.0


def test_step_losses_stay_on_the_device_until_they_are_read():
    kept, reads = StepLosses(10, 4, 2, torch.device("cpu")), HostReads()
    with reads:
        for step in range(11, 17):
            kept.start(step)
            for part in (0, 1):
                kept.add(step, torch.tensor(float(step + part)))
    assert not reads.seen
    assert kept.read(16) == [(13, 13.5), (14, 14.5), (15, 15.5), (16, 16.5)] and kept.read(16) == []


def test_a_lasting_spike_may_not_be_most_of_what_its_median_is_of():
    with pytest.raises(ValueError, match="spike_steps 5 is more than a quarter of spike_window 16"):
        TrainConfig(spike_window=16, spike_steps=5)
    assert TrainConfig(spike_window=16, spike_steps=4).spike_steps == 4


def test_steps_that_are_drawn_anew_take_their_places_from_another_seed():
    order, plain = SampleOrder(20, 8, 0, [(2, 4, 1), (4, 5, 2)]), [SampleOrder(20, 8, seed) for seed in range(3)]
    for step, seed in ((1, 0), (2, 1), (3, 1), (4, 2), (5, 2), (6, 0), (2, 1)):
        assert order.seed_of(step) == seed
        assert all(map(torch.equal, order.slice(step, 0, 8), plain[seed].slice(step, 0, 8)))


def toy_trainer(folder, kind: str = "lightningdit", *overrides: str) -> Trainer:
    content, write = (toy.LIGHTNINGDIT, toy.write_latents) if kind == "lightningdit" else (toy.VAVAE, toy.write_images)
    data = {"data_path": str(write(folder / "data"))}
    path = toy.write_run(folder / "run.yaml", content, data=data, train={"output_dir": str(folder)})
    run, _ = load(path, list(overrides), kind=kind)
    return make_trainer(run, kind, start_processes())


# Figures by block


def test_the_block_of_a_parameter():
    names = {
        "blocks.3.attn.qkv.weight": "blocks.3",
        "t_embedder.mlp.0.bias": "t_embedder.mlp.0",
        "encoder.conv_in.weight": "encoder.conv_in",
        "encoder.down.1.block.0.conv1.weight": "encoder.down.1",
        "weight": "weight",
    }
    assert {name: block_of(name) for name in names} == names


def test_norms_of_parts_of_flat_gradients():
    flat, other = torch.arange(10.0), torch.full((3,), torch.nan)
    norms = BlockNorms(
        {"a.0.w": [(0, 1, 3)], "a.0.b": [(0, 4, 1)], "b.w": [(0, 6, 2)], "c.w": [], "d.w": [(1, 0, 3)]}, True
    )
    assert norms.names == ["a.0", "b", "c", "d"]
    found = norms.measure([flat, other], torch.device("cpu"))
    assert found[:3].tolist() == pytest.approx([30**0.5, 85**0.5, 0.0]) and found[3].isnan()
    assert norms.measure([flat, None], torch.device("cpu"))[3] == 0


class Wild:
    """A task whose figures are these, whatever is measured."""

    def __init__(self, *values: float):
        self.values = values

    def measure(self, names, networks, batch, draws):
        return {f"activation_norm_max/blocks.{i}": torch.tensor(value) for i, value in enumerate(self.values)}


def test_a_figure_that_is_not_finite_is_none_in_its_row():
    figures = Figures(Wild(torch.inf, -torch.inf, torch.nan, 3e38, 2.0), {}, ("activation_norms",), averaged=False)
    figures.keep({}, {})
    assert [*figures.read().values()] == [None, None, None, pytest.approx(3e38), 2.0]


def part_of_a_run(trainer: Trainer) -> dict:
    """Figures and losses after two steps and a third of a loss of 1, but 100 for the last micro-batch of all."""
    stream, kept, keep = trainer.stream(), [], trainer._figures.keep
    trainer._figures.keep = lambda *of: (kept.append(of), keep(*of))
    for _ in range(2):
        trainer.train_step(stream)
    found, task = trainer._figures.read(), trainer.task
    measured = [task.measure(MEASURED, trainer.engines, *of) for of in kept[-trainer.split.accumulation :]]
    here = trainer.processes.rank * trainer.split.accumulation
    losses = [100.0 if here + micro == 1 else 1.0 for micro in range(trainer.split.accumulation)]
    trainer.incidents.begin_step(3)
    for loss in losses:
        trainer.incidents.add_loss(3, "model", torch.tensor(loss))
    found |= {f"loss {step}": loss for step, loss in trainer.incidents._losses.read(3)}
    return {"figures": found, "measured": [{key: value.item() for key, value in of.items()} for of in measured]}


RUN = ("train.micro_batch_size=4", f"train.watch=[grad_norms, {', '.join(MEASURED)}]", "train.log_every=2")


def write_part_of_a_run(folder: str, *overrides: str) -> None:
    processes = start_processes()
    trainer = toy_trainer(Path(folder) / str(processes.rank), "lightningdit", *RUN, *overrides)
    (Path(folder) / f"{processes.rank}.json").write_text(json.dumps(part_of_a_run(trainer)), encoding="utf-8")


def test_two_processes_have_the_figures_and_losses_of_one(tmp_path):
    """Each has half of the samples, and under ZeRO 2 half of gradients and average."""
    alone = part_of_a_run(toy_trainer(tmp_path / "alone", "lightningdit", *RUN, "deepspeed.zero_stage=2"))
    first, second = alone["measured"]
    assert all(first[key] != second[key] for key in first)
    want = alone["figures"] | {f"watch/{key}": max(first[key], second[key]) for key in first}
    assert call(write_part_of_a_run, str(tmp_path), "deepspeed.zero_stage=2", world_size=2) == [0, 0]
    found = [json.loads((tmp_path / f"{rank}.json").read_text("utf-8")) for rank in range(2)]
    blocks = want.pop("zero_gradient_blocks")
    assert [of["figures"].pop("zero_gradient_blocks") for of in found] == [blocks, blocks]
    assert found[0]["figures"] == found[1]["figures"] == pytest.approx(want, rel=1e-4)
    assert want["loss 3"] == 50.5 and want["ema_drift"] > 0 and want["watch/grad_norm/blocks.1"] > 0


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "float32"), (0, "bfloat16"), (1, "bfloat16"), (2, "float32"), (3, "float32")]
)
def test_figures_of_a_row(tmp_path, stage, precision):
    """Gradient norms against those of the backward passes, the average's drift against the whole states."""
    changes = (f"deepspeed.zero_stage={stage}", f"train.precision={precision}", "train.watch=[grad_norms]")
    trainer = toy_trainer(tmp_path, "lightningdit", *changes, "train.micro_batch_size=4", "train.log_every=2")
    network, sums = trainer.task.networks["model"], {}

    def add(name: str, grad: torch.Tensor) -> None:
        sums[name] = sums.get(name, 0.0) + grad.double()

    stream = trainer.stream()
    trainer.train_step(stream)
    assert not any(key.startswith("watch/") for key in trainer._figures.read())  # no row is due
    for name, p in network.named_parameters():
        if p.requires_grad:
            p.register_hook(lambda grad, name=name: add(name, grad))
    trainer.train_step(stream)
    found, squares = trainer._figures.read(), {}
    for name, grad in sums.items():
        squares[block_of(name)] = squares.get(block_of(name), 0.0) + grad.square().sum().item()
    want = {f"watch/grad_norm/{block}": square**0.5 for block, square in squares.items()}
    got = {key: value for key, value in found.items() if key.startswith("watch/")}
    assert got == pytest.approx(want, rel=1e-5 if precision == "float32" else 1e-2, abs=1e-9)
    state = trainer.engines["model"].full_state(keep=True)
    apart = sum((state["ema"][n].double() - state["model"][n].double()).square().sum() for n in state["ema"])
    size = sum(state["model"][n].double().square().sum() for n in state["ema"])
    assert found["ema_drift"] == pytest.approx((apart / size).sqrt().item(), rel=1e-4)


def test_the_largest_logit_is_that_of_the_attention(monkeypatch):
    """Against the probabilities of the op's definition: their logarithms differ as the logits do."""
    generator = torch.Generator().manual_seed(0)
    qkv, angles = torch.randn(2, 5, 3, 2, 4, generator=generator), torch.rand(5, 2, generator=generator)
    cos, sin = (x.repeat_interleave(2, -1) for x in (angles.cos(), angles.sin()))
    weights, bias = torch.rand(2, 4, generator=generator) + 0.5, torch.randn(24, generator=generator)
    qkv[:, :, 2], bias[16:] = 0.0, 0.0
    qkv[:, 0, 2] = 1.0  # the op then gives each query's probability of the first key
    first = kernels.select("reference").rope_attention(
        qkv.double(), cos.double(), sin.double(), *weights.double(), eps=1e-6, bias=bias.double()
    )
    found = largest_logit(qkv, cos, sin, *weights, eps=1e-6, bias=bias)
    packed = (qkv + bias.view(3, 2, 4)).double()
    q, k = (
        packed[:, :, i] * (packed[:, :, i].square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weights[i].double()
        for i in (0, 1)
    )

    def rotated(x):
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones(()).double(), angles.double())[:, None]).flatten(-2)

    logits = torch.einsum("bnhd,bmhd->bhnm", rotated(q), rotated(k)) / 2
    assert torch.allclose(logits.softmax(-1)[..., 0], first.unflatten(-1, (2, 4))[..., 0].transpose(1, 2))
    assert found.item() == pytest.approx(logits.abs().max().item(), rel=1e-5)
    monkeypatch.setattr("lightningdit.watch.LOGITS", 25)
    assert largest_logit(qkv, cos, sin, *weights, eps=1e-6, bias=bias) == found and LOGITS > 25
    qkv[1, 2, 0, 1, 3] = torch.nan
    assert largest_logit(qkv, cos, sin, *weights, eps=1e-6, bias=bias).isnan()


@pytest.mark.parametrize(
    ("kind", "changes", "blocks"),
    [
        ("lightningdit", ("train.compile=aot_eager", "deepspeed.zero_stage=2"), ["blocks.0", "blocks.1"]),
        ("lightningdit", ("deepspeed.zero_stage=3",), ["blocks.0", "blocks.1"]),
        ("vavae", (), ["encoder.mid.attn_1", "decoder.mid.attn_1"]),
    ],
)
def test_what_is_watched_changes_no_bit_of_the_training(tmp_path, kind, changes, blocks):
    """It is measured under every way to run, and never grows with the batch: networks are left as they were."""
    states = []
    for watch in ("[]", "[activation_norms, attention_logits]"):
        trainer = toy_trainer(tmp_path / watch[1:3], kind, *changes, f"train.watch={watch}")
        stream, networks = trainer.stream(), [engine.module for engine in trainer.engines.values()]
        ops = [module.ops for network in networks for module in network.modules() if hasattr(module, "ops")]
        for _ in range(3):
            trainer.train_step(stream)
            found = trainer._figures.read()
        left = [module.ops for network in networks for module in network.modules() if hasattr(module, "ops")]
        assert ops and all(a is b for a, b in zip(ops, left, strict=True))
        states.append(trainer.engines[next(iter(trainer.engines))].full_state(keep=True))
    assert {k: v for k, v in found.items() if "logit" in k}.keys() == {f"watch/attention_logit_max/{b}" for b in blocks}
    norms = {key: value for key, value in found.items() if "activation_norm_max" in key}
    assert len(norms) >= 2 and all(value > 0 for value in (found[key] for key in found if key.startswith("watch/")))
    assert all(torch.equal(states[0][key][name], states[1][key][name]) for key in states[0] for name in states[0][key])


def test_names_that_cannot_be_watched_are_refused(tmp_path):
    for names, said in (
        ("[attention]", "attention_logits"),
        ("[grad_norms, grad_norms]", "'grad_norms' stands there twice"),
    ):
        with pytest.raises(ConfigError, match=said):
            load(toy.write_run(tmp_path / "run.yaml", toy.LIGHTNINGDIT), [f"train.watch={names}"], kind="lightningdit")


# Warnings and lines


def test_blocks_without_a_gradient_are_told_after_three_rows():
    watch, row = Watch(object()), {"zero_gradient_blocks": ["blocks.1", "blocks.0"]}
    told = [watch.new_warnings(each) for each in (row, row, row, row, {}, row, row, {"zero_gradient_blocks": ["x"]})]
    assert list(map(len, told)) == [0, 0, 1, 0, 0, 0, 0, 0] and "of blocks.1, blocks.0 was exactly 0" in told[2][0]


def test_spikes_and_figures_are_warned_of_once():
    watch = Watch(object())
    spike = {"loss_spikes": 2, "loss_median": 0.5}
    wild = {"watch/attention_logit_max/blocks.1": 2e4, "watch/attention_logit_max/blocks.2": 9.0}
    lost = {"watch/activation_norm_max/blocks.1": None, "watch/activation_norm_max/blocks.2": None}
    told = [watch.new_warnings(each) for each in (spike, spike, wild, lost, spike | {"loss_spikes": 0})]
    assert list(map(len, told)) == [1, 0, 1, 1, 0]
    assert "2 steps" in told[0][0] and "blocks.1 is 2e+04" in told[2][0] and "nor are 1 more" in told[3][0]


def test_a_line_says_the_worst_of_each_figure_alone():
    row = HEAD | {"watch/grad_norm/a": 0.5, "watch/grad_norm/b": 2.0, "watch/activation_norm_max/a": None}
    row |= {"zero_gradient_blocks": ["c", "d"], "loss_spikes": 0, "loss_median": 1.0}
    line = describe(row)
    assert "grad_norm b 2" in line and "activation_norm_max a not finite" in line and "zero_gradient_blocks 2" in line
    assert "grad_norm a" not in line and "loss_" not in line and "loss_spikes 3" in describe(row | {"loss_spikes": 3})
