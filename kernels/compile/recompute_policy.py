"""Activation checkpointing in compiled graphs whose blocks end in operators with several results.

`torch.utils.checkpoint` marks the operators that the backward pass is to compute again, and the partitioner of AOT
Autograd is to save what lies between one checkpointed block and the next. It marks such tensors, but then lets views
and the results of operators with several results be computed again all the same, because neither costs anything by
itself. If no block ends in anything else, nothing between blocks is saved: the backward pass computes the whole network
again before it begins, and needs the memory of a step without checkpointing.
"""

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.utils.checkpoint import CheckpointPolicy

BLOCK, POLICY = "ac_graph_id", "recompute"  # keys under which `torch.utils.checkpoint` marks nodes
RECOMPUTED = (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE)


class SaveBlockOutputs(CustomGraphPass):
    """Marks the operators whose results a later checkpointed block reads as saved, with all their results."""

    def __call__(self, graph: fx.Graph) -> None:
        for node in graph.nodes:
            if node.meta.get(POLICY) not in RECOMPUTED or is_free(node):
                continue
            if any(user.meta.get(BLOCK, -1) > node.meta[BLOCK] for user in users_through_views(node)):
                for saved in (node, *(user for user in node.users if user.target is operator.getitem)):
                    saved.meta[POLICY] = CheckpointPolicy.MUST_SAVE

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))


def users_through_views(node: fx.Node) -> Iterator[fx.Node]:
    """Users of the node and, through nodes that cost nothing, of what comes from it."""
    for user in node.users:
        yield user
        if is_free(user):
            yield from users_through_views(user)


def is_free(node: fx.Node) -> bool:
    """Whether the node only names one of several results, or another view of the same memory."""
    view = isinstance(node.target, torch._ops.OpOverload) and node.target.is_view
    return node.op == "call_function" and (node.target is operator.getitem or view)
