"""``branch-mass`` and ``branch-entropy``: leave the known failures by an untried token, without reading the answer.

The controls of everything that scores branches by the answer, and of use where a policy knows nothing of the answer
before it has derived it. Our own decision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from latentrevise.strategies.base import Proposal, Tools, Work
from latentrevise.strategies.candidates import (
    Fork,
    ForkConfig,
    Reader,
    charged,
    continue_from,
    find_forks,
    one_greedy_each,
)


@dataclass(frozen=True)
class Branching:
    """One greedy continuation of each of the first forks off the trie of all failed rollouts.

    order: by ``mass``, so that the most probable unseen rollouts come first, whatever their common prefix; or by the
    ``entropy`` of the policy where the fork leaves, the more probable token of one place first.
    """

    name: str
    forks: ForkConfig
    order: Literal["mass", "entropy"]
    uses_answer: bool = False
    backend: str = "none"

    def propose(self, tools: Tools, work: Sequence[Work], samples: int) -> list[list[Proposal]]:
        reader = Reader(tools, work[0].template_ids, self.forks.banned)
        proposals = []
        for own in find_forks(tools, reader, work, [item.failed for item in work], self.forks):
            best = sorted(own.forks, key=self._rank, reverse=True)
            ranked = [continue_from(fork, len(best)) for fork in best]
            proposals.append(charged(one_greedy_each(ranked, samples), samples, own.compute))
        return proposals

    def _rank(self, fork: Fork) -> tuple[float, float]:
        return (fork.mass if self.order == "mass" else fork.entropy), fork.logprob
