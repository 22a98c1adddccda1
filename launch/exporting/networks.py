"""A LightningDiT to export, of whatever source: its weights, its run where that is known, and how it is sampled."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from common.sections import describe
from common.tensors import model_of, weights_file
from launch.arguments import load_run
from launch.config import ConfigError, LightningDiTRun, select_ops
from launch.exporting.sources import entry_of
from launch.hub import tokenizer_copy
from launch.pipelines import is_pipeline, read_pipeline
from launch.trained import diffusion_run, diffusion_weights, from_checkpoint, sampling_settings
from launch.training.checkpoint import Checkpoint
from lightningdit.config import SampleConfig, TransportConfig
from lightningdit.weights import Export, export_paths, read_export
from vavae.model import AutoencoderKL
from vavae.weights import load_tokenizer


@dataclass(frozen=True)
class Network:
    """A LightningDiT to export. run: None where its source does not tell. state: a checkpoint's description."""

    found: Export
    source: str
    run: LightningDiTRun | None = None
    state: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        """The source's name alone: what goes to others tells no folder of this machine."""
        return Path(self.source).name

    def transport(self) -> TransportConfig:
        if self.run is not None:
            return self.run.transport
        return self._read("transport", self.found.extra.get("transport"), TransportConfig) or TransportConfig()

    def settings(self) -> SampleConfig:
        if self.run is not None:
            return sampling_settings(self.run)
        return self._read("sample", self.found.sample, SampleConfig) or SampleConfig(cfg_scale=1.0)

    def remarks(self) -> list[str]:
        """What is assumed, as neither a run nor the weights tell it."""
        told, extra = self.run is not None, self.found.extra
        said = []
        if not told and "transport" not in extra:
            said.append(f"{self.name} does not tell its transport: Linear and velocity are assumed (--config tells)")
        if not told and self.found.sample is None:
            said.append(f"{self.name} tells no sampling settings: 249 steps without guidance (--config tells others)")
        return said

    def _read(self, key: str, content: Any, section: type[TransportConfig] | type[SampleConfig]) -> Any:
        try:
            return None if not content else section.model_validate(content)
        except ValidationError as e:
            raise ConfigError(f"{self.source}: {key}: {describe(e)}") from None

    def tokenizer(self, path: Path | None) -> AutoencoderKL:
        """The tokenizer at a path, else that of the pipeline or run; raises ConfigError where there is none."""
        own = self.source if is_pipeline(Path(self.source)) else None
        named = path or own or (None if self.run is None else self.run.vae.ckpt_path)
        if named is None:
            raise ConfigError(
                f"a pipeline of diffusers holds the tokenizer too, and {self.source} names none: give --tokenizer"
            )
        try:
            return load_tokenizer(tokenizer_copy(named), select_ops("reference"))
        except ValueError as e:
            raise ConfigError(f"{'vae.ckpt_path' if path is None else '--tokenizer'}: {e}") from None


def is_network(source: Checkpoint | Path) -> bool:
    """Whether a source is a LightningDiT and no tokenizer."""
    if isinstance(source, Checkpoint):
        return source.state["kind"] == "lightningdit"
    return is_pipeline(source) or model_of(entry_of(source, None)[1]) == "LightningDiT"


def network_of(
    source: Checkpoint | Path, weights: str | None = None, config: Path | None = None, overrides: Sequence[str] = ()
) -> Network:
    """The LightningDiT of a checkpoint, an export, a pipeline of diffusers, or, with its run file, any weights file.

    Raises ValueError where it cannot be read or the run file does not describe it.
    """
    if isinstance(source, Checkpoint):
        found = from_checkpoint(source, weights or "ema")
        return Network(found, str(source.path), diffusion_run(source), source.state)
    if not is_pipeline(source):
        entry_of(source, weights)  # refuses weights that it does not have
    if config is not None:
        run = load_run(config, overrides, "lightningdit")
        assert isinstance(run, LightningDiTRun)
        run = run.model_copy(update={"ckpt_path": str(source)})
        return Network(diffusion_weights(run, weights or "ema"), str(source), run)
    if is_pipeline(source):
        return Network(read_pipeline(source), str(source))
    if export_paths(weights_file(source))[1].is_file():
        return Network(read_export(source), str(source))
    raise ConfigError(
        f"{source} is a LightningDiT, and its file tells neither the network nor the latents: give --config, the run "
        "file it was trained with"
    )
