"""Average velocities: MeanFlow (arXiv 2505.13447, "MF") and its improved objective (arXiv 2512.02012, "iMF").

The average velocity over the times from t to r is u(x_t, t, r) = 1 / (r - t) · ∫ v(x_s, s) ds from t to r (MF eq. 3),
so that one evaluation goes all the way: x_r = x_t + (r - t)·u(x_t, t, r) (MF eq. 12). As in `lightningdit.flow`, t = 0
is noise and t = 1 is data, so r ≥ t is nearer to the data; the papers count the other way, and their signs differ.
Differentiating the definition along the path, dx/dt = v, gives the MeanFlow identity (MF eq. 6)

    u = v + (r - t) · du/dt,    du/dt = v·∂u/∂x + ∂u/∂t    (MF eq. 8)

whose right side, without gradients, is what u is trained towards (MF eq. 9 to 11). du/dt comes with u in one pass of
the network, by its tangents (v, 1) at (x, t). Samples whose two times are one have the target v and need no tangents.

The objectives differ in what stands for v in du/dt. MF takes the velocity of the pair of noise and data, guided where
guidance is asked for. iMF takes the network's own prediction u(x_t, t, t), its boundary condition, so that its compound
V = u - (r - t)·du/dt is a function of x_t alone and is regressed to v (iMF eq. 8 to 12).

Classifier-free guidance with scale w becomes part of what is learned (MF eq. 13 and 19, iMF eq. 13): with the network's
predictions v(y) and v(∅) for a label and the null label at r = t, without gradients, and the mix κ of MF's appendix,

    MF   w'·v + κ·v(y) + (1 - w' - κ)·v(∅),  w' = w·(1 - κ)
    iMF  v + (1 - 1 / w)·(v(y) - v(∅)), as its published code has it

stand for v at times in the interval of guidance, and v itself for samples whose label is dropped. For those, the
improved objective here takes v(∅) in du/dt, the prediction for the label that is given; the published code takes v(y).
The scale is one number of a run, not one of the conditions of the network as in iMF section 4.2.

Shapes: B samples, of which P have two times; latents [B, C, ...].
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels.forward_mode import Dual
from lightningdit.config import TransportConfig
from lightningdit.flow import Transport, unsqueeze_like

Model = Callable[..., Tensor | Dual]


class MeanFlow(Transport):
    """The transport of a section whose objective is "meanflow" or "improved_meanflow"."""

    def __init__(self, config: TransportConfig):
        if not config.time_pairs:
            raise ValueError(f"objective is {config.objective}; allowed here: meanflow, improved_meanflow")
        super().__init__(**self.arguments(config))
        self.section = config
        self._kept: dict[tuple[bool, ...], tuple[Tensor, Tensor, Tensor]] = {}

    def sample_time_pairs(
        self, count: int, *, generator: torch.Generator, device: torch.device | str, lognorm: bool | None = None
    ) -> tuple[Tensor, Tensor]:
        """(t, r) [count] each, t ≤ r: two draws of `sample_timesteps` in order (MF section 4.3)."""
        first, second = (
            self.sample_timesteps(count, generator=generator, device=device, lognorm=lognorm) for _ in range(2)
        )
        return torch.minimum(first, second), torch.maximum(first, second)

    def time_pairs_at(self, t_shares: Tensor, r_shares: Tensor) -> tuple[Tensor, Tensor]:
        """Quantiles of `sample_time_pairs` [B]: of t, and of r given that t, below which these shares [B] lie.

        With F the distribution of one draw, t is the smaller of two, 1 - (1 - F)² below it, and r a draw above t.
        """
        below = 1 - (1 - t_shares).sqrt()  # F(t) [B]
        return self.timesteps_at(below), self.timesteps_at(below + r_shares * (1 - below))

    def paired(self, count: int) -> list[bool]:
        """Which of `count` samples of a micro-batch have two times, by their place in it, spread evenly.

        As many in every micro-batch of that size, so that all processes call the network alike (ZeRO 3 gathers weights
        by all of them) and nothing is compiled twice: the share `1 - equal_times`, rounded, and one at least, but for a
        share of 0 or 1.
        """
        share = 1 - self.section.equal_times
        pairs = round(share * count)
        if 0 < share < 1:
            pairs = max(1, min(pairs, count - 1))
        equal = count - pairs
        return [(i + 1) * equal // count == i * equal // count for i in range(count)]

    def mean_losses(
        self,
        model: Model,
        x1: Tensor,
        *,
        t: Tensor,
        r: Tensor,
        x0: Tensor,
        y: Tensor,
        paired: Sequence[bool] | None = None,
        drop: Tensor | None = None,
        null_label: int | None = None,
    ) -> dict[str, Tensor]:
        """Per-sample losses of `model(x, t, y=labels, r=r)` on data x1 [B, C, ...] and noise x0, as a dict of tensors.

        Args:
            t, r: [B], the two times of each sample; r is read where `paired` (B bools of the host) says so, by default
                where the method of that name does.
            y: [B] labels. drop: [B] bool, which of them are replaced by `null_label`.

        Returns:
            "mse" [B], the mean square of Δ, the distance of u from its target; "loss" [B], what is minimised: the sum
            of squares ‖Δ‖² times (‖Δ‖² + c)^-p, a weight without gradient (MF section 4.3).

        Raises ValueError where guidance has no null label, or `paired` is not one for each sample.
        """
        paired = self.paired(len(x1)) if paired is None else paired
        if len(paired) != len(x1):
            raise ValueError(f"paired has {len(paired)} values for {len(x1)} samples")
        xt, velocity = self.interpolate(x0, x1, t)  # [B, C, ...] both
        given = y
        if drop is not None and null_label is not None:
            given = y.masked_fill(drop, null_label)
        else:
            drop = None
        target, predicted = self._guided(model, xt, velocity, t, y, drop, null_label)  # [B, C, ...] both
        pairs, single, order = self._places(tuple(paired), x1.device)  # [P], [B - P], [B]
        errors = []  # [P, C, ...], [B - P, C, ...]
        if len(pairs):
            x, times, ends, labels, wanted = (value[pairs] for value in (xt, t, r, given, target))
            tangent = wanted  # [P, C, ...]
            if self.section.objective == "improved_meanflow":
                tangent = self._prediction(model, x, times, labels) if predicted is None else predicted[pairs]
            u = model(Dual(x, tangent), Dual(times, torch.ones_like(times)), y=labels, r=ends)
            assert isinstance(u, Dual)
            errors.append(u.value - (wanted + unsqueeze_like(ends - times, x) * u.tangent).detach())
        if len(single):
            x, times, labels, wanted = (value[single] for value in (xt, t, given, target))
            instantaneous = model(x, times, y=labels, r=times)
            assert isinstance(instantaneous, Tensor)
            errors.append(instantaneous - wanted.detach())
        squared = torch.cat(errors)[order].square().flatten(1)  # [B, C · ...]
        total, section = squared.sum(1), self.section  # [B]
        weight = (total.detach() + section.adaptive_floor) ** -section.adaptive_power  # [B]
        return {"loss": weight * total, "mse": squared.mean(1)}

    def _places(self, paired: tuple[bool, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Numbers of the samples with two times, of the others, and the place of each sample among those, then these.

        Kept on the device, so that a step copies nothing there.
        """
        if paired not in self._kept or self._kept[paired][0].device != device:
            first, others = ([i for i, pair in enumerate(paired) if pair is which] for which in (True, False))
            places = {number: place for place, number in enumerate([*first, *others])}
            lists = first, others, [places[number] for number in range(len(paired))]
            pairs, single, order = (torch.tensor(numbers, dtype=torch.int64, device=device) for numbers in lists)
            self._kept[paired] = pairs, single, order
        return self._kept[paired]

    @torch.no_grad()
    def _prediction(self, model: Model, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The velocity that the network itself predicts at x, u(x, t, t)."""
        predicted = model(x, t, y=y, r=t)
        assert isinstance(predicted, Tensor)
        return predicted.to(x.dtype).clone()  # a CUDA graph gives its result at the same address every time

    def _guided(
        self,
        model: Model,
        xt: Tensor,
        velocity: Tensor,
        t: Tensor,
        y: Tensor,
        drop: Tensor | None,
        null_label: int | None,
    ) -> tuple[Tensor, Tensor | None]:
        """What stands for v in the target, and the predictions for the labels given, where those were computed."""
        section = self.section
        w, kappa = section.guidance_scale, section.guidance_mix
        if w == 1:
            return velocity, None
        if null_label is None:
            raise ValueError(f"guidance_scale {w:g} needs a null label; trained with class_dropout_prob 0, use 1")
        null, with_label = torch.full_like(y, null_label), section.objective == "improved_meanflow" or kappa > 0
        if with_label:
            doubled = torch.cat([xt, xt]), torch.cat([t, t]), torch.cat([y, null])
            cond, uncond = self._prediction(model, *doubled).chunk(2)  # [B, C, ...] both
        else:
            cond, uncond = velocity, self._prediction(model, xt, t, null)
        if section.objective == "improved_meanflow":
            guided = velocity + (1 - 1 / w) * (cond - uncond)
        else:
            inner = w * (1 - kappa)
            guided = inner * velocity + kappa * cond + (1 - inner - kappa) * uncond
        # Up to 1 the interval has no end: times are float32.
        end = math.inf if section.guidance_end >= 1 else section.guidance_end
        applies = (t >= section.guidance_start) & (t <= end)  # [B]
        if drop is not None:
            applies = applies & ~drop
        target = torch.where(unsqueeze_like(applies, velocity), guided, velocity)
        if not with_label:
            return target, None
        return target, cond if drop is None else torch.where(unsqueeze_like(drop, cond), uncond, cond)
