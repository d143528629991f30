"""The two-branch objective ``L(z) = alpha * NLL(answer | x, z, template) + beta * away(c | x, z)``.

Both branches are per-token functions of the log-probability, so one packed batch of hidden states and one call of
``linear_logprob`` give both (arXiv 2606.29938 names the two gradients; the bounded away forms are our own decision:
plain ascent on the NLL has no floor, and one hopeless token would drown the gold gradient).
"""

from __future__ import annotations

import torch
from torch import Tensor

from latentrevise.revise.revision import ReviseConfig

# Below this distance of p from 1, -log(1 - p) is flat: float32 cannot tell such a probability from 1.
_CERTAIN = 1e-6


def away_terms(logprobs: Tensor, config: ReviseConfig) -> Tensor:
    """The away loss of single tokens, ``[N] -> [N]``; it falls as their probability does."""
    if config.away == "unlikelihood":
        return -torch.log((-torch.expm1(logprobs)).clamp_min(_CERTAIN))
    return logprobs.clamp_min(-config.away_ceiling)


def branch_losses(
    logprobs: Tensor, rows: Tensor, is_gold: Tensor, count: int, config: ReviseConfig
) -> tuple[Tensor, Tensor]:
    """Mean gold NLL and mean away loss of each rollout.

    logprobs: float32 ``[N]``, the scored tokens of all rollouts; rows: int64 ``[N]``, the rollout of each; is_gold:
    bool ``[N]``, whether it is an answer token; count: ``B``. Returns two float32 ``[B]``; a rollout without a failed
    token has an away loss of 0.
    """
    gold = _mean_by_row(-logprobs[is_gold], rows[is_gold], count)
    away = _mean_by_row(away_terms(logprobs[~is_gold], config), rows[~is_gold], count)
    return gold, away


def _mean_by_row(values: Tensor, rows: Tensor, count: int) -> Tensor:
    total = torch.zeros(count, dtype=values.dtype, device=values.device).index_add(0, rows, values)
    number = torch.bincount(rows, minlength=count).clamp_min(1)
    return total / number
