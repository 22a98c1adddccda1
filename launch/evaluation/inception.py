"""The 2015 Inception network of the published figures: its file, told by its hash, and its features."""

import tempfile
from pathlib import Path
from urllib.error import URLError

import torch
from torch import Tensor, nn

from common.files import sha256
from common.tensors import WeightsError, read_tensors, save_pickled

#: Of torch-fidelity's file, `weights-inception-2015-12-05-6726825d.pth` (95,628,359 bytes): its name states the first
#: digits. pytorch-fid's `pt_inception-2015-12-05-6726825d.pth` is the same file.
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
ADVICE = (
    "name torch-fidelity's file with --inception-weights, have it downloaded (91 MB) with --download, or give local "
    "features with --foundation"
)


class InceptionFeatures:
    """Inception v3 with the weights and the resizing of the TensorFlow original, through torch-fidelity.

    `features` is the last pooling (2048), `spatial` the first 7 channels of the first branch of `mixed_6` (17·17·7 =
    2023, as the ADM evaluator takes them), `logits` the 1008 class scores without their bias.

    Args:
        weights: torch-fidelity's file; None takes the one that was downloaded before.
        device: where to run.
        sha256: of another file that is accepted in place of torch-fidelity's.
        download: whether a file that is not here may be downloaded.

    Raises:
        ValueError: no such file, another file, not those weights, or no download.
    """

    name = "inception-v3 (torch-fidelity)"

    def __init__(
        self,
        weights: str | Path | None,
        device: torch.device | str = "cpu",
        *,
        sha256: str | None = None,
        download: bool = False,
    ):
        path = Path(weights) if weights is not None else _downloaded(download)
        found = check_hash(path, sha256)
        self._net = _inception(path).to(device)
        self._device = device
        self._spatial = torch.empty(0)
        self._net.get_submodule("Mixed_6d.branch1x1").register_forward_hook(self._keep)
        self.facts = {
            "name": self.name,
            "weights": str(path),
            "sha256": found,
            "published": found == SHA256,
            "gives": {
                "features": "last pooling, 2048",
                "spatial": "the first 7 channels of mixed_6, 2023",
                "logits": "class scores without their bias, 1008",
            },
            "resize": "299 × 299, bilinear as TensorFlow 1 does it (no antialiasing, corners not aligned)",
        }

    def to(self, device: torch.device | str) -> None:
        """Move the network."""
        self._net.to(device)
        self._device = device

    def _keep(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self._spatial = output[:, :7].permute(0, 2, 3, 1).flatten(1).float()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        features, logits = self._net(images.permute(0, 3, 1, 2).to(self._device))
        return {"features": features, "logits": logits, "spatial": self._spatial}


def check_hash(path: Path, accepted: str | None = None) -> str:
    """SHA-256 of a file; raises ValueError where it is neither torch-fidelity's nor, where one is given, `accepted`."""
    try:
        found = sha256(path)
    except ValueError as e:
        raise ValueError(f"--inception-weights cannot be read as weights: {e}") from None
    if found == (accepted or SHA256).lower():
        return found
    if accepted is not None:
        raise ValueError(f"{path} has SHA-256 {found}, and --inception-sha256 says {accepted}")
    raise ValueError(
        f"{path} is not torch-fidelity's Inception: its SHA-256 is {found}, that file's {SHA256}; figures by another "
        f"do not compare with published ones (--inception-sha256 {found} takes it all the same)"
    )


def _downloaded(allowed: bool) -> Path:
    """The file where torch.hub keeps it, downloaded where that is allowed and it is not there."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3 as URL

    path = Path(torch.hub.get_dir()) / "checkpoints" / URL.rpartition("/")[2]
    if path.is_file():
        return path
    if not allowed:
        raise ValueError(f"the Inception weights are not here ({path}): {ADVICE}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL, str(path), hash_prefix=SHA256, progress=False)
    except (URLError, RuntimeError, OSError) as e:  # RuntimeError: another hash
        reason = getattr(e, "reason", e)
        raise ValueError(f"the Inception weights could not be downloaded from {URL} ({reason}): {ADVICE}") from None
    return path


def _inception(weights: Path) -> nn.Module:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        tensors = read_tensors(weights, ())
    except WeightsError as e:
        raise ValueError(f"--inception-weights cannot be read as weights: {e}") from None
    # torch-fidelity unpickles without weights_only, which may run code: it gets a file of the tensors alone.
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "inception.pth")
        save_pickled(path, tensors)
        try:
            return FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], path)
        except RuntimeError as e:  # keys or shapes of another network
            raise ValueError(f"{weights} is not torch-fidelity's Inception: {e}") from None
