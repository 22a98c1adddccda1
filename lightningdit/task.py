"""The training task of LightningDiT: network, latents, random draws, the training step of flow matching."""

import logging
from collections.abc import Callable, Collection, Mapping

import torch

from common.seeds import generator, torch_seed
from common.tensors import load_strict
from kernels.registry import Ops
from lightningdit.config import DataConfig, ModelConfig, TransportConfig, check_objective
from lightningdit.data import LatentDataset
from lightningdit.flow import Transport
from lightningdit.meanflow import MeanFlow
from lightningdit.model import LightningDiT
from lightningdit.watch import measured
from lightningdit.weights import read_weights

log = logging.getLogger(__name__)
Tensors = dict[str, torch.Tensor]

_INIT, _NOISE, _TIMES, _DROPS = range(1, 5)  # one stream of random numbers for each purpose
WATCHED_SAMPLES = 4  # of a micro-batch, that `measure` takes
GOLDEN = (5**0.5 - 1) / 2  # multiples of it, modulo 1, are spread evenly, however many (Niederreiter 1992, chapter 3)
PLASTIC = 1.324717957244746  # the root of x³ = x + 1
TIME_BUCKETS = 5  # equal parts of the time axis whose losses validation tells apart


class LightningDiTTask:
    """A network of `model`'s shape on `data`, trained by `transport`; every random number follows from `seed`.

    networks: {"model"}, float32 on the CPU, with initial weights from the seed alone. batches: the latents.
    validated: the networks that validation calls.

    Raises ValueError where the latents' shape or the number of classes does not fit the model.
    """

    validated = ("model",)

    def __init__(
        self,
        model: ModelConfig,
        transport: TransportConfig,
        data: DataConfig,
        ops: Ops,
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
        check_objective(transport, model)
        self.transport = MeanFlow(transport) if transport.time_pairs else Transport.from_config(transport)
        self._lognorm_until = transport.lognorm_until_step
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_seed(seed, _INIT))
            self.networks = {"model": LightningDiT(model, ops, residual_dtype, params_gathered)}

    def load_weights(self, path: str, which: str = "ema") -> None:
        """Replace the initial weights by those of an export or a published `.pt`; raises WeightsError on a mismatch.

        Of a file with several entries, `which` ("ema" or "model") is taken if it is there; the entry is logged. A
        network with `time_pairs` also takes those of one without: its second time then adds nothing yet.
        """
        tensors, taken = read_weights(path, which)
        second = second_time(self.networks["model"])
        if second and not second.keys() & tensors.keys():
            tensors = tensors | second
            log.info("%s has no weights of a second time (%s): they begin at zero", path, ", ".join(second))
        load_strict(self.networks["model"], tensors, path)
        log.info("starting from the %s weights of %s", taken, path)

    def to(self, device: torch.device) -> None:
        """Nothing to do: the task has no frozen networks, and the engine moves the trained one."""

    def compile(self, mode: str, deterministic: bool) -> None:
        """Nothing to do, for the same reason."""

    def draw(
        self,
        step: int,
        batch_size: int,
        device: torch.device | str,
        out: Tensors | None = None,
        *,
        seed: int | None = None,
    ) -> Tensors:
        """Noise [B, C, H, W], times [B] and label drops [B] (bool) of optimizer step `step` (from 1), B = batch_size.

        With an objective of average velocities also "r", the second times [B].

        A function of (seed, step) and the type of device, to be sliced by process and micro-batch. With `out`, the
        result of an earlier call of the same sizes, its tensors are overwritten and returned. seed: the task's where
        none is given.
        """
        config, seed = self.config, self._seed if seed is None else seed
        noise, times, drops = (generator(seed, step, salt, device=device) for salt in (_NOISE, _TIMES, _DROPS))
        shape = (batch_size, config.in_channels, config.input_size, config.input_size)
        draws = out or {
            "noise": torch.empty(shape, device=device),
            "t": torch.empty(batch_size, device=device),
            "drop": torch.empty(batch_size, dtype=torch.bool, device=device),
        }
        draws["noise"].normal_(generator=noise)
        lognorm = self.transport.use_lognorm and self.objective(step)
        if isinstance(self.transport, MeanFlow):
            t, r = self.transport.sample_time_pairs(batch_size, generator=times, device=device, lognorm=lognorm)
            draws["r"] = draws["r"].copy_(r) if "r" in draws else r
        else:
            t = self.transport.sample_timesteps(batch_size, generator=times, device=device, lognorm=lognorm)
        draws["t"].copy_(t)
        torch.lt(torch.rand(batch_size, generator=drops, device=device), config.class_dropout_prob, out=draws["drop"])
        return draws

    def objective(self, step: int) -> bool:
        """Whether times are drawn from the logit-normal distribution yet in a step, where the transport has it."""
        return self._lognorm_until is None or step <= self._lognorm_until

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
        transport has one, "cos_loss". Of average velocities, "mse" is the mean square before its adaptive weight.
        """
        losses = self._losses(networks["model"], batch["x"], batch["y"], draws)  # scalars
        backward("model", losses["loss"])
        return {name: value.detach() for name, value in losses.items()}

    def validation_draws(self, number: int, batch_size: int, device: torch.device | str) -> Tensors:
        """As `draw`, for the global batch `number` (from 0) of validation: times are quantiles of training's
        distribution, spread evenly over the samples, so that a mean has no noise of times and compares with training's.
        """
        draws = self.draw(-1 - number, batch_size, device)
        places = torch.arange(number * batch_size, (number + 1) * batch_size, dtype=torch.float64, device=device)
        if isinstance(self.transport, MeanFlow):
            # Two sequences that are spread evenly together, by powers of the plastic number (Roberts 2018).
            of_t, of_r = ((0.5 + places / PLASTIC**power) % 1 for power in (1, 2))  # [B] both
            t, r = self.transport.time_pairs_at(of_t, of_r)
            draws["r"].copy_(r)
        else:
            t = self.transport.timesteps_at((0.5 + GOLDEN * places) % 1)
        draws["t"].copy_(t)
        return draws

    @torch.no_grad()
    def validate(self, networks: Mapping[str, Callable], batch: Tensors, draws: Tensors) -> Tensors:
        """The losses of `train_step` without gradients and without label drops, and `loss_t0.1`, `loss_t0.3` …: the
        loss [b] of the samples whose time is in the fifth of (0, 1) around 0.1 …, NaN for the others."""
        per_sample = self._sample_losses(networks["model"], batch["x"], batch["y"], undropped(draws))
        bucket = (draws["t"] * TIME_BUCKETS).long().clamp(max=TIME_BUCKETS - 1)  # [b]
        parts = [values for name, values in per_sample.items() if name != "loss"]
        total = torch.stack(parts).sum(0)  # [b]
        by_time = {
            f"loss_t{(i + 0.5) / TIME_BUCKETS:.1f}": total.masked_fill(bucket != i, torch.nan)
            for i in range(TIME_BUCKETS)
        }
        return _means(per_sample) | by_time

    def _losses(self, model: Callable, x: torch.Tensor, y: torch.Tensor, draws: Tensors) -> Tensors:
        return _means(self._sample_losses(model, x, y, draws))

    def _sample_losses(self, model: Callable, x: torch.Tensor, y: torch.Tensor, draws: Tensors) -> Tensors:
        """The parts of the loss of each sample, [b]; "loss" too where it is not their sum."""
        null_label = self.config.null_label
        if isinstance(self.transport, MeanFlow):
            return self.transport.mean_losses(
                model,
                x,
                t=draws["t"],
                r=draws["r"],
                x0=draws["noise"],
                y=y,
                drop=draws["drop"],
                null_label=null_label,
            )
        if null_label is not None:
            y = y.masked_fill(draws["drop"], null_label)
        found = self.transport.training_losses(model, x, t=draws["t"], x0=draws["noise"], y=y)
        return {"mse": found["loss"]} | ({"cos_loss": found["cos_loss"]} if self.transport.use_cosine_loss else {})

    @torch.no_grad()
    def measure(
        self, names: Collection[str], networks: Mapping[str, Callable], batch: Tensors, draws: Tensors
    ) -> Tensors:
        """Figures of `lightningdit.watch` that have these names, over the first samples of a micro-batch."""
        x, y = batch["x"][:WATCHED_SAMPLES], batch["y"][:WATCHED_SAMPLES]
        with measured(self.networks["model"], names) as found:
            some = {name: value[:WATCHED_SAMPLES] for name, value in draws.items()}
            self._losses(networks["model"], x, y, undropped(some))
        return found

    def state_dict(self) -> dict:
        """Statistics and number of the latents and, where known, the names of their classes, as JSON."""
        state = {"latents": self.batches.statistics.to_json(), "num_images": len(self.batches)}
        return state if self.batches.classes is None else state | {"classes": list(self.batches.classes)}

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError where the checkpoint was trained on other latents than this run's.

        Class names are compared where both have them: published latents and older checkpoints have none.
        """
        present = self.state_dict()
        if "classes" not in state:
            present.pop("classes", None)
        different = [f"{k}: {state.get(k)} there, {present[k]} here" for k in present if state.get(k) != present[k]]
        if different:
            found = "; ".join(different)
            raise ValueError(f"the checkpoint was trained on other latents than {self.batches.path}: {found}")


def undropped(draws: Tensors) -> Tensors:
    """The draws without label drops."""
    return draws | {"drop": torch.zeros_like(draws["drop"])}


def _means(per_sample: Tensors) -> Tensors:
    """The loss, the sum of its parts where it is not one itself, and these, each the mean over the samples."""
    parts = {name: values.mean() for name, values in per_sample.items()}
    return {"loss": parts["mse"] + parts["cos_loss"] if "cos_loss" in parts else parts["mse"], **parts}


def second_time(network: LightningDiT) -> Tensors:
    """The weights of the embedder of the second time, by their keys; none without it."""
    return {name: value for name, value in network.state_dict().items() if name.startswith("r_embedder.")}


def check_latents(latents: LatentDataset, model: ModelConfig) -> None:
    """Raise ValueError, naming the folder, where latents are not of the shape that the model takes."""
    expected = (model.in_channels, model.input_size, model.input_size)
    if latents.shape != expected:
        raise ValueError(f"{latents.path} has latents of {latents.shape}; the model takes (C, H, W) = {expected}")


def check_classes(training: LatentDataset, validation: LatentDataset) -> None:
    """Raise ValueError, naming both folders, where a label stands for different classes in them."""
    a, b = training.classes, validation.classes
    if a is not None and b is not None and a != b:
        label = next((i for i, (name_a, name_b) in enumerate(zip(a, b, strict=False)) if name_a != name_b), None)
        found = (
            f"{len(a)} and {len(b)} classes" if label is None else f"{a[label]!r} and {b[label]!r} for label {label}"
        )
        raise ValueError(f"{training.path} and {validation.path} are of other classes: {found}")
