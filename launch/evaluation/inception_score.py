"""The inception score of class scores (arXiv 1606.03498)."""

import math

import torch
from torch import Tensor

from launch.evaluation.moments import require_finite


def inception_score(logits: Tensor, split_size: int = 5000) -> float:
    """`exp(mean KL(p(y|x) || p(y)))` averaged over consecutive splits (arXiv 1606.03498) of `logits [N, classes]`."""
    require_finite("logits", logits)
    if len(logits) == 0:
        raise ValueError("an inception score needs at least one sample")
    scores = []
    for part in logits.double().split(split_size):
        log_p = part.log_softmax(1)
        log_marginal = log_p.logsumexp(0) - math.log(len(part))
        scores.append((log_p.exp() * (log_p - log_marginal)).sum(1).mean().exp())
    return float(torch.stack(scores).mean())
