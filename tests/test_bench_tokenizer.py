"""The bench of the tokenizer, on a CPU with tiny networks: what is checked against what, and its rows."""

import json
from types import SimpleNamespace

import pytest
import torch

from bench import tokenizer as bench_tokenizer
from bench.measure.rows import Log, read
from bench.measure.timing import HostDevice
from bench.tokenizer import (
    CHECKED_LOSSES,
    QUICK,
    TokenizerComparison,
    TokenizerJob,
    jobs,
    wrong_losses,
)
from bench.workloads import tokenizer_training, tokenizers
from bench.workloads.tokenizer_training import TrainingSetup
from bench.workloads.tokenizers import PASSES, PassSetup, draw, flops_per_image, make_tokenizer
from bench.workloads.variants import TOKENIZER, TokenizerVariant
from kernels import select
from tests.golden import close
from vavae.config import AutoencoderConfig
from vavae.loss import Perceptual
from vavae.task import VavaeTask

TINY = AutoencoderConfig(
    embed_dim=4, z_channels=4, ch=32, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=(), resolution=16
)
VIT = "{img_size: 32, patch_size: 4, embed_dim: 16, depth: 1, num_heads: 2}"
#: A run small enough for a CPU: 8 × 8 latents of 16 × 16 pixels.
OVERRIDES = (
    "model={embed_dim: 4, z_channels: 4, ch: 32, ch_mult: [1, 1], num_res_blocks: 1, attn_resolutions: [], "
    "resolution: 16}",
    "data.image_size=16",
    "data.num_workers=0",
    "loss.disc_ndf=8",
    "loss.disc_n_layers=1",
    "foundation.model_name=vit_tiny_patch16_224",
    f"foundation.model_args={VIT}",
)
REFERENCE = TokenizerVariant("reference", "pass", kernels="reference")
LAST = TokenizerVariant("reference-channels-last", "pass", kernels="reference", channels_last=True)
GRAPH = TokenizerVariant("reference-compile", "pass", kernels="reference", compile="inductor")
BARE = TokenizerVariant("reference", "bare", kernels="reference")
PLAIN = TokenizerVariant("plain", "plain", kernels="reference", precision="float32")


def bench(path=None) -> TokenizerComparison:
    return TokenizerComparison(HostDevice(), Log("cpu", path), None, seconds=0.02, rounds=2)


def test_flops_are_those_of_the_published_limits():
    """790 TFLOP/s make 5,700 images/s of encoding and 3,130 of decoding; and with the area, by hand."""
    found = flops_per_image(AutoencoderConfig(size="f16d32"), 256)
    assert (round(found["encode"] / 1e9, 1), round(found["decode"] / 1e9, 1)) == (137.9, 252.2)
    assert 790e12 / found["encode"] == pytest.approx(5700, rel=0.01)
    assert 790e12 / found["decode"] == pytest.approx(3130, rel=0.01)
    small, large = (flops_per_image(TINY, size)["encode"] for size in (16, 32))
    attention = 4 * 32 * (256**2 - 4 * 64**2)  # its two products grow by 16
    assert large == 4 * small + attention


def test_what_a_step_has_to_close_is_closed_with_it():
    closed = []

    class Step:
        close = staticmethod(lambda: closed.append("step"))

        def __call__(self):
            return None

    shared = SimpleNamespace(provider=lambda variant: (Step(), None), flops=1, about={})
    ready = bench().prepare(TokenizerJob("train", "bfloat16", 2, (BARE,)), "reference", shared)
    assert not closed
    ready.release()
    assert closed == ["step"] and not ready.iterations


@pytest.mark.parametrize(("part", "precision"), [("encode", "float32"), ("decode", "bfloat16")])
def test_rows_of_a_pass(part, precision, tmp_path, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(tokenizers, "compiled", lambda function, mode, **options: seen.append(mode) or function)
    job = TokenizerJob(part, precision, 3, (REFERENCE, LAST, GRAPH), TINY, 16)
    rows = bench(tmp_path / "rows.jsonl").run(job)
    assert list(read(tmp_path / "rows.jsonl", "cpu")) == json.loads(json.dumps(rows))
    assert [row["provider"] for row in rows] == ["reference", "reference-channels-last", "reference-compile"]
    assert {(row["status"], row["ours"]) for row in rows} == {("ok", False)}
    first = rows[0]
    assert (first["part"], first["precision"], first["batch"], first["kind"]) == (part, precision, 3, "tokenizer")
    assert first["images_per_second"] == pytest.approx(3e3 / first["p50_ms"]) and first["fraction"] is None
    assert first["flops"] == 3 * flops_per_image(TINY, 16)[part] and "breakdown_ms" not in first
    assert rows[1]["features"]["channels_last"] and "images/s" in capsys.readouterr().out
    assert seen == ["none"] * 4 + ["inductor"] * 2, "encoder and decoder of each"


def test_passes_are_those_of_extraction_and_sampling():
    tokenizer = make_tokenizer(TINY, select("reference"), "cpu")
    images, latents = (draw(PASSES[part].shape(TINY, 2, 16), "cpu") for part in ("encode", "decode"))
    assert images.shape == (2, 3, 16, 16) and latents.shape == (2, 4, 8, 8) and images.abs().max() == 1
    encode, decode = PASSES["encode"](tokenizer, images), PASSES["decode"](tokenizer, latents)
    posterior = tokenizer.encode(images)
    close("latents", encode(), posterior.mean + posterior.std * encode.noise, atol=1e-5)
    pixels = decode()
    assert pixels.dtype == torch.uint8 and pixels.shape == (2, 3, 16, 16) and pixels.float().std() > 0


def test_a_provider_has_the_layout_and_precision_it_is_named_for():
    expected = PassSetup("decode", TINY, 16, 3, torch.bfloat16, "cpu")
    assert expected.exact.dtype == torch.float64 and expected.eager.dtype == torch.bfloat16 and len(expected.exact) == 2
    run, value = expected.provider(LAST)
    assert run.inputs.is_contiguous(memory_format=torch.channels_last) and not run.inputs.is_contiguous()
    weight = run.tokenizer.decoder.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and weight.dtype == torch.bfloat16
    assert value.shape == expected.exact.shape and 0 < (value.double() - expected.exact).abs().max() < 0.1
    assert expected.provider(REFERENCE)[0].inputs.is_contiguous()


def test_a_wrong_pass_is_not_timed(monkeypatch):
    true = PassSetup.provider

    def wrong(self, variant):
        run, value = true(self, variant)
        return run, value * 1.1 if variant.channels_last else value

    monkeypatch.setattr(PassSetup, "provider", wrong)
    rows = bench().run(TokenizerJob("encode", "float32", 2, (REFERENCE, LAST), TINY, 16))
    assert {row["provider"]: row["status"] for row in rows} == {
        "reference": "ok",
        "reference-channels-last": "incorrect",
    }


@pytest.fixture(scope="module")
def setup():
    return TrainingSetup(4, "cpu", OVERRIDES, images=6)


def test_the_run_that_is_trained_has_every_term(setup):
    """Frozen networks are read from files as a user names them, and do something."""
    run = setup.run
    assert run.loss.use_vf and run.loss.use_gan and run.loss.perceptual == "lpips" and run.loss.disc_start == 0
    assert run.train.precision == "bfloat16" and run.train.global_batch_size == 4
    step, losses = setup.provider(BARE)
    assert set(CHECKED_LOSSES) | {"perceptual", "g_loss"} <= set(losses) and all(losses[k] != 0 for k in CHECKED_LOSSES)
    x, y = torch.rand(2, 1, 3, 64, 64) * 2 - 1
    perceptual = Perceptual.from_weights(run.loss.perceptual_weights)
    assert 1e-3 < float(perceptual(x, y)) < 1e3
    assert 0.05 < perceptual.net.net(x)[-1].std() < 20, "activations neither vanish nor explode"
    assert len(step._task.batches) == 6 and step._batch["image"].shape == (4, 3, 16, 16)
    assert 0.2 < step._batch["image"].std() < 1
    assert setup.flops > 3 * flops_per_image(TINY, 16)["decode"]


def test_a_step_trains_both_networks(setup):
    step, _ = setup.provider(BARE)
    assert set(step._optimizers) == {"autoencoder", "discriminator"}
    before = {name: optimizer.master.clone() for name, optimizer in step._optimizers.items()}
    first = [float(step()["rec"]) for _ in range(3)]
    for name, optimizer in step._optimizers.items():
        assert not torch.equal(optimizer.master, before[name]) and float(optimizer.norm) > 0, name
        assert all(p.dtype == torch.bfloat16 and p.grad is None for p in optimizer.parameters)
    assert first[2] < first[0], "the reconstruction improves"


def test_rows_of_a_training_step(monkeypatch, capsys):
    """Ours beside the plain formulation, whose losses it is held to and whose time it is a multiple of."""
    seen = []
    monkeypatch.setattr(
        tokenizer_training, "compile_module", lambda network, mode, *rest, **options: seen.append((network, mode))
    )
    graphs = TokenizerVariant("bare", "bare", compile="inductor")
    monkeypatch.setattr(VavaeTask, "compile", lambda self, mode, deterministic: seen.append((self, mode)))
    rows = bench().run(
        TokenizerJob("train", "bfloat16", 2, (PLAIN, graphs), overrides=(*OVERRIDES, "loss.perceptual=none"))
    )
    bench().conclude(rows)
    assert {row["provider"]: row["status"] for row in rows} == {"bare": "ok", "plain": "ok"}, rows
    ours, plain = (next(row for row in rows if row["provider"] == name) for name in ("bare", "plain"))
    assert ours["frozen_weights"] == "random" and ours["flops"] > 0 and ours["ours"] and not plain["ours"]
    assert plain["images_per_second"] == pytest.approx(2e3 / plain["p50_ms"])
    ratio = ours["times_faster_than"]["plain"]
    assert ratio > 0 and f"bare: {ratio:.2f} × the plain float32 formulation" in capsys.readouterr().out
    assert [type(what).__name__ for what, _ in seen] == ["VavaeTask", "AlignedAutoencoder", "NLayerDiscriminator"]
    assert {mode for _, mode in seen} == {"inductor"}


def test_the_plain_step_trains_both_networks_in_float32(setup):
    step, losses = setup.provider(PLAIN)
    assert set(CHECKED_LOSSES) <= losses.keys()
    assert {p.dtype for network in step._networks.values() for p in network.parameters()} == {torch.float32}
    first = [float(step()["nll"]) for _ in range(3)]
    assert first[2] < first[0], "the reconstruction improves"


def test_on_a_cpu_the_ratio_to_the_plain_formulation_is_printed(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench_tokenizer, "CPU_RUN", (*OVERRIDES, "loss.perceptual=none"))
    assert bench_tokenizer.main(["--cpu", "--batch", "2", "--seconds", "0.1", "--out", str(tmp_path / "rows")]) == 0
    text = capsys.readouterr().out
    assert text.count(" × the plain float32 formulation") == 2 and "bare-float32: " in text
    assert [row["provider"] for row in read(tmp_path / "rows", "cpu")] == ["plain", "bare-float32", "bare"]


def test_another_loss_is_incorrect():
    expected = dict.fromkeys(CHECKED_LOSSES, 2.0)
    assert wrong_losses({"reference": expected, "bare": expected | {"kl": 2.03}, "trainer": None}) == {}
    found = wrong_losses({"reference": expected, "bare": expected | {"kl": 2.05, "nll": float("nan")}})
    assert found == {"bare": "first losses beside the reference ops': nll nan for 2, kl 2.05 for 2"}
    assert wrong_losses({"bare": expected}) == {}, "nobody to compare with"
    assert list(wrong_losses({"plain": expected, "bare": expected | {"kl": 3.0}})) == ["bare"]


def test_providers_of_a_run():
    found = list(jobs(["encode", "train"], [], ["bfloat16", "float32"], [], quick=False))
    assert [str(job) for job in found[:3]] == [
        "encode batch 32 bfloat16",
        "encode batch 32 float32",
        "train batch 32 bfloat16",
    ]
    assert len(found) == 2 * 3 + 2 and found[0].providers == tuple(TOKENIZER["encode"])
    found = list(jobs(list(TOKENIZER), [], ["bfloat16"], [], quick=True))
    assert [job.part for job in found] == ["encode", "decode", "train"]
    assert {name for job in found for name in job.providers} == set(QUICK)
    (job,) = jobs(["encode", "train"], [7], ["float32"], ["trainer"], quick=False)
    assert (job.part, job.batch, job.precision, job.providers) == ("train", 7, "bfloat16", ("trainer",))
    job = next(jobs(["train"], [], [], [], quick=False))
    assert bench().order(job)[0] == "reference", "whom the others are checked against"


def test_without_its_packages_or_a_gpu_it_says_so(monkeypatch, capsys):
    def lacking(*arguments):
        raise ModuleNotFoundError("No module named 'lpips'")

    monkeypatch.setattr(tokenizer_training, "TrainingSetup", lacking)
    rows = bench().run(TokenizerJob("train", "bfloat16", 2, (BARE,)))
    assert [(row["status"], row["reason"]) for row in rows] == [
        ("unavailable", "not installed: No module named 'lpips'")
    ]
    with pytest.raises(SystemExit):
        bench_tokenizer.main(["training"])
    assert "no part is called 'training'; known: encode, decode, train" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert bench_tokenizer.main(["--quick"]) == 2 and "needs a GPU" in capsys.readouterr().err
