"""Flow matching: paths between noise and data, what a network predicts on them, and the training loss.

t = 0 is noise, t = 1 is data, and on every path `x_t = alpha(t)·x1 + sigma(t)·x0`. Formulas as in SiT
(arXiv 2401.08740) with time reversed; logit-normal timesteps and the direction loss as in arXiv 2501.01423.
Tensors are [B, ...] with one time per sample, t [B]; all arithmetic is in the dtype of its inputs.
"""

import math

import torch
import torch.nn.functional as F

from common.sections import nearest
from lightningdit.config import DIFFUSION_FORMS, TransportConfig


def choose(what: str, name, table):
    """`table[name]`, or a ValueError that lists the names."""
    if name not in table:
        raise ValueError(f"unknown {what} {name!r}{nearest(str(name), map(str, table))}; known: {', '.join(table)}")
    return table[name]


def unsqueeze_like(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """t [B] with as many trailing axes of size 1 as broadcasting against x [B, ...] takes."""
    return t.reshape(-1, *[1] * (x.dim() - 1))


class LinearPath:
    """alpha = t, sigma = 1 - t."""

    def alpha(self, t):
        """(alpha, d alpha / dt) at times t of any shape."""
        return t, torch.ones_like(t)

    def sigma(self, t):
        """(sigma, d sigma / dt) at times t of any shape."""
        return 1 - t, -torch.ones_like(t)

    def log_alpha_rate(self, t):
        """d log(alpha) / dt, in closed form where the quotient would lose digits."""
        return 1 / t

    def drift(self, x, t):
        """(f, g): the path's stochastic process runs by dx = f dt + sqrt(2 g) dw, seen from data to noise."""
        t = unsqueeze_like(t, x)
        rate, (sigma, d_sigma) = self.log_alpha_rate(t), self.sigma(t)
        return -rate * x, rate * sigma**2 - sigma * d_sigma


class GVPPath(LinearPath):
    """alpha = sin(pi t / 2), sigma = cos(pi t / 2): variance preserving."""

    def alpha(self, t):
        angle = t * (math.pi / 2)
        return angle.sin(), math.pi / 2 * angle.cos()

    def sigma(self, t):
        angle = t * (math.pi / 2)
        return angle.cos(), -math.pi / 2 * angle.sin()

    def log_alpha_rate(self, t):
        return math.pi / 2 / (t * (math.pi / 2)).tan()


class VPPath(LinearPath):
    """The variance-preserving diffusion of DDPM: the noise rate runs linearly from 20 (noise) to 0.1 (data)."""

    rate_min, rate_max = 0.1, 20.0

    def _log_alpha(self, t):
        span, u = self.rate_max - self.rate_min, 1 - t
        return -span / 4 * u**2 - self.rate_min / 2 * u

    def alpha(self, t):
        alpha = self._log_alpha(t).exp()
        return alpha, alpha * self.log_alpha_rate(t)

    def sigma(self, t):
        variance_lost = (2 * self._log_alpha(t)).exp()
        sigma = (1 - variance_lost).sqrt()
        return sigma, -variance_lost * self.log_alpha_rate(t) / sigma

    def log_alpha_rate(self, t):
        return (self.rate_min + (1 - t) * (self.rate_max - self.rate_min)) / 2

    def drift(self, x, t):
        rate = self.log_alpha_rate(unsqueeze_like(t, x))
        return -rate * x, rate


PATHS = {"Linear": LinearPath, "GVP": GVPPath, "VP": VPPath}


def logit_normal(normal: torch.Tensor) -> torch.Tensor:
    """Timesteps in (0, 1) from standard normal numbers: their sigmoid."""
    return normal.sigmoid()


class Transport:
    """One way of flow matching: a path, what the network predicts, and how its error counts.

    train_eps, sample_eps: how far training and sampling stay away from the ends of time where `interval` says that
        they must. None is 1e-3, or 1e-5 on VP. The published code overwrites what it is given for a velocity model
        and leaves None unset elsewhere; here a value given is the value used.
    use_cosine_loss: `training_losses` also gives 1 - cos(prediction, velocity); velocity models only.
    use_lognorm: logit-normal timesteps instead of uniform ones.

    Raises ValueError on an unknown name and on combinations without a meaning.
    """

    def __init__(
        self,
        path="Linear",
        prediction="velocity",
        loss_weight=None,
        train_eps=None,
        sample_eps=None,
        use_cosine_loss=False,
        use_lognorm=False,
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
        )
        default_eps = 1e-5 if path == "VP" else 1e-3
        self.path_name, self.path = path, PATHS[path]()
        self.prediction, self.loss_weight = prediction, loss_weight
        self.train_eps = default_eps if config.train_eps is None else config.train_eps
        self.sample_eps = default_eps if config.sample_eps is None else config.sample_eps
        self.use_cosine_loss, self.use_lognorm = use_cosine_loss, use_lognorm

    @classmethod
    def from_config(cls, config: TransportConfig) -> "Transport":
        """The transport of a `transport` section; `lognorm_until_step` is the training task's."""
        fields = config.model_dump(exclude={"path_type", "lognorm_until_step"})
        return cls(path=config.path_type, **fields)

    def interval(self, eps: float, *, sde: bool = False, form: str = "SBDM", last_step_size: float = 0.0):
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

    def sample_timesteps(self, count: int, *, generator=None, device=None, dtype=torch.float32, lognorm=None):
        """t [count] within the training interval, uniform or logit-normal (`lognorm`, by default `use_lognorm`)."""
        lognorm = self.use_lognorm if lognorm is None else lognorm
        draw = torch.randn if lognorm else torch.rand
        u = draw(count, generator=generator, device=device, dtype=dtype)
        start, end = self.interval(self.train_eps)
        return start + (end - start) * (logit_normal(u) if lognorm else u)

    def interpolate(self, x0, x1, t):
        """(x_t, v_t): the point between noise x0 and data x1 at t, and its time derivative."""
        t = unsqueeze_like(t, x1)
        (alpha, d_alpha), (sigma, d_sigma) = self.path.alpha(t), self.path.sigma(t)
        return alpha * x1 + sigma * x0, d_alpha * x1 + d_sigma * x0

    def score_from_velocity(self, velocity, x, t):
        """∇ log p_t(x) of a path whose velocity at x is given."""
        return self.noise_from_velocity(velocity, x, t) / -self.path.sigma(unsqueeze_like(t, x))[0]

    def noise_from_velocity(self, velocity, x, t):
        """The noise x0 that `velocity` at x implies."""
        t = unsqueeze_like(t, x)
        (alpha, d_alpha), (sigma, d_sigma) = self.path.alpha(t), self.path.sigma(t)
        ratio = alpha / d_alpha
        return (ratio * velocity - x) / (ratio * d_sigma - sigma)

    def velocity_from_score(self, score, x, t):
        """The probability-flow velocity at x from ∇ log p_t(x)."""
        drift, diffusion = self.path.drift(x, t)
        return diffusion * score - drift

    def score(self, output, x, t):
        """∇ log p_t(x) from what the network predicts."""
        if self.prediction == "velocity":
            return self.score_from_velocity(output, x, t)
        return output if self.prediction == "score" else output / -self.path.sigma(unsqueeze_like(t, x))[0]

    def velocity(self, output, x, t):
        """The probability-flow velocity at x from what the network predicts."""
        return output if self.prediction == "velocity" else self.velocity_from_score(self.score(output, x, t), x, t)

    def diffusion(self, x, t, form: str = "SBDM", norm: float = 1.0):
        """g(t) of the reverse SDE dx = (v + g·score) dt + sqrt(2 g) dw, broadcastable against x.

        Any non-negative g keeps the marginals (arXiv 2401.08740, table of forms). The published spelling
        'inccreasing-decreasing' is also taken.
        """
        form = "increasing-decreasing" if form == "inccreasing-decreasing" else form
        u = unsqueeze_like(t, x)
        forms = {
            "constant": lambda: torch.full_like(u, norm),
            "SBDM": lambda: norm * self.path.drift(x, t)[1],
            "sigma": lambda: norm * self.path.sigma(u)[0],
            "linear": lambda: norm * (1 - u),
            "decreasing": lambda: (norm * (math.pi * u).cos() + 1) ** 2 / 4,
            "increasing-decreasing": lambda: norm * (math.pi * u).sin() ** 2,
        }
        assert tuple(forms) == DIFFUSION_FORMS
        return choose("diffusion form", form, forms)()

    def training_losses(self, model, x1, *, t=None, x0=None, generator=None, **model_kwargs):
        """Per-sample losses of `model(x_t, t, **model_kwargs)` on data x1 [B, C, ...], as a dict of tensors.

        t [B] and noise x0 (as x1) are drawn from `generator` where they are not given. → {"loss": [B], "pred": the
        model's output} and, if use_cosine_loss, "cos_loss": [B]. "loss" is the mean squared error alone; the training
        objective is the sum of the two with weights 1 and 1 (arXiv 2501.01423).
        """
        if t is None:
            t = self.sample_timesteps(len(x1), generator=generator, device=x1.device, dtype=x1.dtype)
        if x0 is None:
            x0 = torch.randn(x1.shape, generator=generator, device=x1.device, dtype=x1.dtype)
        xt, velocity = self.interpolate(x0, x1, t)
        pred = model(xt, t, **model_kwargs)
        if pred.shape != x1.shape:
            raise ValueError(f"the model returned {tuple(pred.shape)} for data of {tuple(x1.shape)}")
        losses = {"pred": pred, "loss": self._squared_error(pred, x0, velocity, xt, t)}
        if self.use_cosine_loss:
            losses["cos_loss"] = (1 - F.cosine_similarity(pred, velocity, dim=1)).flatten(1).mean(1)
        return losses

    def _squared_error(self, pred, x0, velocity, xt, t):
        """Mean over all but the batch of the weighted squared error of what the network predicts."""
        if self.prediction == "velocity":
            return (pred - velocity).square().flatten(1).mean(1)
        sigma = self.path.sigma(unsqueeze_like(t, xt))[0]
        error = pred - x0 if self.prediction == "noise" else pred * sigma + x0
        return (self._weight(xt, t, sigma) * error.square()).flatten(1).mean(1)

    def _weight(self, xt, t, sigma):
        """Maximum-likelihood and velocity weights of the score-matching loss (arXiv 2401.08740)."""
        if self.loss_weight is None:
            return torch.ones_like(sigma)
        diffusion = self.path.drift(xt, t)[1]
        return (diffusion / sigma) ** 2 if self.loss_weight == "velocity" else diffusion / sigma**2


def standard_normal_logp(z: torch.Tensor) -> torch.Tensor:
    """Log-density of z [B, ...] under N(0, I), per sample."""
    z = z.flatten(1)
    return -(z.square().sum(1) + z.shape[1] * math.log(2 * math.pi)) / 2
