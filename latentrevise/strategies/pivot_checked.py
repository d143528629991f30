"""``pivot-checked``: as ``branch-checked``, the forks whose steps hold ranked by the answer.

``pivot-trie`` chooses by the answer alone: a fork behind a false step is as good as any. Our own decision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from latentrevise.model.compute import Compute
from latentrevise.strategies.base import Tools, Work
from latentrevise.strategies.branch_checked import Branch, BranchChecked
from latentrevise.strategies.candidates import Reach, Reader, values_behind
from latentrevise.strategies.pivot import PivotConfig, candidates


@dataclass(frozen=True, kw_only=True)
class PivotChecked(BranchChecked):
    """A rollout a sample from the best branches, found and ranked as ``config``, that of ``pivot-trie``, says (with
    ``keep`` from so many); without a branch, from the question."""

    config: PivotConfig
    name: str = "pivot-checked"
    uses_answer: bool = True

    def branches(
        self, tools: Tools, reader: Reader, work: Sequence[Work], samples: int, reach: Reach
    ) -> list[tuple[list[Branch], Compute]]:
        found = candidates(tools, reader, work, self.forks, self.config, reach)
        every = self.held(tools, reader, work, found, self.forks.max_forks)
        flat = [(i, branch) for i, (own, _) in enumerate(every) for branch in own]
        rows = [(work[i], b.fork.rollout.completion_ids, b.fork.at, b.ids[b.fork.at :]) for i, b in flat]
        ranked, spent = [list[Branch]() for _ in work], [compute for _, compute in every]
        for (i, branch), (value, compute) in zip(flat, values_behind(tools, rows), strict=True):
            spent[i] += replace(compute, forward=compute.forward - 1)  # the forced token is charged with its step
            ranked[i].append(replace(branch, fork=replace(branch.fork, value=value)))
        for own in ranked:
            own.sort(key=lambda branch: self.config.score(branch.fork), reverse=True)
        best = [[replace(b, among=len(own)) for b in own[: self.config.keep or samples]] for own in ranked]
        return list(zip(best, spent, strict=True))
