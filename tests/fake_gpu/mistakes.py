"""Mistakes for `tests.fake_gpu.step --plant`: each is a change that somebody might make, and that a check must see."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from kernels.backends import operators
from kernels.compile import recompute_policy
from lightningdit import embeddings, model
from lightningdit.flow import Transport


def atomic() -> None:
    """The label table's gradient as PyTorch makes it."""
    embeddings.LabelTable.forward = lambda self, y: F.embedding(y, self.weight)


def graph_break() -> None:
    """A block that the tracer has to leave."""
    forward = model.Block.forward

    def broken(self, *args):
        torch._dynamo.graph_break()
        return forward(self, *args)

    model.Block.forward = broken


def extra_pass() -> None:
    """Something more for every token, outside of the ops."""
    forward = model.SwiGLUMLP.forward
    model.SwiGLUMLP.forward = lambda self, x: forward(self, x) * 0.5


def copy_to_host() -> None:
    """A loss that the host looks at."""
    losses = Transport.training_losses

    def looked_at(self, *args, **kwargs):
        terms = losses(self, *args, **kwargs)
        terms["loss"].detach().cpu()
        return terms

    Transport.training_losses = looked_at


def saved_float32() -> None:
    """An activation that is widened before an op, which keeps its input."""

    def forward(self, x):
        gate_up = self.w12(x) + self.w12.bias
        return self.w3(self.ops.swiglu(gate_up.float()).to(x.dtype))

    model.SwiGLUMLP.forward = forward


def block_outputs_not_saved() -> None:
    """Activation checkpointing as the partitioner makes it of operators with several results."""
    recompute_policy.SaveBlockOutputs.__call__ = lambda self, graph: None


def no_lowerings() -> None:
    """Operators that Inductor meets without an entry in its table."""
    operators._register_lowering = lambda definition: None


MISTAKES: dict[str, Callable[[], None]] = {
    f.__name__: f
    for f in (atomic, graph_break, extra_pass, copy_to_host, saved_float32, block_outputs_not_saved, no_lowerings)
}
