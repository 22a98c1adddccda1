"""Inception's features, and the file of weights that they are computed by."""

import shutil
from urllib.error import URLError

import pytest
import torch

from common.files import sha256
from common.tensors import write_tensors
from launch.evaluation import features, inception
from launch.evaluation.reference import Reference
from launch.evaluation.runner import evaluate_samples
from tests.measured import (
    FACTS,
    MemoryImages,
    images,
)


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory):
    """A file of torch-fidelity's layout, randomly filled: the real one is a download."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Net

    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save({}, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Net, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        net = Net("inception-v3-compat", ["2048"], str(path))
    torch.save(net.state_dict(), path)
    return path


@pytest.fixture
def inception_weights(random_weights, monkeypatch):
    """That file, taken for the published one."""
    monkeypatch.setattr(inception, "SHA256", sha256(random_weights))
    return random_weights


def test_inception_features(inception_weights):
    pixels = images(19, 2, size=32)
    extractor = features.InceptionFeatures(inception_weights)
    got = extractor(pixels)
    assert {name: tuple(value.shape) for name, value in got.items()} == {
        "features": (2, 2048),
        "logits": (2, 1008),
        "spatial": (2, 17 * 17 * 7),
    }
    net = extractor._net
    torch.testing.assert_close(got["logits"], got["features"] @ net.fc.weight.T)
    inside = []  # the same place, found without the hook: the first branch heads the block's concatenated output
    net.Mixed_6d.register_forward_hook(lambda module, inputs, output: inside.append(output))
    again = extractor(pixels)
    want = inside[0][:, :7].permute(0, 2, 3, 1).reshape(2, -1)
    assert torch.equal(again["spatial"], want) and torch.equal(got["spatial"], want)

    few = MemoryImages(images(20, 4, size=32))
    result = evaluate_samples(few, Reference("r", few), extractor, metadata=FACTS, allow_few=True, batch_size=4)
    assert set(result["metrics"]) == {"fid", "sfid", "inception_score", "precision", "recall", "kid", "kid_std"}
    assert abs(result["metrics"]["fid"]) < 1e-3 and result["metrics"]["precision"] == 1.0
    assert result["features"] == "inception-v3 (torch-fidelity)"


def test_inception_weights_are_handed_on_as_tensors_alone(tmp_path, inception_weights, monkeypatch):
    """torch-fidelity runs what a pickle says; it never meets the user's file, whatever that is also."""
    write_tensors(tmp_path / "w.safetensors", torch.load(inception_weights, weights_only=True))
    met, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda path, **how: met.append(str(path)) or load(path, **how))
    features.InceptionFeatures(tmp_path / "w.safetensors", sha256=sha256(tmp_path / "w.safetensors"))
    assert met and not [path for path in met if path.startswith(str(tmp_path))]


def test_inception_weights_of_another_network_are_refused(tmp_path, inception_weights, monkeypatch):
    state = torch.load(inception_weights, weights_only=True)
    state.pop("fc.bias")
    torch.save(state, tmp_path / "short.pth")
    own = sha256(tmp_path / "short.pth")
    with pytest.raises(ValueError, match=r"(?s)short.pth is not torch-fidelity's Inception.*fc.bias"):
        features.InceptionFeatures(tmp_path / "short.pth", sha256=own)
    with pytest.raises(ValueError, match=rf"short.pth is not .* its SHA-256 is {own}, .* \(--inception-sha256 {own}"):
        features.InceptionFeatures(tmp_path / "short.pth")
    with pytest.raises(ValueError, match=rf"short.pth has SHA-256 {own}, and --inception-sha256 says abc"):
        features.InceptionFeatures(tmp_path / "short.pth", sha256="abc")


def test_the_hash_of_the_published_file_begins_as_its_name_says():
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    assert URL_INCEPTION_V3.endswith(f"-{inception.SHA256[:8]}.pth") and len(inception.SHA256) == 64


def test_inception_is_downloaded_only_where_that_is_asked_for(tmp_path, inception_weights, monkeypatch):
    asked = []

    def offline(url, path, hash_prefix, progress):
        asked.append(hash_prefix)
        raise URLError("no network here")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(ValueError, match=r"weights are not here \(.*--inception-weights.*--download.*--foundation"):
        features.InceptionFeatures(None)
    assert asked == []
    with pytest.raises(ValueError, match=r"no network here.*--inception-weights.*--foundation"):
        features.InceptionFeatures(None, download=True)
    assert asked == [inception.SHA256]

    def deliver(url, path, hash_prefix, progress):
        asked.append(url)
        shutil.copy(inception_weights, path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", deliver)
    delivered = features.InceptionFeatures(None, download=True).facts
    assert delivered["published"] and features.InceptionFeatures(None).facts == delivered and len(asked) == 2
