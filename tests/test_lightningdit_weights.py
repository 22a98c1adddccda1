"""Weights files: published layouts, exports, and everything that must not load silently."""

import json

import pytest
import torch
from safetensors.torch import save_file

import kernels
from common.tensors import WeightsError, load_strict
from lightningdit.config import ModelConfig
from lightningdit.latents import LatentStatistics
from lightningdit.model import LightningDiT
from lightningdit.weights import (
    Export,
    read_export,
    read_weights,
    save_export,
    save_published,
)
from tests.golden import G, J, close

CONFIG = ModelConfig(**J("01_dit")["variants"]["a"])


@pytest.fixture(scope="module")
def state():
    return G("01_dit_a").group("param/")


def model():
    return LightningDiT(CONFIG, kernels.select("reference"))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_published_checkpoint(tmp_path, state):
    """`model` keys of multi-process runs carry `module.`, `ema` keys do not."""
    path = tmp_path / "0080000.pt"
    ema = {key: value + 1 for key, value in state.items()}
    content = {"model": {f"module.{k}": v for k, v in state.items()}, "ema": ema, "opt": {"state": {}}, "steps": 3}
    torch.save(content, path)
    assert same(read_weights(path)[0], ema) and same(read_weights(path, "model")[0], state)
    network = model()
    load_strict(network, read_weights(path, "model")[0], path)
    g = G("01_dit_a")
    close("output", network(g["in/x"], g["in/t"], g["in/y"]), g["out/eval"], atol=5e-6)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_plain_state_dicts(tmp_path, state, prefix):
    prefixed = {prefix + key: value for key, value in state.items()}
    torch.save(prefixed, tmp_path / "plain.pt")
    save_file(prefixed, tmp_path / "plain.safetensors")
    assert same(read_weights(tmp_path / "plain.pt")[0], state)
    assert same(read_weights(tmp_path / "plain.safetensors")[0], state)


def test_published_layout_is_written(tmp_path, state):
    network = model()
    load_strict(network, state, "golden")
    save_published(tmp_path / "out" / "model.pt", network.bfloat16().state_dict(), state)
    content = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    assert sorted(content) == ["ema", "model"] and same(content["ema"], state)
    assert all(value.dtype == torch.float32 for value in content["model"].values())
    assert sorted(content["model"]) == sorted(J("01_dit")["report"]["a"]["state_keys"])
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.pt"]


def an_export(state, **changes):
    latents = LatentStatistics(torch.randn(4), torch.rand(4), 0.7)
    fields = dict(config=CONFIG, state=state, step=20, weights="ema", latents=latents, extra={"tokenizer": "x"})
    return Export(**fields | changes)


def test_export_round_trip(tmp_path, state):
    export = an_export(state)
    files = save_export(tmp_path / "run" / "digits.v1", export)
    assert [f.name for f in files] == ["digits.v1.safetensors", "digits.v1.json"]
    for name in ("digits.v1", "digits.v1.json", "digits.v1.safetensors"):
        back = read_export(tmp_path / "run" / name)
        assert back.config == CONFIG and same(back.state, state)
        assert (back.step, back.weights, back.extra) == (20, "ema", {"tokenizer": "x"})
        assert torch.equal(back.latents.mean, export.latents.mean) and torch.equal(back.latents.std, export.latents.std)
        assert back.latents.multiplier == 0.7
    content = json.loads(files[1].read_text())
    assert content["kind"] == "lightningdit" and content["config"]["use_rope"] is True
    assert set(content["latents"]) == {"mean", "std", "multiplier"}


def test_misfits_are_listed_both_ways(state):
    wrong = dict(state)
    wrong["blocks.7.norm1.weight"] = wrong.pop("blocks.1.norm1.weight")
    wrong["final_layer.linear.bias"] = torch.zeros(8)
    with pytest.raises(WeightsError) as error:
        load_strict(model(), wrong, "run/ckpt.pt")
    for part in (
        "run/ckpt.pt",
        "1 missing: blocks.1.norm1.weight",
        "1 unexpected: blocks.7.norm1.weight",
        "final_layer.linear.bias [8] where the model has [4]",
    ):
        assert part in str(error.value)
    with pytest.raises(WeightsError, match=r"39 missing: .* and 34 more"):
        load_strict(model(), {}, "empty")
    before = model()
    kept = {k: v.clone() for k, v in before.state_dict().items()}
    with pytest.raises(WeightsError):
        load_strict(before, wrong, "x")
    assert same(before.state_dict(), kept)


class Payload:
    """Pickles to a call that would leave a trace."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return open, (str(self.trace), "w")


def test_files_that_are_refused(tmp_path, state):
    trace = tmp_path / "trace"
    torch.save({"model": state, "args": Payload(trace)}, tmp_path / "evil.pt")
    with pytest.raises(WeightsError, match=r"evil.pt holds an object of .*open.*no code of a file is run"):
        read_weights(tmp_path / "evil.pt", "model")
    assert not trace.exists()
    torch.save({"opt": state}, tmp_path / "no_ema.pt")
    with pytest.raises(WeightsError, match=r"no_ema.pt has no tensors by name, nor an entry 'ema', .*; it has 'opt'"):
        read_weights(tmp_path / "no_ema.pt")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(WeightsError, match="holds list"):
        read_weights(tmp_path / "list.pt")
    with pytest.raises(WeightsError, match=r"absent.pt does not exist"):
        read_weights(tmp_path / "absent.pt")
    for name in ("cut.pt", "cut.safetensors"):
        (torch.save if name.endswith("pt") else save_file)(state, tmp_path / name)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(WeightsError, match=name):
            read_weights(tmp_path / name)


def test_exports_that_are_refused(tmp_path, state):
    tensors, description = save_export(tmp_path / "a", an_export(state))
    content = bytearray(tensors.read_bytes())
    content[-3] ^= 1
    tensors.write_bytes(content)
    with pytest.raises(WeightsError, match=r"a.safetensors is damaged: SHA-256"):
        read_export(tmp_path / "a")
    foreign = json.loads(description.read_text()) | {"kind": "vavae"}
    description.write_text(json.dumps({key: value for key, value in foreign.items() if key != "checksum"}))
    with pytest.raises(WeightsError, match="of kind 'vavae', not 'lightningdit'"):
        read_export(tmp_path / "a")
    description.write_text("{")
    with pytest.raises(WeightsError, match=r"a.json is damaged"):
        read_export(tmp_path / "a")
    tensors.unlink()
    with pytest.raises(WeightsError, match=r"a.safetensors is missing"):
        read_export(tmp_path / "a")
