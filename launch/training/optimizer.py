"""AdamW whose exponential moving average of the weights is one more optimizer state.

The optimizer works on the tensors it is given: the parameters themselves (ZeRO 0) or the flat float32 partitions
that DeepSpeed puts in their place (ZeRO 1 to 3). The moving average is thus sharded, saved and resumed with the master
weights, and no second model exists on any device. A bfloat16 tensor gets its float32 master weights as one more state,
and is itself written by the pass that updates them. Norm, clip factor and skip flag never leave the device.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist

from kernels import select
from kernels.registry import Ops
from launch.training.block_norms import BlockNorms

STATE_KEYS = ("exp_avg", "exp_avg_sq", "ema")
COUNTERS = ("applied", "skipped", "skipped_in_a_row", "most_skipped_in_a_row")
_REFERENCE = select("reference")
DRIFT_ELEMENTS = 2**24  # that `ema_drift` reads at once: its copies take 64 MiB
MASTER = "master"  # the state of a bfloat16 tensor that holds its float32 weights


class NonFiniteError(RuntimeError):
    """Too many steps in a row, or all steps of a run, had a non-finite loss or gradient."""


class AdamWEma(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) and EMA through `ops.adamw_ema_`; a non-finite step is skipped.

    Where DeepSpeed keeps partitions in the host's memory and the parameters are on a GPU, the op's definition updates
    them there, whatever backend was chosen, and norm, clip factor and skip flag are copied to the host.

    Args:
        params: parameters to optimize; DeepSpeed may replace them by flat partitions, float32 or bfloat16.
        ops: the bundle whose `adamw_ema_` does the update.
        lr, betas, eps, weight_decay: AdamW's own; weight decay is decoupled.
        ema_decay: `ema ← decay·ema + (1 − decay)·param` after every applied step; the average starts as the weights.
        max_grad_norm: clip the global gradient norm to this; 0 leaves gradients as they are.
        partitioned: whether each process holds a part of the gradients, so that norms add up over processes.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        ops: Ops,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        ema_decay: float,
        max_grad_norm: float,
        partitioned: bool,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        device = self._device = self.param_groups[0]["params"][0].device
        self._ops = ops
        self._ema_decay = ema_decay
        self._max_grad_norm = max_grad_norm
        self._partitioned = partitioned
        self._initialized = False
        self._lr = torch.tensor(lr, dtype=torch.float32, device=device)
        self._nonfinite_losses = torch.zeros((), device=device)
        # Counters for logs and checkpoints, kept on the device until they are read.
        self.counters = {name: torch.zeros((), device=device) for name in COUNTERS}
        self.grad_norm = torch.zeros((), device=device)
        # Gradient norms by block, float32 [blocks], of the last step that `measure_blocks` was on in.
        self.blocks: BlockNorms | None = None
        self.measure_blocks = False
        self.block_norms: torch.Tensor | None = None
        # bool [2] of the last step: skipped (on every process); a loss of this process was not finite.
        self.skip_flags = torch.zeros(2, dtype=torch.bool, device=device)

    def init_states(self, partitions: Iterable[torch.Tensor] = ()) -> None:
        """Create the states and start counting: calls of `step` before this one (DeepSpeed's set-up) change nothing.

        `partitions` are master tensors that DeepSpeed hands over at `step` only (ZeRO 3).
        """
        self._create_states(*partitions)
        self._initialized = True

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the coming step."""
        self._lr.fill_(lr)

    def read_counters(self) -> dict[str, float]:
        """Steps applied, skipped, skipped in a row at last, and at most since `reset_most_skipped`; one copy."""
        return dict(zip(self.counters, torch.stack(list(self.counters.values())).tolist(), strict=True))

    def set_counters(self, values: dict[str, float]) -> None:
        """Set what `read_counters` gave; older checkpoints lack the most in a row."""
        for name, counter in self.counters.items():
            counter.fill_({"most_skipped_in_a_row": 0.0, **values}[name])

    def reset_most_skipped(self) -> None:
        """Look for the most steps skipped in a row from now on; a row of them that still goes on counts whole."""
        self.counters["most_skipped_in_a_row"].zero_()

    def check_loss(self, loss: torch.Tensor) -> None:
        """Skip the coming step if this loss (a detached scalar) is not finite."""
        self._nonfinite_losses += (~torch.isfinite(loss)).float()

    def count_skipped(self) -> None:
        """Count a step that the caller has skipped on its own."""
        self.grad_norm = torch.full_like(self.grad_norm, torch.inf)
        self._count(torch.ones_like(self.grad_norm, dtype=torch.bool))

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Apply one update, or none at all if the gradients or a watched loss are not finite."""
        assert closure is None
        self._create_states()
        if not self._initialized:
            return
        self.grad_norm = self._global_norm()
        if self.measure_blocks and self.blocks is not None:
            grads = [p.grad for group in self.param_groups for p in group["params"]]
            self.block_norms = self.blocks.measure(grads, self._device)
        skip = ~torch.isfinite(self.grad_norm)
        scale = torch.ones_like(self.grad_norm)
        if self._max_grad_norm > 0:
            scale = (self._max_grad_norm / (self.grad_norm + 1e-6)).clamp(max=1.0)
        self._count(skip)
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group, scale, skip)

    @torch.no_grad()
    def ema_drift(self) -> torch.Tensor:
        """‖ema − weights‖ / ‖weights‖ of the float32 weights, a scalar on the device; every process must call it."""
        squares = torch.zeros(2, device=self._device)
        for param, state in self.state.items():
            weights, ema = state.get(MASTER, param).detach().view(-1), state["ema"].view(-1)
            for first in range(0, weights.numel(), DRIFT_ELEMENTS):
                w, e = (x[first : first + DRIFT_ELEMENTS] for x in (weights, ema))
                squares += torch.stack([(e - w).norm(), w.norm()]).square().to(self._device)
        if self._partitioned and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(squares)
        return (squares[0] / squares[1]).sqrt()

    def _update(self, param: torch.Tensor, group: dict, scale: torch.Tensor, skip: torch.Tensor) -> None:
        state = self.state[param]
        weights, copy = (state[MASTER], param) if MASTER in state else (param, None)
        ops = self._ops if weights.device == self._device else _REFERENCE
        step, lr, scale, skip = (x.to(weights.device) for x in (self.counters["applied"], self._lr, scale, skip))
        ops.adamw_ema_(
            weights.data.view(-1),
            param.grad.contiguous().view(-1),
            *(state[key].view(-1) for key in STATE_KEYS),
            step=step,
            lr=lr,
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            ema_decay=self._ema_decay,
            grad_scale=scale,
            skip=skip,
            bf16_param=None if copy is None else copy.data.view(-1),
        )

    def _global_norm(self) -> torch.Tensor:
        """Gradient norm over all processes; infinite where a watched loss is not finite."""
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms = torch._foreach_norm(grads, 2, dtype=torch.float32)
        squares = torch.stack(norms).square().sum().to(self._device)
        # A bad loss counts as an infinite norm, so that one all-reduce tells every process of both.
        total = torch.where(self._nonfinite_losses > 0, torch.full_like(squares, torch.inf), squares)
        if dist.is_initialized() and dist.get_world_size() > 1:
            if not self._partitioned and dist.get_rank() > 0:
                # Every process holds the same gradients: one contributes them, the others only their bad losses.
                total = torch.where(self._nonfinite_losses > 0, total, torch.zeros_like(total))
            dist.all_reduce(total)
        return total.sqrt()

    def _count(self, skip: torch.Tensor) -> None:
        self.skip_flags = torch.stack([skip, self._nonfinite_losses > 0])
        self._nonfinite_losses.zero_()
        skipped = skip.float()
        self.counters["applied"] += 1 - skipped
        self.counters["skipped"] += skipped
        in_a_row, most = self.counters["skipped_in_a_row"], self.counters["most_skipped_in_a_row"]
        in_a_row.add_(1).mul_(skipped)
        torch.maximum(most, in_a_row, out=most)

    def _create_states(self, *partitions: torch.Tensor) -> None:
        for param in (*partitions, *(p for group in self.param_groups for p in group["params"])):
            state = self.state[param]
            if not state:
                weights = param.detach()
                if param.dtype == torch.bfloat16:
                    weights = state[MASTER] = weights.float()
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weights), torch.zeros_like(weights)
                state["ema"] = weights.clone()
