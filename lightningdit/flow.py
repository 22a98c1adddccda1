"""Flow-matching transport: paths between noise and data, conversions of predictions, timesteps, training losses.

t = 0 is noise, t = 1 is data, and on every path `x_t = alpha(t)·x1 + sigma(t)·x0`. Formulas as in SiT
(arXiv 2401.08740) with time reversed; logit-normal timesteps and the direction loss as in arXiv 2501.01423.
Samples and predictions are [B, ...] with one time per sample, t [B]; all arithmetic is in the dtype of its inputs.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from common.text import nearest
from lightningdit.config import DIFFUSION_FORMS, MEANFLOW_KEYS, LossWeight, PathType, Prediction, TransportConfig

V = TypeVar("V")


def choose(what: str, name: str, table: Mapping[str, V]) -> V:
    """`table[name]`; raises ValueError, which lists the names, where there is none."""
    if name not in table:
        raise ValueError(f"unknown {what} {name!r}{nearest(str(name), map(str, table))}; known: {', '.join(table)}")
    return table[name]


def unsqueeze_like(t: Tensor, x: Tensor) -> Tensor:
    """t [B] → [B, 1, ...] of x's number of axes, to broadcast against x [B, ...]."""
    return t.reshape(-1, *[1] * (x.dim() - 1))  # [B, 1, ...]


class LinearPath:
    """alpha = t, sigma = 1 - t."""

    def alpha(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, d alpha / dt) at times t of any shape."""
        return t, torch.ones_like(t)

    def sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(sigma, d sigma / dt) at times t of any shape."""
        return 1 - t, -torch.ones_like(t)

    def log_alpha_rate(self, t: Tensor) -> Tensor:
        """d log(alpha) / dt, in closed form where the quotient would lose digits."""
        return 1 / t

    def drift(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(f [B, ...], g [B, 1, ...]) of the forward process dx = f dt + sqrt(2 g) dw, run from data to noise."""
        t = unsqueeze_like(t, x)
        rate, (sigma, d_sigma) = self.log_alpha_rate(t), self.sigma(t)
        return -rate * x, rate * sigma**2 - sigma * d_sigma


class GVPPath(LinearPath):
    """alpha = sin(pi t / 2), sigma = cos(pi t / 2): variance preserving."""

    def alpha(self, t: Tensor) -> tuple[Tensor, Tensor]:
        angle = t * (math.pi / 2)
        return angle.sin(), math.pi / 2 * angle.cos()

    def sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        angle = t * (math.pi / 2)
        return angle.cos(), -math.pi / 2 * angle.sin()

    def log_alpha_rate(self, t: Tensor) -> Tensor:
        return math.pi / 2 / (t * (math.pi / 2)).tan()


class VPPath(LinearPath):
    """The variance-preserving diffusion of DDPM: the noise rate runs linearly from 20 (noise) to 0.1 (data)."""

    rate_min, rate_max = 0.1, 20.0

    def _log_alpha(self, t: Tensor) -> Tensor:
        span, u = self.rate_max - self.rate_min, 1 - t
        return -span / 4 * u**2 - self.rate_min / 2 * u

    def alpha(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha = self._log_alpha(t).exp()
        return alpha, alpha * self.log_alpha_rate(t)

    def sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        variance_lost = (2 * self._log_alpha(t)).exp()
        sigma = (1 - variance_lost).sqrt()
        return sigma, -variance_lost * self.log_alpha_rate(t) / sigma

    def log_alpha_rate(self, t: Tensor) -> Tensor:
        return (self.rate_min + (1 - t) * (self.rate_max - self.rate_min)) / 2

    def drift(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        rate = self.log_alpha_rate(unsqueeze_like(t, x))
        return -rate * x, rate


PATHS: dict[str, type[LinearPath]] = {"Linear": LinearPath, "GVP": GVPPath, "VP": VPPath}


def logit_normal(normal: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Timesteps in (0, 1) from standard normal numbers of the same shape: the sigmoid of mean + std·number."""
    return (normal if (mean, std) == (0, 1) else mean + std * normal).sigmoid()


class Transport:
    """A kind of flow matching: the path, what the network predicts, and the weight of its error.

    train_eps, sample_eps: distance of training and sampling times from 0 and 1 where `interval` needs one. None is
        1e-3, or 1e-5 on VP. The published code overwrites what it is given for a velocity model and leaves None unset
        elsewhere; here a value given is the value used.
    use_cosine_loss: `training_losses` also gives 1 - cos(prediction, velocity); velocity models only.
    use_lognorm: logit-normal timesteps instead of uniform ones, of normal numbers with `lognorm_mean`, `lognorm_std`.

    Raises ValueError on an unknown name and on combinations without a meaning.
    """

    def __init__(
        self,
        path: PathType = "Linear",
        prediction: Prediction = "velocity",
        loss_weight: LossWeight | None = None,
        train_eps: float | None = None,
        sample_eps: float | None = None,
        use_cosine_loss: bool = False,
        use_lognorm: bool = False,
        lognorm_mean: float = 0.0,
        lognorm_std: float = 1.0,
    ):
        # The section's checks are these checks: one list of names and combinations.
        config = TransportConfig(
            path_type=path,
            prediction=prediction,
            loss_weight=loss_weight,
            train_eps=train_eps,
            sample_eps=sample_eps,
            use_cosine_loss=use_cosine_loss,
            use_lognorm=use_lognorm,
            lognorm_mean=lognorm_mean,
            lognorm_std=lognorm_std,
        )
        default_eps = 1e-5 if path == "VP" else 1e-3
        self.path_name, self.path = path, PATHS[path]()
        self.prediction, self.loss_weight = prediction, loss_weight
        self.train_eps = default_eps if config.train_eps is None else config.train_eps
        self.sample_eps = default_eps if config.sample_eps is None else config.sample_eps
        self.use_cosine_loss, self.use_lognorm = use_cosine_loss, use_lognorm
        self.lognorm_mean, self.lognorm_std = config.lognorm_mean, config.lognorm_std

    @classmethod
    def from_config(cls, config: TransportConfig) -> "Transport":
        """The transport of a `transport` section, whatever its objective: path, prediction and times."""
        return Transport(**cls.arguments(config))

    @staticmethod
    def arguments(config: TransportConfig) -> dict[str, Any]:
        """Those of the constructor; `lognorm_until_step` is the training task's."""
        fields = config.model_dump(exclude={"path_type", "lognorm_until_step", "objective", *MEANFLOW_KEYS})
        return {"path": config.path_type, **fields}

    def interval(
        self, eps: float, *, sde: bool = False, form: str = "SBDM", last_step_size: float = 0.0
    ) -> tuple[float, float]:
        """(start, end) of the time axis, moved off 0 and 1 by `eps` only where a formula divides by zero there.

        VP has its singular end at t = 1. Linear and GVP need both ends for noise and score models, none for the
        ODE of a velocity model, and for the SDE the end (left to the last step where there is one), and the start
        under the SBDM form, whose diffusion is infinite at noise.
        """
        end = 1 - (last_step_size if sde and last_step_size else eps)
        if self.path_name == "VP":
            return 0.0, end
        if self.prediction == "velocity" and not sde:
            return 0.0, 1.0
        starts_late = self.prediction != "velocity" or form == "SBDM"
        return (eps if starts_late else 0.0), end

    def sample_timesteps(
        self,
        count: int,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        lognorm: bool | None = None,
    ) -> Tensor:
        """t [count] within the training interval, uniform or logit-normal (`lognorm`, by default `use_lognorm`)."""
        lognorm = self.use_lognorm if lognorm is None else lognorm
        draw = torch.randn if lognorm else torch.rand
        u = draw(count, generator=generator, device=device, dtype=dtype)  # [count]
        start, end = self.interval(self.train_eps)
        return start + (end - start) * (self._logit_normal(u) if lognorm else u)

    def timesteps_at(self, shares: Tensor) -> Tensor:
        """Quantiles of what `sample_timesteps` draws from: the times [B] below which these shares [B] in (0, 1) lie."""
        start, end = self.interval(self.train_eps)
        quantiles = self._logit_normal(torch.special.ndtri(shares)) if self.use_lognorm else shares
        return start + (end - start) * quantiles

    def _logit_normal(self, normal: Tensor) -> Tensor:
        return logit_normal(normal, self.lognorm_mean, self.lognorm_std)

    def interpolate(self, x0: Tensor, x1: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(x_t, v_t) [B, ...]: the point between noise x0 and data x1 at t, and its time derivative."""
        t = unsqueeze_like(t, x1)  # [B, 1, ...], as what follows of it
        (alpha, d_alpha), (sigma, d_sigma) = self.path.alpha(t), self.path.sigma(t)
        return alpha * x1 + sigma * x0, d_alpha * x1 + d_sigma * x0

    def score_from_velocity(self, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """∇ log p_t(x) of a path whose velocity at x is given."""
        return self.noise_from_velocity(velocity, x, t) / -self.path.sigma(unsqueeze_like(t, x))[0]

    def noise_from_velocity(self, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The noise x0 that `velocity` at x implies."""
        t = unsqueeze_like(t, x)
        (alpha, d_alpha), (sigma, d_sigma) = self.path.alpha(t), self.path.sigma(t)
        ratio = alpha / d_alpha
        return (ratio * velocity - x) / (ratio * d_sigma - sigma)

    def velocity_from_score(self, score: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The probability-flow velocity at x from ∇ log p_t(x)."""
        drift, diffusion = self.path.drift(x, t)
        return diffusion * score - drift

    def score(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """∇ log p_t(x) from what the network predicts."""
        if self.prediction == "velocity":
            return self.score_from_velocity(output, x, t)
        return output if self.prediction == "score" else output / -self.path.sigma(unsqueeze_like(t, x))[0]

    def velocity(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The probability-flow velocity at x from what the network predicts."""
        return output if self.prediction == "velocity" else self.velocity_from_score(self.score(output, x, t), x, t)

    def diffusion(self, x: Tensor, t: Tensor, form: str = "SBDM", norm: float = 1.0) -> Tensor:
        """g(t) [B, 1, ...] of the reverse SDE dx = (v + g·score) dt + sqrt(2 g) dw.

        Any non-negative g keeps the marginals (arXiv 2401.08740, table of forms). The published spelling
        'inccreasing-decreasing' is also taken.
        """
        form = "increasing-decreasing" if form == "inccreasing-decreasing" else form
        u = unsqueeze_like(t, x)  # [B, 1, ...]
        forms: dict[str, Callable[[], Tensor]] = {
            "constant": lambda: torch.full_like(u, norm),
            "SBDM": lambda: norm * self.path.drift(x, t)[1],
            "sigma": lambda: norm * self.path.sigma(u)[0],
            "linear": lambda: norm * (1 - u),
            "decreasing": lambda: (norm * (math.pi * u).cos() + 1) ** 2 / 4,
            "increasing-decreasing": lambda: norm * (math.pi * u).sin() ** 2,
        }
        assert tuple(forms) == DIFFUSION_FORMS
        return choose("diffusion form", form, forms)()

    def training_losses(
        self,
        model: Callable[..., Tensor],
        x1: Tensor,
        *,
        t: Tensor | None = None,
        x0: Tensor | None = None,
        generator: torch.Generator | None = None,
        **model_kwargs: Any,
    ) -> dict[str, Tensor]:
        """Per-sample losses of `model(x_t, t, **model_kwargs)` on data x1 [B, C, ...], as a dict of tensors.

        t [B] and noise x0 (as x1) are drawn from `generator` where they are not given. → {"loss": [B], "pred": the
        model's output} and, if use_cosine_loss, "cos_loss": [B]. "loss" is the mean squared error alone; the training
        objective is the sum of the two with weights 1 and 1 (arXiv 2501.01423).
        """
        if t is None:
            t = self.sample_timesteps(len(x1), generator=generator, device=x1.device, dtype=x1.dtype)
        if x0 is None:
            x0 = torch.randn(x1.shape, generator=generator, device=x1.device, dtype=x1.dtype)
        xt, velocity = self.interpolate(x0, x1, t)  # [B, C, ...] both
        pred = model(xt, t, **model_kwargs)  # [B, C, ...]
        if pred.shape != x1.shape:
            raise ValueError(f"the model returned {tuple(pred.shape)} for data of {tuple(x1.shape)}")
        losses = {"pred": pred, "loss": self._squared_error(pred, x0, velocity, xt, t)}
        if self.use_cosine_loss:
            losses["cos_loss"] = (1 - F.cosine_similarity(pred, velocity, dim=1)).flatten(1).mean(1)  # [B]
        return losses

    def _squared_error(self, pred: Tensor, x0: Tensor, velocity: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """Weighted squared error of the prediction, mean over all but the batch: [B]."""
        if self.prediction == "velocity":
            return (pred - velocity).square().flatten(1).mean(1)
        sigma = self.path.sigma(unsqueeze_like(t, xt))[0]  # [B, 1, ...]
        error = pred - x0 if self.prediction == "noise" else pred * sigma + x0
        squared = error.square()  # [B, ...]
        if self.loss_weight is not None:  # maximum likelihood or velocity (arXiv 2401.08740)
            diffusion = self.path.drift(xt, t)[1]  # [B, 1, ...]
            weight = (diffusion / sigma) ** 2 if self.loss_weight == "velocity" else diffusion / sigma**2
            squared = weight * squared
        return squared.flatten(1).mean(1)


def standard_normal_logp(z: Tensor) -> Tensor:
    """Log-density of z [B, ...] under N(0, I), per sample."""
    z = z.flatten(1)
    return -(z.square().sum(1) + z.shape[1] * math.log(2 * math.pi)) / 2
