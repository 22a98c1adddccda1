"""Feature extractors of images: the 2015 Inception network of the published figures, or a foundation model.

An extractor is a function from uint8 images `[B, H, W, 3]` to named features: `features [B, D]` (Fréchet distance,
precision and recall) and, from Inception only, `spatial [B, D']` (sFID) and `logits [B, classes]` (inception score).
"""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.error import URLError

import torch
from torch import Tensor, nn

from common.files import FileError
from common.records import Record, read_record
from common.sections import SmallCount
from common.tensors import WeightsError, read_tensors, save_pickled
from vavae.config import FoundationConfig
from vavae.foundation import FoundationModel
from vavae.images import to_float_batch

Extractor = Callable[[Tensor], Mapping[str, Tensor]]


class InceptionFeatures:
    """Inception v3 with the weights and the resizing of the TensorFlow original, through torch-fidelity.

    `features` is the last pooling (2048), `spatial` the first 7 channels of the first branch of `mixed_6` (17·17·7 =
    2023, as the ADM evaluator takes them), `logits` the 1008 class scores without their bias.

    Args:
        weights: torch-fidelity's file; None downloads it (once, 91 MB).
        device: where to run.

    Raises:
        ValueError: no such file, not those weights, or no download.
    """

    name = "inception-v3 (torch-fidelity)"

    def __init__(self, weights: str | Path | None, device: torch.device | str = "cpu"):
        self._net = _inception(weights).to(device)
        self._device = device
        self._spatial = None
        self._net.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self._spatial = output[:, :7].permute(0, 2, 3, 1).flatten(1).float()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        features, logits = self._net(images.permute(0, 3, 1, 2).to(self._device))
        return {"features": features, "logits": logits, "spatial": self._spatial}


def _inception(weights: str | Path | None) -> nn.Module:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    if weights is None:
        return _build_inception(FeatureExtractorInceptionV3, None, None)
    try:
        tensors = read_tensors(weights, ())
    except WeightsError as e:
        raise ValueError(f"--inception-weights cannot be read as weights: {e}") from None
    # torch-fidelity unpickles without weights_only, which may run code: it gets a file of the tensors alone.
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "inception.pth")
        save_pickled(path, tensors)
        return _build_inception(FeatureExtractorInceptionV3, weights, path)


def _build_inception(network: type[nn.Module], weights: str | Path | None, path: str | None) -> nn.Module:
    try:
        return network("inception-v3-compat", ["2048", "logits_unbiased"], path)
    except URLError as e:
        advice = "name torch-fidelity's file with --inception-weights, or local features with --foundation"
        raise ValueError(f"the Inception weights could not be downloaded ({e.reason}); {advice}") from None
    except RuntimeError as e:  # keys or shapes of another network
        raise ValueError(f"{weights or 'the downloaded file'} is not torch-fidelity's Inception: {e}") from None


class FoundationRecord(Record):
    """The JSON file beside the weights of a foundation model: its section of a run file, and its tokens a side."""

    config: FoundationConfig
    grid: SmallCount


class FoundationFeatures:
    """Means over the tokens of a frozen vision transformer, `features [B, width]` float32."""

    def __init__(self, model: FoundationModel, name: str = "foundation model"):
        self.name = name
        self._model = model

    @classmethod
    def from_file(cls, path: str | Path, device: torch.device | str = "cpu") -> "FoundationFeatures":
        """From a weights file with a `FoundationRecord` beside it, a `.json` of the same name; raises ValueError."""
        beside = Path(path).with_suffix(".json")
        try:
            facts = read_record(beside, FoundationRecord)
        except FileError as e:
            raise ValueError(f"{path} needs {beside.name} beside it, with its config and grid: {e}") from None
        model = FoundationModel.from_config(facts.config.model_copy(update={"weights": str(path)}), facts.grid)
        return cls(model.to(device), f"foundation model {Path(path).name}")

    @torch.no_grad()
    def pooled(self, images: Tensor) -> Tensor:
        """uint8 `[B, H, W, 3]` → `[B, width]` float32."""
        return self._model(to_float_batch(images).to(self._model.shift.device)).mean((2, 3)).float()

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        return {"features": self.pooled(images)}
