"""The bench of sampling, on a CPU with a tiny network: who agrees with whom, and the arithmetic of whole samples."""

import json

import pytest
import torch

from bench import sampling as bench_sampling
from bench.measure.rows import Log, read
from bench.measure.timing import HostDevice
from bench.sampling import QUICK, SamplingComparison, SamplingJob, jobs
from bench.triage.rehearsal import TINY
from bench.workloads import samplers
from bench.workloads.plain import plain_euler
from bench.workloads.samplers import CHECKED_POINTS, SamplingSetup
from bench.workloads.tokenizers import flops_per_image
from bench.workloads.variants import SAMPLING, Variant
from kernels import OPS, select
from lightningdit.cost import flops_per_image as model_flops
from lightningdit.solvers import time_grid
from tests.golden import close
from vavae.config import AutoencoderConfig

TOKENIZER = AutoencoderConfig(
    embed_dim=4, z_channels=4, ch=32, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=(), resolution=8
)
OURS = Variant("reference", "ours", kernels="reference")
PLAIN = SAMPLING["plain-eager"]


def job(precision: str, *variants: Variant) -> SamplingJob:
    return SamplingJob("tiny", TINY, 3, precision, variants, TOKENIZER)


def setup(precision: str = "float32") -> SamplingSetup:
    return SamplingSetup(TINY, TOKENIZER, 3, precision, "cpu")


def bench(path=None, **settings) -> SamplingComparison:
    return SamplingComparison(HostDevice(), Log("cpu", path), None, seconds=0.02, rounds=2, **settings)


def test_the_plain_loop_is_our_sampler():
    """In float32, over the whole published grid: three guided channels, all of them conditional below the interval."""
    made = setup()
    settings = made.settings
    assert (settings.num_sampling_steps, settings.cfg_scale, settings.cfg_interval_start) == (250, 10.0, 0.1)
    assert (settings.timestep_shift, settings.cfg_channels, settings.sampling_method) == (0.3, 3, "euler")
    network = made.network(select("reference"))
    want = samplers.sample(network, made.transport, settings, made.y, range(3), shape=made.shape, null_label=5)
    times = time_grid(0.0, 1.0, 250, 0.3)
    got = made.plain_samples(made.plain(None), made.noise(), times)
    close("latents", got, want.latents, atol=2e-5)
    below = sum(0.3 * u / (249 - 0.7 * u) < 0.1 for u in range(249))
    assert made.calls() == (want.guided_nfe, want.nfe - want.guided_nfe) == (249 - below, below) == (181, 68)
    unguided = plain_euler(made.plain(None), made.noise(), made.y, times, 5, 10.0, 2.0, 3)
    assert (unguided - got).abs().max() > 0.05, "guidance matters here"


def test_providers_are_checked_on_calls_of_both_kinds():
    made = setup()
    below = [t < made.settings.cfg_interval_start for t in time_grid(0.0, 1.0, CHECKED_POINTS, 0.3)[:-1].tolist()]
    assert below == [True, True, False, False]
    assert made.exact.dtype == torch.float64 and made.eager.dtype == torch.float32
    close("float32 and float64", made.eager, made.exact.float(), atol=2e-5)
    assert not torch.equal(setup("bfloat16").eager, made.eager)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_rows_of_a_job(precision, tmp_path, capsys):
    rows = bench(tmp_path / "rows.jsonl").run(job(precision, OURS, PLAIN))
    assert list(read(tmp_path / "rows.jsonl", "cpu")) == json.loads(json.dumps(rows))
    assert [(row["provider"], row["status"], row["ours"]) for row in rows] == [
        ("reference", "ok", True),
        ("plain-eager", "ok", False),
    ]
    first, plain = rows
    assert first["extrapolated"]["times"] == {"guided": 181, "unguided": 68}
    assert plain["extrapolated"]["times"] == {"guided": 249} and "unguided" not in plain["extrapolated"]["parts_ms"]
    parts = first["extrapolated"]["parts_ms"]
    whole = parts["noise"] + 181 * parts["guided"] + 68 * parts["unguided"] + parts["decode"]
    assert first["p50_ms"] == pytest.approx(whole) and first["images_per_second"] == pytest.approx(3e3 / whole)
    assert first["latents_per_second"] == pytest.approx(3e3 / (whole - parts["decode"]))
    assert plain["p50_ms"] == pytest.approx(249 * plain["extrapolated"]["parts_ms"]["guided"], rel=0.3)
    assert first["times_faster_than"] == pytest.approx({"plain-eager": plain["p50_ms"] / first["p50_ms"]})
    flops = (2 * 181 + 68) * model_flops(TINY)[0] + flops_per_image(TOKENIZER, 8)["decode"]
    assert first["flops"] == plain["flops"] == 3 * flops and first["fraction"] is None
    assert first["settings"]["precision"] == precision and first["coverage"]["interleaved"]
    assert "extrapolated from ms" in capsys.readouterr().out


def test_what_an_iteration_runs():
    """The updates are the sampler's own, and what is decoded are images."""
    made = setup()
    ours, plain = samplers.our_sampler(OURS, made), samplers.plain_sampler(PLAIN, made)
    network, z = made.network(select("reference")), made.noise()
    zero, null = torch.zeros(3), torch.full((3,), 5)
    cond, uncond = network(z, zero, made.y), network(z, zero, null)
    guided = torch.cat([uncond[:, :3] + 10 * (cond[:, :3] - uncond[:, :3]), cond[:, 3:]], dim=1)
    close("guided", ours.iterations["guided"].run(), z + guided, atol=1e-4)
    close("unguided", ours.iterations["unguided"].run(), z + cond, atol=1e-4)
    close("plain, below the interval", plain.iterations["guided"].run(), z + cond, atol=1e-4)
    images = ours.iterations["decode"].run()
    assert images.shape == (3, 8, 8, 3) and images.dtype.name == "uint8" and images.std() > 0
    assert torch.equal(ours.iterations["noise"].run(), z)
    assert ours.calls == plain.calls == (181, 68)


def test_another_sample_is_incorrect_and_not_timed(monkeypatch):
    true = samplers.our_sampler

    def wrong(variant, made):
        sampler = true(variant, made)
        sampler.samples = sampler.samples * 1.01
        return sampler

    monkeypatch.setitem(samplers.SAMPLERS, "ours", wrong)
    rows = bench().run(job("float32", OURS, PLAIN))
    assert {row["provider"]: row["status"] for row in rows} == {"reference": "incorrect", "plain-eager": "ok"}
    assert "latents: error" in rows[0]["reason"] and "p50_ms" not in rows[0]


def test_providers_of_a_run():
    made = next(jobs(["LightningDiT-XL/1"], [64], ["bfloat16"], list(SAMPLING)))
    assert made.providers == tuple(SAMPLING) and str(made) == "LightningDiT-XL/1 batch 64 bfloat16"
    assert set(QUICK) < set(SAMPLING) and made.tokenizer.downsample_ratio * made.config.input_size == 256
    table = SAMPLING["cuda"].ops().table()
    assert all((row["backend"] == "cuda") == ("cuda" in OPS[name].backends) for name, row in table.items())


def test_without_its_packages_or_a_gpu_it_says_so(monkeypatch, capsys):
    def lacking(*arguments):
        raise ModuleNotFoundError("No module named 'torchdiffeq'")

    monkeypatch.setattr(samplers, "SamplingSetup", lacking)
    rows = bench().run(job("float32", OURS))
    assert [(row["status"], row["reason"]) for row in rows] == [
        ("unavailable", "not installed: No module named 'torchdiffeq'")
    ]
    if not torch.cuda.is_available():
        assert bench_sampling.main(["--quick"]) == 2 and "needs a GPU" in capsys.readouterr().err
