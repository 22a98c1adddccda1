"""What the training loop needs to train a LightningDiT: its network, its data, one step of flow matching."""

import logging
from collections.abc import Callable, Mapping

import torch

from common.seeds import generator, torch_seed
from common.tensors import load_strict
from lightningdit.config import DataConfig, ModelConfig, TransportConfig
from lightningdit.data import LatentDataset
from lightningdit.flow import Transport
from lightningdit.model import LightningDiT
from lightningdit.weights import read_weights

log = logging.getLogger(__name__)
Tensors = dict[str, torch.Tensor]

_INIT, _NOISE, _TIMES, _DROPS = range(1, 5)  # one stream of random numbers for each purpose


class LightningDiTTask:
    """A network of `model`'s shape on `data`, trained by `transport`; every random number follows from `seed`.

    networks: {"model"}, float32 on the CPU, with initial weights from the seed alone. batches: the latents.

    Raises ValueError where the latents' shape or the number of classes does not fit the model.
    """

    def __init__(
        self,
        model: ModelConfig,
        transport: TransportConfig,
        data: DataConfig,
        ops,
        *,
        seed: int,
        residual_dtype: torch.dtype = torch.float32,
        params_gathered: bool = True,
    ):
        self.config, self._seed = model, seed
        self.batches = LatentDataset.from_config(data, seed)
        check_latents(self.batches, model)
        if data.num_classes != model.num_classes:
            raise ValueError(f"data.num_classes is {data.num_classes}, the model's num_classes {model.num_classes}")
        self.transport = Transport.from_config(transport)
        self._lognorm_until = transport.lognorm_until_step
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_seed(seed, _INIT))
            self.networks = {"model": LightningDiT(model, ops, residual_dtype, params_gathered)}

    def load_weights(self, path: str, which: str = "ema") -> None:
        """Start from the weights of an export or a published `.pt` instead; raises WeightsError on a misfit.

        Of a file that holds both, `which` ("ema" or "model") is taken; which it was is logged.
        """
        tensors, taken = read_weights(path, which)
        load_strict(self.networks["model"], tensors, path)
        log.info("starting from the %s weights of %s", taken, path)

    def to(self, device: torch.device) -> None:
        """Nothing but the networks, which their engine moves, lives on the device."""

    def draw(self, step: int, batch_size: int, device: torch.device | str, out: Tensors | None = None) -> Tensors:
        """Noise [B, C, H, W], times [B] and label drops [B] (bool) of optimizer step `step` (from 1), B = batch_size.

        A function of (seed, step) and the kind of device: whoever slices it sees the same run. With `out`, the result
        of an earlier call of the same sizes, its tensors are overwritten and returned.
        """
        config = self.config
        noise, times, drops = (generator(self._seed, step, salt, device=device) for salt in (_NOISE, _TIMES, _DROPS))
        shape = (batch_size, config.in_channels, config.input_size, config.input_size)
        draws = out or {
            "noise": torch.empty(shape, device=device),
            "t": torch.empty(batch_size, device=device),
            "drop": torch.empty(batch_size, dtype=torch.bool, device=device),
        }
        draws["noise"].normal_(generator=noise)
        t = self.transport.sample_timesteps(batch_size, generator=times, device=device, lognorm=self._lognorm_at(step))
        draws["t"].copy_(t)
        torch.lt(torch.rand(batch_size, generator=drops, device=device), config.class_dropout_prob, out=draws["drop"])
        return draws

    def _lognorm_at(self, step: int) -> bool:
        return self.transport.use_lognorm and (self._lognorm_until is None or step <= self._lognorm_until)

    def train_step(
        self,
        networks: Mapping[str, Callable],
        batch: Tensors,
        draws: Tensors,
        step: int,
        backward: Callable[[str, torch.Tensor], None],
    ) -> Tensors:
        """Losses of one micro-batch ({"x" [b, C, H, W], "y" [b]} and its rows of the draws), one backward.

        Returns detached scalars: "loss", what is minimised, and its parts "mse" (the published curve) and, where the
        transport has one, "cos_loss".
        """
        y = batch["y"]
        if self.config.null_label is not None:
            y = y.masked_fill(draws["drop"], self.config.null_label)
        losses = self._losses(networks["model"], batch["x"], y, draws)
        backward("model", losses["loss"])
        return {name: value.detach() for name, value in losses.items()}

    @torch.no_grad()
    def validate(self, networks: Mapping[str, Callable], batch: Tensors, draws: Tensors) -> Tensors:
        """The same losses without gradients, every sample with its own label."""
        return self._losses(networks["model"], batch["x"], batch["y"], draws)

    def _losses(self, model: Callable, x: torch.Tensor, y: torch.Tensor, draws: Tensors) -> Tensors:
        per_sample = self.transport.training_losses(model, x, t=draws["t"], x0=draws["noise"], y=y)
        mse = per_sample["loss"].mean()
        if not self.transport.use_cosine_loss:
            return {"loss": mse, "mse": mse}
        cosine = per_sample["cos_loss"].mean()
        return {"loss": mse + cosine, "mse": mse, "cos_loss": cosine}

    def state_dict(self) -> dict:
        """How the latents were normalised, how many there are and, where known, the names of their classes: a
        checkpoint is of no use without."""
        state = {"latents": self.batches.statistics.to_json(), "num_images": len(self.batches)}
        return state if self.batches.classes is None else state | {"classes": list(self.batches.classes)}

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError where the checkpoint's latents are not this run's. Names of classes that only one of them
        has, such as latents or checkpoints from before names were kept, are no difference."""
        own = self.state_dict()
        if "classes" not in state:
            own.pop("classes", None)
        different = [f"{key}: {state.get(key)} there, {own[key]} here" for key in own if state.get(key) != own[key]]
        if different:
            found = "; ".join(different)
            raise ValueError(f"the checkpoint was trained on other latents than {self.batches.path}: {found}")


def check_latents(latents: LatentDataset, model: ModelConfig) -> None:
    """Raise ValueError, naming the folder, where latents are not of the shape that the model takes."""
    wanted = (model.in_channels, model.input_size, model.input_size)
    if latents.shape != wanted:
        raise ValueError(f"{latents.path} has latents of {latents.shape}; the model takes (C, H, W) = {wanted}")


def check_classes(training: LatentDataset, validation: LatentDataset) -> None:
    """Raise ValueError, naming both folders, where a label is another class in one than in the other."""
    theirs, ours = validation.classes, training.classes
    if theirs is not None and ours is not None and theirs != ours:
        label = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
        what = f"{len(ours)} and {len(theirs)} classes" if label is None else f"{ours[label]!r} and {theirs[label]!r}"
        where = "" if label is None else f" for label {label}"
        raise ValueError(f"{training.path} and {validation.path} are of other classes: {what}{where}")
