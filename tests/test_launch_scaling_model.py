"""The scaling model: traffic, overlap and failures against simulations of them, figures computed by hand."""

import itertools
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from launch.config_files import ConfigError
from launch.scaling_model import gpu as single
from launch.scaling_model.failures import Failures, daly_interval
from launch.scaling_model.gpu import Gpu, parse_efficiencies
from launch.scaling_model.network import PRESETS, Network, collective, parse_network
from launch.scaling_model.plan import (
    Surroundings,
    Workload,
    last_efficient,
    plan_step,
    plan_training,
    weak,
)
from launch.scaling_model.zero import bucket_sizes, exchanges, exposed_seconds, step_traffic

XL = 674_961_824
FREE = Network("free", 1e12, 1e12, latency=1e-9)
WORK = Workload(XL, 711.76e9, 80_000 * 1024, 1024, 128, 1, 2, 2, (False, True, True, True), 50_000_000, 5000)
GPU = Gpu(750.0, 128, 0.006)


class Ring:
    """GPUs, each with a buffer, that pass chunks on around rings; counts what each has sent, by kind of link."""

    def __init__(self, nodes: int, local: int, size: int):
        generator = np.random.default_rng(0)
        self.nodes, self.local = nodes, local
        self.buffers = generator.integers(0, 100, (nodes, local, size))
        self.total = self.buffers.sum((0, 1))
        self.sent = {"intra": np.zeros((nodes, local), int), "inter": np.zeros((nodes, local), int)}

    def around(self, link: str, members: list[tuple[int, int]], begin: int, end: int, reduce: bool) -> None:
        """A reduce-scatter, after which the member in place i has the sum of chunk i, or the all-gather of those."""
        n = len(members)
        chunks = [slice(begin + (end - begin) * i // n, begin + (end - begin) * (i + 1) // n) for i in range(n)]
        for step in range(n - 1):
            shift = -1 if reduce else 0
            sending = [(i, (i + 1) % n, chunks[(i - step + shift) % n]) for i in range(n)]
            values = [self.buffers[members[i]][chunk].copy() for i, _, chunk in sending]
            for (i, to, chunk), value in zip(sending, values, strict=True):
                self.sent[link][members[i]] += len(value)
                if reduce:
                    self.buffers[members[to]][chunk] += value
                else:
                    self.buffers[members[to]][chunk] = value

    def run(self, operation: str) -> None:
        size = self.buffers.shape[-1]
        part = size // self.local
        within = [[(m, k) for k in range(self.local)] for m in range(self.nodes)]
        across = [[(m, k) for m in range(self.nodes)] for k in range(self.local)]
        if operation != "all_gather":
            for ring in within:
                self.around("intra", ring, 0, size, True)
            for k, ring in enumerate(across):
                self.around("inter", ring, k * part, (k + 1) * part, True)
        else:  # what a reduction would have left
            for m, k in itertools.product(range(self.nodes), range(self.local)):
                own = slice(k * part + part * m // self.nodes, k * part + part * (m + 1) // self.nodes)
                self.buffers[m, k][:] = -1
                self.buffers[m, k][own] = self.total[own]
        if operation != "reduce_scatter":
            for k, ring in enumerate(across):
                self.around("inter", ring, k * part, (k + 1) * part, False)
            for ring in within:
                self.around("intra", ring, 0, size, False)

    def right(self, operation: str) -> bool:
        if operation != "reduce_scatter":
            return bool((self.buffers == self.total).all())
        part, parts = len(self.total) // self.local, []
        for k, m in itertools.product(range(self.local), range(self.nodes)):
            own = slice(k * part + part * m // self.nodes, k * part + part * (m + 1) // self.nodes)
            parts.append((self.buffers[m, k][own] == self.total[own]).all())
        return all(parts)


@pytest.mark.parametrize("operation", ["all_reduce", "reduce_scatter", "all_gather"])
@pytest.mark.parametrize(("nodes", "local"), [(1, 1), (1, 2), (1, 8), (2, 8), (3, 4), (5, 8), (4, 1)])
def test_a_gpu_sends_what_it_does_in_simulated_rings(operation, nodes, local):
    size = nodes * local * 3
    ring = Ring(nodes, local, size)
    ring.run(operation)
    assert ring.right(operation)
    found = collective(operation, size, nodes * local, Network("test", 1, 1, per_node=local))
    assert (ring.sent["intra"] == found.intra).all() and (ring.sent["inter"] == found.inter).all()
    gpus, phases = nodes * local, 2 if operation == "all_reduce" else 1
    assert found.total == pytest.approx(phases * (gpus - 1) / gpus * size)  # NCCL's factor of bus bandwidth


def test_the_slower_link_and_the_rounds_take_the_time():
    network = Network("test", 100, 10, latency=7, utilization=0.5)
    one = collective("all_reduce", 8e9, 8, network)
    assert one.seconds == pytest.approx(2 * 7 / 8 * 8e9 / 50e9 + 14 * 7e-6)
    four = collective("reduce_scatter", 8e9, 32, network)
    assert four.seconds == pytest.approx(3 / 4 * 1e9 / 5e9 + (7 + 2) * 7e-6)  # 0.15 s across, 0.14 s within
    assert collective("all_gather", 1e9, 1, network).seconds == 0.0


def test_hand_computed_traffic_of_xl_on_eight_gpus():
    """675 M parameters in bfloat16: 1.35 GB, of which 2 · 7/8 is 2.36."""
    network = PRESETS["h100-ndr"]
    volumes = [step_traffic(XL, 8, network, exchanges(stage, 1, 2, 2)).total / 1e9 for stage in range(4)]
    assert volumes == pytest.approx([2.362, 3.544, 3.544, 3.544], abs=1e-3)
    least = [step_traffic(XL, 8, network, exchanges(stage, 4, 2, 2, least=True)).total / 1e9 for stage in range(4)]
    assert least == pytest.approx([2.362, 2.362, 2.362, 3.544], abs=1e-3)  # 2, 2, 2 and 3 Ψ, arXiv 1910.02054
    accumulated = [step_traffic(XL, 8, network, exchanges(stage, 4, 2, 2)).total / 1e9 for stage in range(4)]
    assert accumulated == pytest.approx([2.362, 3.544, 4 * 2.362 + 1.181, 4 * 3.544], abs=2e-3)
    wide = step_traffic(XL, 8, network, exchanges(1, 1, 2, 4)).total / 1e9
    assert wide == pytest.approx(2 * 2.362 + 1.181, abs=1e-3)  # gradients in float32


def simulated(buckets: list[float], backward: float, ticks: int = 20_000) -> float:
    """When the last bucket has been sent after the backward pass, by a clock."""
    total, tick = sum(buckets), backward / ticks
    ends, time, queue, busy, done = list(np.cumsum(buckets) / total), 0.0, [], 0.0, 0
    while done < len(buckets):
        time += tick
        while ends and time / backward >= ends[0] - 1e-12:
            queue.append(buckets[len(buckets) - len(ends)])
            ends.pop(0)
        if busy > 0:
            busy -= tick
            done += busy <= 0
        if busy <= 0 and queue:
            busy = queue.pop(0)
    return time - backward


@pytest.mark.parametrize("backward", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("buckets", [[0.3], [0.2, 0.2, 0.1], [0.05] * 20])
def test_sums_that_overlap_end_as_by_a_clock(buckets, backward):
    assert exposed_seconds(buckets, backward, overlapped=True) == pytest.approx(simulated(buckets, backward), abs=0.02)
    assert exposed_seconds(buckets, backward, overlapped=False) == sum(buckets)
    assert buckets[-1] <= exposed_seconds(buckets, backward, overlapped=True) + 1e-12 <= sum(buckets) + 1e-9


def test_buckets_hold_all_parameters_in_order():
    assert bucket_sizes(1_050, 500) == [500, 500, 50] and bucket_sizes(1_000, 500) == [500, 500]
    assert bucket_sizes(7, 500) == [7]


@pytest.mark.parametrize(("interval", "pause", "restart"), [(0.1, 0.01, 0.05), (0.5, 0.05, 0.3), (1.5, 0.2, 0.01)])
def test_time_lost_is_that_of_simulated_failures(interval, pause, restart):
    """Segments of work and pause that a failure, also while starting again, sends back to their begin; M = 1."""
    generator = np.random.default_rng(1)
    count = 200_000
    spent, need, waiting = np.zeros(count), np.full(count, interval + pause), np.ones(count, bool)
    while waiting.any():
        failure = generator.exponential(1.0, count)
        done = failure >= need
        spent[waiting] += np.where(done, need, failure)[waiting]
        waiting &= ~done
        need[:] = restart + interval + pause
    found = Failures(1.0, pause, restart).overhead(interval)
    assert found == pytest.approx(spent.mean() / interval - 1, rel=0.02)
    assert Failures(1.0, pause, restart / 2, restart / 2).overhead(interval) == pytest.approx(found)


@pytest.mark.parametrize("pause", [1e-4, 1e-2, 0.1, 0.5])
def test_dalys_interval_is_the_numeric_minimum(pause):
    failures = Failures(1.0, pause, 0.1)
    best = minimize_scalar(failures.overhead, bounds=(1e-4, 5), method="bounded", options={"xatol": 1e-9})
    found = daly_interval(pause, 1.0)
    assert found == pytest.approx(best.x, rel=0.02)
    assert failures.overhead(found) <= best.fun * (1 + 1e-3)
    assert failures.overhead(found) <= failures.overhead(math.sqrt(2 * pause)) + 1e-12  # Young's


def test_failures_at_the_edges():
    assert daly_interval(3.0, 1.0) == 1.0
    assert Failures(1e3, 1e-4, 0.1, written=2.0).best_interval() == 2.0  # one is written at a time
    assert Failures(1e-3, 0.1, 1.0).overhead(1.0) == math.inf


def test_one_gpu_does_what_was_measured():
    assert GPU.seconds(128) + GPU.optimizer == pytest.approx(128 / 750)
    step = plan_step(WORK, GPU, FREE, 1)
    assert (step.micro_batch, step.accumulation) == (128, 8)
    assert step.seconds == pytest.approx(8 * (128 / 750) - 7 * 0.006)  # the optimizer once
    rates = [b / GPU.seconds(b) for b in (1, 2, 4, 8, 64, 128)]
    assert rates == sorted(rates)
    assert GPU.efficiency(4) == 0.5


def test_measured_efficiencies_take_the_place_of_the_curve():
    gpu = Gpu(750.0, 128, 0.006, efficiencies=parse_efficiencies("8:0.5,32:0.9,128:1"))
    assert [gpu.efficiency(b) for b in (8, 32, 128, 256)] == [0.5, 0.9, 1.0, 1.0]
    assert gpu.efficiency(16) == pytest.approx(0.7)
    assert gpu.seconds(4) == pytest.approx(gpu.seconds(8))  # no faster than the smallest that was measured
    for wrong in ("8", "8:2", "0:1", "a:b", ""):
        with pytest.raises(ConfigError, match=re.escape(f"--efficiency {wrong}:")):
            parse_efficiencies(wrong)


def test_hand_computed_hours_of_xl_with_perfect_scaling():
    """81.92 M images at 750 images/s each are 3.8 hours on 8 GPUs."""
    step = plan_step(WORK, Gpu(750.0, 128, 1e-9), FREE, 8)
    run = plan_training(WORK, step, Surroundings(mtbf=1e12), 1024)
    assert step.efficiency == pytest.approx(1, rel=1e-4)
    assert run.total == pytest.approx(81.92e6 / 750 / 8 / 3600, rel=1e-3) and round(run.total, 1) == 3.8
    assert run.steps == 80_000 and run.checkpoint_bytes == pytest.approx(10.8e9, rel=1e-3)
    assert run.pause_seconds == pytest.approx(10.8e9 / 8 / 25e9, rel=1e-3)


def test_more_gpus_a_slower_network_and_smaller_batches_cost_efficiency():
    counts = [1, 2, 8, 64, 256, 1024]
    steps = [plan_step(WORK, GPU, PRESETS["h100-ndr"], n) for n in counts]
    assert [s.efficiency for s in steps[1:]] == sorted((s.efficiency for s in steps[1:]), reverse=True)
    slower = [plan_step(WORK, GPU, PRESETS["h100-eth100"], n) for n in counts]
    assert all(a.exposed < b.exposed for a, b in zip(steps[3:], slower[3:], strict=True))
    assert [a.exposed for a in steps[:3]] == [b.exposed for b in slower[:3]]  # within a node
    bare = replace(WORK, overlapped=(False,) * 4)
    late = [plan_step(bare, GPU, PRESETS["h100-ndr"], n) for n in counts]
    assert all(a.exposed > b.exposed for a, b in zip(late[1:], steps[1:], strict=True))
    growing = [plan_step(weak(WORK, GPU, n), GPU, PRESETS["h100-ndr"], n) for n in counts]
    assert all(a.efficiency >= b.efficiency for a, b in zip(growing[2:], steps[2:], strict=True))
    assert growing[-1].global_batch == 1024 * 128


def test_gradients_are_summed_once_under_zero_1_and_for_each_micro_batch_under_2():
    work = replace(WORK, micro_batch=32)
    network = PRESETS["h100-ndr"]
    one, two = (plan_step(work, GPU, network, 8, stage) for stage in (1, 2))
    assert one.accumulation == 4
    once = collective("all_reduce", 2 * XL, 8, network)
    assert two.intra_bytes - one.intra_bytes == pytest.approx(3 * once.intra)
    assert plan_step(work, GPU, network, 8, 0).optimizer == GPU.optimizer == pytest.approx(8 * one.optimizer)


def test_where_scaling_ends():
    network = PRESETS["h100-ndr"]
    last = last_efficient(WORK, GPU, network, 0.5)
    beyond = [n for n in (128, 256, 512, 1024) if n > last.gpus]
    assert last.efficiency >= 0.5 and all(plan_step(WORK, GPU, network, n).efficiency < 0.5 for n in beyond)
    assert last_efficient(WORK, GPU, FREE, 0.25).gpus == 512  # limited by micro-batches alone: e(2)/e(128) is 0.34
    with pytest.raises(ConfigError, match="less than one image for each GPU"):
        plan_step(WORK, GPU, network, 2048)
    with pytest.raises(ConfigError, match="--gpus 12 is no multiple of the 8 GPUs of a node"):
        plan_step(WORK, GPU, network, 12)
    with pytest.raises(ConfigError, match=r"1,024 is no multiple of 24 GPUs"):
        plan_step(WORK, GPU, network, 24)


def test_a_larger_batch_needs_more_images_by_the_critical_one():
    work = weak(WORK, GPU, 64)
    step = plan_step(work, GPU, FREE, 64)
    runs = [plan_training(work, step, Surroundings(critical_batch=c), 1024) for c in (None, 1e12, 4096.0)]
    assert [run.growth for run in runs] == pytest.approx([1, 1, (1 + 2) / (1 + 0.25)])
    assert runs[2].hours == pytest.approx(runs[0].hours * 2.4)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("h100", "'h100' is none of h100-ndr.*did you mean"),
        ("h100-ndr,inetr=3", r"unknown key 'inetr'; keys: intra, .*did you mean 'int"),
        ("intra=450", "intra and inter, GB/s per GPU each way, are wanted"),
        ("h100-ndr,inter=0", "inter is '0'; a number above 0 is wanted"),
        ("h100-ndr,per_node=1.5", "per_node is '1.5'; a whole number"),
        ("h100-ndr,utilization=1.5", "utilization is '1.5'; .*at most 1"),
        ("h100-ndr,inter", "inter is ''"),
        ("", "'' is none of"),
    ],
)
def test_networks_that_make_no_sense_are_refused(text, said):
    with pytest.raises(ConfigError, match=said):
        parse_network(text)


def test_networks_by_name_by_keys_and_both():
    assert parse_network("h100-ndr") == PRESETS["h100-ndr"]
    given = parse_network("intra=300,inter=25,latency=2,per_node=4")
    assert (given.name, given.intra, given.inter, given.latency, given.per_node) == ("custom", 300, 25, 2, 4)
    both = parse_network("h100-ndr,inter=25")
    assert (both.name, both.intra, both.inter) == ("h100-ndr,inter=25", 450, 25)
    assert all(preset.source != "given" for preset in PRESETS.values())


def test_the_optimizer_takes_a_pass_of_memory():
    """38 bytes a parameter are 25.65 GB of XL, 5.96 ms at 4.3 TB/s."""
    assert single.optimizer_seconds(XL) == pytest.approx(5.96e-3, rel=1e-3)
