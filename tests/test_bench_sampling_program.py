"""The bench of the whole sampling program on a CPU: its baseline is the program that it was, and ratios are honest."""

import numpy as np
import pytest
import torch

from bench.measure.rows import Log
from bench.measure.timing import HostDevice
from bench.sampling import ProgramComparison, ProgramJob
from bench.triage.rehearsal import TINY
from bench.workloads import sampling_program
from bench.workloads.sampling_program import ProgramSetup, all_images, plain_samples
from bench.workloads.variants import SAMPLING_ON_CPU, ProgramVariant
from launch.sampling.units import UNIT
from lightningdit.flow import Transport
from lightningdit.sampler import sample
from tests.golden import close
from tests.test_bench_sampling import TOKENIZER

VARIANTS = (ProgramVariant("plain", "plain", at_once=2), ProgramVariant("program", "program"))


def job(images=3) -> ProgramJob:
    return ProgramJob(TINY, TOKENIZER, images, 3, VARIANTS)


def bench() -> ProgramComparison:
    return ProgramComparison(HostDevice(), Log("cpu", None), None, seconds=0.02, rounds=2)


def test_the_baseline_samples_as_the_sampler():
    """Other sums in its calls, the same latents; guided where the published run is."""
    made = ProgramSetup(TINY, TOKENIZER, 5, 9)
    assert (made.settings.cfg_scale, made.settings.cfg_interval_start, made.settings.cfg_channels) == (10.0, 0.1, 3)
    y, shape = torch.tensor(made.labels), (4, 4, 4)
    want = sample(made.network, Transport(), made.settings, y, range(5), shape=shape, null_label=5)
    with torch.no_grad():
        got = plain_samples(made.network, made.settings, y, range(5))
    close("latents", got, want.latents, atol=2e-5)
    assert 0 < want.guided_nfe < want.nfe == 8


def test_all_images_are_there_in_their_order():
    images = np.arange(7 * 12, dtype=np.uint8).reshape(7, 2, 2, 3)
    asked = []

    def images_of(indices, labels):
        asked.append(list(indices))
        assert labels == list(range(7))
        return images[indices]

    assert np.array_equal(all_images(images_of, list(range(7)), 3), images)
    assert asked == [[0, 1, 2], [3, 4, 5], [6]]


def test_rows_of_the_program(capsys):
    comparison = bench()
    rows = comparison.run(job())
    assert [(row["provider"], row["status"], row["ours"]) for row in rows] == [
        ("plain", "ok", False),
        ("program", "ok", True),
    ]
    plain, ours = rows
    assert ours["images_per_second"] == pytest.approx(3e3 / ours["p50_ms"]) and plain["features"]["at_once"] == 2
    comparison.conclude(rows)
    ratio = ours["images_per_second"] / plain["images_per_second"]
    assert f"program against plain: {ratio:.2f} ×" in capsys.readouterr().out


def test_other_images_are_incorrect(monkeypatch):
    class Wrong(sampling_program.SampleGenerator):
        def decode(self, made):
            found = super().decode(made)
            return found | {"images": found["images"] ^ 4}

    monkeypatch.setattr(sampling_program, "SampleGenerator", Wrong)
    rows = bench().run(job())
    assert {row["provider"]: row["status"] for row in rows} == {"plain": "ok", "program": "incorrect"}


def test_both_batches_are_compared_at_equal_terms():
    batches = {name: (variant.engine, variant.at_once) for name, variant in SAMPLING_ON_CPU.items()}
    assert batches == {"plain": ("plain", 4), "program": ("program", None), f"plain-{UNIT}": ("plain", UNIT)}
