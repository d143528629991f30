"""``branch-mass``, ``branch-entropy``, ``resample-new``: leave the known failures by an untried token, answer unread.

The controls of everything that scores branches by the answer, and of use where a policy knows nothing of the answer
before it has derived it. Our own decision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from latentrevise.data.records import row_seed
from latentrevise.strategies.base import Proposal, Tools, Work
from latentrevise.strategies.candidates import (
    Fork,
    ForkConfig,
    Reader,
    charged,
    continue_from,
    find_forks,
    most_probable,
    one_greedy_each,
    spread,
)


@dataclass(frozen=True)
class Branching:
    """Continue the first forks off the trie of all failed rollouts.

    order: by ``mass``, so that the most probable unseen rollouts come first, whatever their common prefix; by the
    ``entropy`` of the policy where the fork leaves, the more probable token of one place first; both with one greedy
    continuation each. ``draw``: sampling without replacement, as a fresh rollout would, were it never to repeat a known
    one: forks are drawn in proportion to their mass, no fork twice (Gumbel top-k, arXiv 1903.06059), and what follows
    is sampled.
    """

    name: str
    forks: ForkConfig
    order: Literal["mass", "entropy", "draw"]
    uses_answer: bool = False
    backend: str = "none"

    def propose(self, tools: Tools, work: Sequence[Work], samples: int) -> list[list[Proposal]]:
        reader = Reader(tools, work[0].template_ids, self.forks.banned)
        proposals = []
        found = find_forks(tools, reader, work, [item.failed for item in work], self.forks)
        for item, own in zip(work, found, strict=True):
            ranked = [continue_from(fork, len(own.forks)) for fork in self._ranked(own.forks, item.seed)]
            drawn = self.order == "draw"
            made = spread(ranked[:samples], samples) if drawn else one_greedy_each(ranked, samples)
            proposals.append(charged(made, samples, own.compute))
        return proposals

    def _ranked(self, forks: Sequence[Fork], seed: int) -> list[Fork]:
        if self.order == "draw":
            # The k largest of (log-mass + Gumbel noise) are k draws without replacement.
            uniform = torch.rand(len(forks), generator=torch.Generator().manual_seed(row_seed(seed, self.name)))
            keys = torch.tensor([fork.mass for fork in forks]) - (-uniform.clamp_min(1e-30).log()).log()
            return [forks[i] for i in keys.argsort(descending=True).tolist()]
        if self.order == "mass":
            return most_probable(forks)
        return sorted(forks, key=lambda fork: (fork.entropy, fork.logprob), reverse=True)
