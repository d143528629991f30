"""``gcg``: change tokens of a failed prefix one at a time, by gradient, until the answer behind it is likely.

The discrete counterpart of the latent revision, in the style of greedy coordinate gradient (arXiv 2307.15043): the same
gold gradient ``g = dNLL(answer | x, r, template) / dE[r]`` and the same vertex oracle, whose vertex at each position is
the substitution that the gradient finds best there. The most promising ones are scored exactly, with the rest of the
prefix kept as it is (teacher-forced), and the best is taken if it lowers the NLL.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from latentrevise import kernels
from latentrevise.config import at_least_one
from latentrevise.model.branches import Branch, score_branches
from latentrevise.model.compute import Compute
from latentrevise.revise.reviser import Reviser
from latentrevise.revise.revision import FailedRollout, ReviseConfig
from latentrevise.strategies.base import Proposal, Tools, Work, shares


@dataclass(frozen=True)
class GCGConfig:
    """steps: substitutions at most. candidates: substitutions scored exactly in a step, one a position at most."""

    steps: int = 4
    candidates: int = 32

    def __post_init__(self) -> None:
        at_least_one(self, "steps", "candidates")


@dataclass
class _Search:
    """One prefix under revision: its rollout as it is now, its NLL in nats (None: not known yet), what it cost."""

    rollout: FailedRollout
    nll: float | None
    compute: Compute
    improving: bool = True


@dataclass(frozen=True)
class GCG:
    """Revise the tokens of each chosen failed prefix; the samples are spread over the revised prefixes."""

    config: GCGConfig
    name: str = "gcg"
    uses_answer: bool = True
    backend: str = "auto"

    def propose(self, tools: Tools, work: Sequence[Work], samples: int) -> list[list[Proposal]]:
        began = time.perf_counter()
        pairs = [(item, cut) for item in work for cut in item.cuts]
        searches = [_Search(item.rollout(cut), None, Compute()) for item, cut in pairs]
        for _ in range(self.config.steps):
            self._step(tools, [s for s in searches if s.improving])
        seconds = (time.perf_counter() - began) / max(len(searches), 1)
        found = iter(searches)
        proposals = []
        for item in work:
            own = []
            for cut, n in zip(item.cuts, shares(samples, len(item.cuts)), strict=True):
                search = next(found)
                own.append(
                    Proposal(
                        n=n,
                        plain_ids=tuple(search.rollout.prefix_ids),
                        parent=cut.sample_id,
                        original_ids=cut.prefix_ids,
                        compute=replace(search.compute, seconds=seconds),
                    )
                )
            proposals.append(own)
        return proposals

    def _step(self, tools: Tools, searches: Sequence[_Search]) -> None:
        """One substitution in each prefix, where one helps."""
        if not searches:
            return
        reviser = Reviser(tools.policy, ReviseConfig.answer_only(token_budget=tools.token_budget))
        evaluations = reviser.value_and_grad([s.rollout for s in searches])
        trunks, branches, swaps = [], [], []
        for i, (search, evaluation) in enumerate(zip(searches, evaluations, strict=True)):
            rollout = search.rollout
            passed = reviser.tokens(rollout)
            search.compute += Compute(passed, passed)
            search.nll = evaluation.guide
            trunks.append((*rollout.prompt_ids, *rollout.prefix_ids))
            for t, token in self._substitutions(tools, evaluation.grad, rollout.prefix_ids):
                swaps.append((i, t, token))
                rest = (token, *rollout.prefix_ids[t + 1 :], *rollout.template_ids, *rollout.answer_ids)
                at = len(rollout.prompt_ids) + t
                branches.append(Branch(i, at, rest, scored_from=len(rest) - len(rollout.answer_ids)))
        scores = score_branches(tools.policy, trunks, branches, token_budget=tools.token_budget)
        best: dict[int, tuple[float, int, int]] = {}
        for (i, t, token), logprob, tokens in zip(swaps, scores.total.tolist(), scores.branch_tokens, strict=True):
            searches[i].compute += Compute(tokens)
            best[i] = min(best.get(i, (float("inf"), 0, 0)), (-logprob, t, token))
        for i, search in enumerate(searches):
            # The prompt is cached since mining; the prefix, once changed, is not.
            search.compute += Compute(max(scores.trunk_tokens[i] - len(search.rollout.prompt_ids), 0))
            nll, t, token = best.get(i, (float("inf"), 0, 0))
            search.improving = search.nll is not None and nll < search.nll
            if search.improving:
                ids = tuple(search.rollout.prefix_ids)
                search.rollout = replace(search.rollout, prefix_ids=(*ids[:t], token, *ids[t + 1 :]))

    def _substitutions(self, tools: Tools, gradient: torch.Tensor, prefix_ids: Sequence[int]) -> list[tuple[int, int]]:
        """(position, token): the oracle's vertex where it predicts the largest gains over the present token."""
        table, own = tools.policy.table, torch.tensor(prefix_ids, device=gradient.device)
        vertex, value = kernels.vertex_oracle(gradient, table, tools.policy.allowed)
        gain = (gradient * table[own].float()).sum(-1) - value
        order = gain.argsort(descending=True, stable=True)[: self.config.candidates].tolist()
        return [(t, int(vertex[t])) for t in order if vertex[t] != own[t]]
