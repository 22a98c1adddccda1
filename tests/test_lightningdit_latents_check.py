"""Statistics that are not those of their latents are refused at the start of training, and all others are not."""

from pathlib import Path

import numpy as np
import pytest
import torch

import kernels
from common.files import file_entry, read_json
from common.records import write_checksummed
from launch.__main__ import main
from lightningdit import latents_statistics
from lightningdit.config import DataConfig, ModelConfig, TransportConfig
from lightningdit.data import LatentDataset
from lightningdit.latents import LatentsError, LatentStatistics
from lightningdit.latents_statistics import check_statistics
from lightningdit.task import LightningDiTTask
from tests import toy
from tests.golden.golden import ROOT

SHAPE = (2, 4, 4)


class InMemory:
    """A set of latents [N, C, H, W] with statistics, its own unless others are given; `read`: what was looked at."""

    path, manifest, latent_norm, shape = Path("set"), None, True, SHAPE

    def __init__(self, x: np.ndarray, mean=None, std=None):
        self.x, self.read = x, []
        channels = x.astype(np.float64).transpose(1, 0, 2, 3).reshape(x.shape[1], -1)
        found = (channels.mean(1) if mean is None else mean, channels.std(1, ddof=1) if std is None else std)
        self.statistics = LatentStatistics(*(torch.tensor(value, dtype=torch.float32) for value in found))

    def __len__(self) -> int:
        return len(self.x)

    def stored(self, indices: np.ndarray, flips: np.ndarray) -> np.ndarray:
        assert not flips.any()
        self.read += indices.tolist()
        return self.x[indices].reshape(len(indices), 1, -1).astype(np.float32)


def correlated(seed: int, count: int) -> np.ndarray:
    """Latents that are nearly one number each, of a skewed distribution; the second channel is wider and far from 0."""
    rng = np.random.default_rng(seed)
    x = rng.gamma(2.0, 1.0, (count, 1, 1, 1)) + 0.1 * rng.standard_normal((count, *SHAPE))
    return x * np.array([0.1, 30.0]).reshape(2, 1, 1) + np.array([0.0, 100.0]).reshape(2, 1, 1)


def refused(latents, count: int = 4096) -> str:
    """The reason; "" where there is none."""
    try:
        check_statistics(latents, count)
    except LatentsError as e:
        return str(e)
    return ""


@pytest.mark.parametrize("count", [150, 300])
def test_correct_statistics_are_never_refused(count):
    """Of 3,000 latents few are read, so that means over them differ from those of all, by more than 5 % at times."""
    apart = 0
    for seed in range(200):
        latents = InMemory(correlated(seed, 3000))
        assert not refused(latents, count)
        few = latents.x[latents.read].mean((0, 2, 3))
        apart += bool((np.abs(few - latents.statistics.mean.numpy()) > 0.05 * latents.statistics.std.numpy()).any())
    assert apart > 30, "else this would pass with 5 % alone"


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_statistics_of_a_few_latents_are_theirs(count):
    for seed in range(50):
        rng = np.random.default_rng(seed)
        assert not refused(InMemory(rng.standard_normal((count, *SHAPE)) + 3))
        assert not refused(InMemory(correlated(seed, count)))


@pytest.mark.parametrize("channel", [0, 1])
@pytest.mark.parametrize(("shift", "scale"), [(0.12, 1), (-0.12, 1), (0, 1.12), (0, 0.88), (7, 25), (0, 25), (0, 0.04)])
def test_statistics_of_other_latents_are_refused_by_channel(channel, shift, scale):
    for seed in range(5):
        right = InMemory(correlated(seed, 20_000))
        mean, std = right.statistics.mean.numpy().copy(), right.statistics.std.numpy().copy()
        mean[channel] += shift * std[channel]
        std[channel] *= scale
        with pytest.raises(LatentsError, match=rf"_stats\.pt does not fit .* for channel {channel} it says mean"):
            check_statistics(InMemory(right.x, mean, std))


@pytest.mark.parametrize(("shift", "scale"), [(0.04, 1), (-0.04, 1), (0, 1.04), (0, 0.96)])
def test_what_is_less_than_5_percent_off_is_not_refused(shift, scale):
    """Statistics of 10,000 of a set's latents, as the published ones are, are a little off. Here errors are tiny."""
    x = np.random.default_rng(0).standard_normal((4000, *SHAPE)) + 3
    right = InMemory(x)
    std = right.statistics.std.numpy()
    mean = right.statistics.mean.numpy()
    assert not refused(InMemory(x, mean + shift * std, std * scale))
    assert refused(InMemory(x, mean + 1.6 * shift * std, std * (1 + 1.6 * (scale - 1))))


def test_the_message_says_what_is_there_and_what_to_do():
    x = np.random.default_rng(0).standard_normal((5000, *SHAPE)) * np.array([1, 2]).reshape(2, 1, 1) + 3
    for mean, std, said in (
        ([10.0, 3.0], [25.0, 2.0], r"for channel 0 it says mean 10 and std 25; 4,096 of 5,000 latents have (2.99|3.0)"),
        ([3.0, 3.5], [25.0, 2.0], r"for channel 0 and 1 more it says mean 3 and std 25; 4,096 of 5,000 latents have"),
        ([3.0, 3.0], [1.0, 50.0], r"for channel 1 it says mean 3 and std 50; .* ± 0.008 and (2.00|1.99)\d* ± 0.006\."),
    ):
        with pytest.raises(LatentsError, match=rf"^set/latents_stats\.pt does not fit the latents beside it: {said}"):
            check_statistics(InMemory(x, mean, std))


@pytest.mark.parametrize("total", [1, 7, 4095, 4096, 4097, 10_000, 1_281_167])
def test_latents_of_all_stretches_are_read_and_few(total):
    indices = latents_statistics._spread(total, 4096)
    assert len(set(indices.tolist())) == len(indices) == min(total, 4096)
    assert indices.min() >= 0 and indices.max() < total and (np.diff(indices) > 0).all()
    assert np.diff(indices, prepend=0).max() <= 2 * -(-total // 4096)
    assert np.array_equal(indices, latents_statistics._spread(total, 4096))


@pytest.mark.parametrize("classes", [2, 3, 4, 10])
def test_labels_that_go_round_do_not_make_a_period(classes):
    """Every image of a class lies far from those of the others, and every `classes`-th is of one class."""
    for total in (4096 * classes, 8192 * classes):
        x = np.broadcast_to((np.arange(total) % classes).reshape(-1, 1, 1, 1) * 1.0, (total, *SHAPE))
        assert not refused(InMemory(x))


# --- where it is asked


@pytest.fixture
def latents(tmp_path):
    return toy.write_latents(tmp_path / "latents", count=200)


def spoil(directory: Path, *, manifest: bool) -> None:
    """Statistics of mean + 7 and std × 25, in a set with or without a manifest that says the same."""
    content = {key: value for key, value in read_json(directory / "manifest.json").items() if key != "checksum"}
    (directory / "manifest.json").unlink()
    found = content["statistics"]
    found |= {"mean": [mean + 7 for mean in found["mean"]], "std": [25 * std for std in found["std"]]}
    latents_statistics.write_statistics(directory, found)
    if manifest:
        content["files"] = {"latents_stats.pt": file_entry(directory / "latents_stats.pt")}
        write_checksummed(directory / "manifest.json", content)


@pytest.mark.parametrize("manifest", [True, False])
def test_training_does_not_begin_with_statistics_of_other_latents(latents, tmp_path, capsys, manifest):
    spoil(latents, manifest=manifest)
    config = toy.write_run(
        tmp_path / "run.yaml",
        toy.LIGHTNINGDIT,
        data={"data_path": str(latents)},
        train={"output_dir": str(tmp_path), "max_steps": 1},
    )
    arguments = ["train", "lightningdit", str(config), "deepspeed.zero_stage=0"]
    for more in ([], ["--dry-run"]):
        assert main([*arguments, *more]) == 2
        error = capsys.readouterr().err
        assert f"{latents}/latents_stats.pt does not fit the latents beside it" in error
        removed = "latents_stats.pt and manifest.json" if manifest else "latents_stats.pt"
        assert f"Remove {removed} and run `python -m launch extract --statistics {latents}`" in error
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert main([*arguments, "--dry-run", "data.check_statistics=false"]) == 0


def test_what_the_message_says_mends_it(latents, capsys):
    spoil(latents, manifest=True)
    for name in ("latents_stats.pt", "manifest.json"):
        (latents / name).unlink()
    assert main(["extract", "--statistics", str(latents)]) == 0
    assert len(LatentDataset.from_config(DataConfig(data_path=str(latents), num_classes=3), seed=0)) == 200


def test_a_set_is_refused_wherever_it_is_trained_on_and_read_elsewhere(latents):
    spoil(latents, manifest=False)
    config = DataConfig(data_path=str(latents), num_classes=3)
    model = ModelConfig(input_size=4, patch_size=2, in_channels=4, hidden_size=16, depth=1, num_heads=2, num_classes=3)
    with pytest.raises(LatentsError, match="does not fit"):
        LightningDiTTask(model, TransportConfig(), config, kernels.select("reference"), seed=0)
    assert len(LatentDataset(latents)) == 200
    for change in ({"latent_norm": False}, {"check_statistics": False}):
        assert len(LatentDataset.from_config(config.model_copy(update=change), seed=0)) == 200


def test_published_latents_fit_their_statistics():
    assert not refused(LatentDataset(ROOT / "06_latents_dir"))
