"""The bench of matrix products, on a CPU with tiny layers: shapes, who is checked, the mean over a step."""

import json

import pytest
import torch

from bench import gemms
from bench.gemms import LIBRARIES, GemmComparison, GemmJob, Product, means, products
from bench.measure import timing
from bench.measure.rows import Log, read
from bench.measure.timing import HostDevice
from bench.triage.rehearsal import TINY
from bench.workloads.published import published_config
from lightningdit.cost import flops_per_image
from lightningdit.model import LightningDiT

SMALL = TINY.model_copy(update={"depth": 1})


@pytest.fixture
def bench(monkeypatch, tmp_path):
    monkeypatch.setattr(timing, "FOOTPRINT", 20_000)
    monkeypatch.setattr(timing, "ITERATION_BYTES", 60_000)
    return GemmComparison(HostDevice(), Log("cpu", tmp_path / "rows.jsonl"), None, seconds=0.02, rounds=2)


def test_the_products_are_those_of_a_block():
    """Shapes by the network's own layers, results by autograd."""
    from kernels import select

    block = LightningDiT(SMALL, select("reference")).blocks[0]
    layers = {"qkv": block.attn.qkv, "proj": block.attn.proj, "w12": block.mlp.w12, "w3": block.mlp.w3}
    found = {(p.layer, p.direction): p for p in products(SMALL, 2)}
    assert len(found) == 12
    for name, layer in layers.items():
        x = torch.randn(2 * 16, layer.in_features, requires_grad=True)
        y = torch.nn.functional.linear(x, layer.weight)
        y.sum().backward()
        for direction, result in (("forward", y), ("dgrad", x.grad), ("wgrad", layer.weight.grad)):
            product = found[name, direction]
            a, b = product.operands("cpu", 0)
            assert torch.mm(a, b).shape == result.shape == product.shape[:2], product
            assert product.flops == 2 * torch.Size(product.shape).numel()
            stored = a.t() if direction == "wgrad" else a, b.t() if direction == "forward" else b
            assert all(factor.is_contiguous() and factor.dtype == torch.bfloat16 for factor in stored)
            assert product.moved == 2 * (a.numel() + b.numel() + result.numel())


def test_the_products_are_nearly_all_of_a_step():
    """What is left of the published FLOPs: attention, modulation and both ends."""
    config = published_config("LightningDiT-XL/1")
    part = config.depth * sum(product.flops for product in products(config, 1)) / flops_per_image(config)[1]
    assert 0.96 < part < 0.965
    assert {p.shape for p in products(config, 128) if p.direction == "wgrad"} == {
        (3456, 1152, 32768),
        (1152, 1152, 32768),
        (6144, 1152, 32768),
        (1152, 3072, 32768),
    }


def test_rows_of_a_product(bench, tmp_path, capsys):
    product = Product("w3", "wgrad", 32, 42, 16)
    rows = bench.run(GemmJob("tiny", 2, product))
    assert json.loads(json.dumps(rows)) == list(read(tmp_path / "rows.jsonl", "cpu"))
    assert [row["provider"] for row in rows] == list(LIBRARIES) and {row["status"] for row in rows} == {"ok"}
    first = rows[0]
    assert first["shape"] == (16, 42, 32) and first["flops"] == 2 * 16 * 42 * 32 and first["ours"] is False
    assert first["tflops"] == pytest.approx(first["flops"] / first["p50_ms"] / 1e9)
    assert (first["sets"], first["calls"]) == timing.iteration_size(product.moved, 0) and first["sets"] > 1
    assert first["fraction"] is None and "TFLOP/s" in capsys.readouterr().out


def test_an_iteration_goes_over_all_its_operands(bench):
    product = Product("w3", "forward", 3, 4, 5)
    pairs, calls = [product.operands("cpu", seed) for seed in range(3)], 7
    results = bench._multiplied("torch", pairs, calls)
    assert len(results) == 7 and len({result.data_ptr() for result in results}) == 7
    assert all(torch.equal(result, a @ b) for result, (a, b) in zip(results, (pairs * 3)[:7], strict=True))
    assert not torch.equal(results[0], results[1])


def test_a_wrong_product_is_not_timed(bench, monkeypatch):
    true = GemmComparison._multiplied

    def wrong(self, name, pairs, calls):
        return [p * 1.1 if name == "cublaslt" else p for p in true(self, name, pairs, calls)]

    monkeypatch.setattr(GemmComparison, "_multiplied", wrong)
    rows = bench.run(GemmJob("tiny", 2, Product("proj", "dgrad", 32, 16, 16)))
    assert {row["provider"]: row["status"] for row in rows} == {"torch": "ok", "cublaslt": "incorrect"}


def test_a_provider_runs_with_its_library_and_leaves_torch_as_it_was(bench, monkeypatch):
    seen, mm, now = [], torch.mm, torch.backends.cuda.preferred_blas_library
    monkeypatch.setattr(torch, "mm", lambda a, b: seen.append(now().name) or mm(a, b))
    before, pairs = now(), [Product("w3", "forward", 3, 4, 5).operands("cpu", 0)]
    for name in LIBRARIES:
        bench._multiplied(name, pairs, 1)
    assert seen == ["Cublas", "Cublaslt"] and now() == before


def planted(slow: str = "", **times: float) -> list[dict]:
    """Rows of every product at 1 TFLOP in so many ms for each provider, three times that in a slow direction."""
    return [
        {
            "kind": "gemm",
            "model": "XL",
            "batch": 128,
            "layer": layer,
            "direction": direction,
            "provider": name,
            "status": "ok",
            "flops": 10**12,
            "p50_ms": ms * (3 if direction == slow else 1),
        }
        for name, ms in times.items()
        for layer in gemms.LAYERS
        for direction in gemms.DIRECTIONS
    ]


def test_the_mean_over_a_step_is_by_time(capsys):
    rows = planted("wgrad", torch=2.0) + planted(cublaslt=4.0)
    found = means(rows)
    # 8 products at 500 TFLOP/s and 4 at 167; at its best, wgrad by the other library at 250.
    assert found["XL", 128, "torch"] == pytest.approx(12 / (8 * 2 + 4 * 6) * 1000) == pytest.approx(300)
    assert found["XL", 128, "cublaslt"] == pytest.approx(250)
    assert found["XL", 128, "best"] == pytest.approx(12 / (8 * 2 + 4 * 4) * 1000)
    assert means(rows[1:12]) == {}, "one product is missing"
    assert means([rows[0] | {"status": "failed"}, *rows[1:12]]) == {}
    GemmComparison(HostDevice(), Log("cpu"), None).conclude(rows)
    assert "XL batch 128: 300.0 TFLOP/s mean over the step's products, torch" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gemms.main([]) == 2 and "bench.gemms needs a GPU" in capsys.readouterr().err
