"""The transport of samples: part of what they are, and the one that the weights were trained by."""

import json

import pytest
import torch

from launch import sample
from launch.config import LightningDiTRun
from launch.sweeping.networks import SharedNetworks
from launch.trained import from_checkpoint
from launch.training.checkpoint_search import find_checkpoint
from lightningdit.weights import save_export
from tests.tiny_weights import document, write_weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("weights"))


def run_of(weights, ckpt_path, **transport) -> LightningDiTRun:
    keys = document(weights, fid_num=2, num_sampling_steps=3)
    data = keys["data"] | {"latent_norm": False}
    return LightningDiTRun.model_validate(keys | {"data": data, "ckpt_path": str(ckpt_path), "transport": transport})


@pytest.mark.parametrize("source", ["run", "export"])
def test_another_transport_than_the_weights_were_trained_by_is_refused(weights, tmp_path, source):
    """By `sample` and by a sweep, of a checkpoint and of an export of it."""
    save_export(tmp_path / "export", from_checkpoint(find_checkpoint(weights / "run")))
    path = weights / "run" if source == "run" else tmp_path / "export"
    other = run_of(weights, path, path_type="GVP", prediction="score")
    said = (
        f"{path} was trained with path_type Linear, prediction velocity, the run file says transport.path_type GVP, "
        "transport.prediction score"
    )
    with pytest.raises(ValueError, match=said):
        sample.generate(other, tmp_path / "a")
    with pytest.raises(ValueError, match=said):
        SharedNetworks(other, torch.device("cpu"))
    assert not (tmp_path / "a").exists()
    # What training alone depends on may differ.
    assert sample.generate(run_of(weights, path, use_lognorm=True), tmp_path / "a").is_file()


def test_samples_of_another_transport_are_not_mixed(weights, tmp_path, capsys):
    """Of a published file, which says of no transport; descriptions of before it was stated mean the default."""

    def generate(**transport):
        return sample.generate(run_of(weights, weights / "published.pt", **transport), tmp_path)

    generate(path_type="GVP")
    with pytest.raises(ValueError, match=r"holds images of other transport .*GVP.* there, .*Linear.* now"):
        generate()
    described = json.loads((tmp_path / "samples.json").read_text("utf-8"))
    assert described.pop("transport") == {"path_type": "GVP", "prediction": "velocity", "sample_eps": 1e-3}
    (tmp_path / "samples.json").write_text(json.dumps(described), "utf-8")
    generate(path_type="Linear", sample_eps=1e-3)
    assert "is already there" in capsys.readouterr().out
    with pytest.raises(ValueError, match="other transport"):
        generate(sample_eps=0.01)
