"""The objective ``L(z) = w_e L_explore + w_g L_guide + w_f L_NLL`` (arXiv 2606.29938, 3.2 and 3.3).

    L_explore =  sum_t log p(c_t | q, z, c_<t)               the failed continuation is pushed away
    L_guide   = -sum_t log p(y_t | q, z, template, y_<t)     the gold answer is pulled near
    L_NLL     = -sum_t log p(r_t | q, z_<t)                  the original prefix stays likely: fluency

All three are signed sums of log-probs, so one packed batch of hidden states and one call of ``linear_logprob`` give
them. The last needs no pass of its own: the prefix's positions are there, and its first token is predicted by the
prompt's last hidden state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from latentrevise.model.packing import FAILED, GOLD, PREFIX, Suffix
from latentrevise.revise.revision import FailedRollout, ReviseConfig

# Below this distance of p from 1, -log(1 - p) is flat: float32 cannot tell such a probability from 1.
_CERTAIN = 1e-6


@dataclass(frozen=True)
class Terms:
    """The objective of each rollout and its terms, float32 ``[B]`` each; answer: the gold answer's summed NLL, which
    the stopping rule reads whatever the reduction."""

    loss: Tensor
    explore: Tensor
    guide: Tensor
    fluency: Tensor
    answer: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> Terms:
        """The same with each of its tensors changed."""
        return Terms(*(change(getattr(self, name)) for name in ("loss", "explore", "guide", "fluency", "answer")))

    def detach(self) -> Terms:
        return self.map(Tensor.detach)


def suffix(rollout: FailedRollout, config: ReviseConfig) -> Suffix:
    """What of a rollout goes through the model, and what is scored: terms of weight 0 are left out."""
    return Suffix(
        prefix=rollout.prefix_ids,
        failed=rollout.continuation_ids[: config.explore_tokens] if config.explore_weight > 0 else (),
        gold=(*rollout.template_ids, *rollout.answer_ids) if config.guide_weight > 0 else (),
        template=len(rollout.template_ids),
        score_prefix=config.fluency_weight > 0,
    )


def terms(logprobs: Tensor, rows: Tensor, kinds: Tensor, count: int, config: ReviseConfig) -> Terms:
    """The objective from the log-probs of all scored tokens.

    logprobs: float32 ``[N]``; rows: int64 ``[N]``, the rollout of each token; kinds: int64 ``[N]``, FAILED, GOLD or
    PREFIX; count: ``B``.
    """

    def total(values: Tensor, kind: int) -> Tensor:
        # Not by indexing with the mask: how many there are would have to come from the device first.
        return values.new_zeros(count).index_add(0, rows, torch.where(kinds == kind, values, 0.0))

    def reduced(sums: Tensor, kind: int) -> Tensor:
        if config.reduction == "sum":
            return sums
        return sums / total(torch.ones_like(logprobs), kind).clamp_min(1)

    pushed = logprobs
    if config.explore == "unlikelihood":
        pushed = -torch.log((-torch.expm1(logprobs)).clamp_min(_CERTAIN))
    answer = total(-logprobs, GOLD)
    explore, guide = reduced(total(pushed, FAILED), FAILED), reduced(answer, GOLD)
    fluency = reduced(total(-logprobs, PREFIX), PREFIX)
    loss = config.explore_weight * explore + config.guide_weight * guide + config.fluency_weight * fluency
    return Terms(loss, explore, guide, fluency, answer)
