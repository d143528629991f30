"""What is continued: a zero-hit prompt, where its failed rollouts are cut, and what an engine is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from latentrevise.data.boundary import Boundary
from latentrevise.data.records import Prompt, Rollout, Start
from latentrevise.engines import Request
from latentrevise.model.policy import Policy
from latentrevise.revise.hull import Mixture
from latentrevise.strategies import Cut, Proposal, Work


@dataclass
class Case:
    """A zero-hit prompt with all that its arms share. ``wrong``: the audit's target; None where no other answer
    exists."""

    prompt: Prompt
    failed: tuple[Rollout, ...]
    cuts: tuple[Cut, ...]
    seed: int
    template_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    wrong: str | None = None
    wrong_ids: tuple[int, ...] = ()

    def work(self, wrong: bool) -> Work:
        target, ids = (self.wrong, self.wrong_ids) if wrong else (self.prompt.answer, self.answer_ids)
        assert target is not None  # arms with a wrong target are given only the cases that have one
        return Work(self.prompt, target, self.failed, self.cuts, ids, self.template_ids, self.seed)


def chosen_cuts(
    failed: Sequence[Rollout], count: int, fraction: float, boundary: Boundary | None, seed: int
) -> tuple[Cut, ...]:
    """``count`` of the failed rollouts, drawn by the seed, each cut near ``fraction`` of its length.

    The cut lies behind the nearest ``boundary`` where there is one; both sides keep a token.
    """
    order = torch.randperm(len(failed), generator=torch.Generator().manual_seed(seed)).tolist()
    # A rollout that came to an (incorrect) answer is the better anchor; the rest serves when there is none.
    ranked = sorted(order, key=lambda i: failed[i].extracted is None)
    cuts = []
    for rollout in (failed[i] for i in ranked[:count]):
        ids = rollout.completion_ids
        at = min(max(1, round(len(ids) * fraction)), len(ids) - 1)
        ends = [] if boundary is None else [end for end in boundary.ends(ids) if end < len(ids)]
        at = min(ends, key=lambda end: (abs(end - at), end), default=at)
        cuts.append(Cut(rollout.sample_id, ids[:at], ids[at:]))
    return tuple(cuts)


def request_of(
    policy: Policy, prompt_ids: Sequence[int], start: Start | Proposal, mixture: Mixture | None, seed: int
) -> Request:
    """What is fed to the engine for a start: tokens, or the prompt's embeddings and the mixture's behind them."""
    if not start.latent:
        return Request((*(start.context_ids or prompt_ids), *start.plain_ids), seed=seed)
    assert mixture is not None  # a latent start comes with its atoms
    device = policy.device
    with torch.no_grad():
        fixed = policy.embedding(torch.tensor(prompt_ids, device=device))
        revised = mixture.to(device).embed(policy.table)
    return Request(embeddings=torch.cat([fixed, revised]), seed=seed)
