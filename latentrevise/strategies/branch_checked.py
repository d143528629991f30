"""``branch-checked``: the most probable unseen forks whose steps hold, and from there step by step, checked.

``branch-mass`` leaves the known failures where a policy would most probably have gone elsewhere, also behind a false
step; ``step-checked`` begins each rollout anew and so writes the probable false steps again. No gold answer is read.
Our own decision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from latentrevise.checkers.loading import StepChecker
from latentrevise.data.records import decoded
from latentrevise.model.compute import Compute
from latentrevise.strategies.base import Proposal, Tools, Work
from latentrevise.strategies.candidates import (
    Fork,
    ForkConfig,
    Forks,
    Reach,
    Reader,
    completed,
    continue_from,
    find_forks,
    most_probable,
)
from latentrevise.strategies.step_checked import Path, StepCheckedConfig, arrived, walk
from latentrevise.strategies.steps import holds, to_first_false


@dataclass(frozen=True)
class Branch:
    """A fork with the greedy rest of its step. ids: from the start of the completion to the end of that step; among:
    how many forks it was chosen from."""

    fork: Fork
    ids: tuple[int, ...]
    among: int


@dataclass(frozen=True, kw_only=True)
class BranchChecked:
    """A rollout a sample, each from another fork: the forks of the highest mass, not behind a false step, whose own
    step, completed greedily, is none; ``forks.max_forks`` are tried at most. With fewer than samples they are taken in
    turn; without any, rollouts begin at the question."""

    forks: ForkConfig
    steps: StepCheckedConfig
    step_checker: StepChecker
    name: str = "branch-checked"
    uses_answer: bool = False
    backend: str = "none"

    def propose(self, tools: Tools, work: Sequence[Work], samples: int) -> list[list[Proposal]]:
        reader = Reader(tools, work[0].template_ids, self.forks.banned)
        reach = to_first_false(tools, reader, self.step_checker)
        paths, spent = [], []
        with tools.engine.reusing():
            for branches, compute in self.branches(tools, reader, work, samples, reach):
                starts = [(branch.ids, continue_from(branch.fork, branch.among)) for branch in branches]
                paths.append([Path(j, *starts[j % len(starts)]) if starts else Path(j) for j in range(samples)])
                spent.append(compute)
            walk(tools, reader, self.step_checker, self.steps.tries, self.name, list(zip(work, paths, strict=True)))
        return [arrived(own, samples, compute) for own, compute in zip(paths, spent, strict=True)]

    def branches(
        self, tools: Tools, reader: Reader, work: Sequence[Work], samples: int, reach: Reach
    ) -> list[tuple[list[Branch], Compute]]:
        """What each piece of work goes on from, the best first, and what finding it took."""
        found = find_forks(tools, reader, work, [item.failed for item in work], self.forks, reach)
        for own in found:
            own.forks = most_probable(own.forks)[: self.forks.max_forks]
        return self.held(tools, reader, work, found, samples)

    def held(
        self, tools: Tools, reader: Reader, work: Sequence[Work], found: Sequence[Forks], most: int
    ) -> list[tuple[list[Branch], Compute]]:
        """The first ``most`` forks of each piece of work whose own step holds, of different text, and what they took
        with what finding the forks did. ``most`` are tried at a time: a few that are tried in vain cost less time than
        many calls for a few."""
        kept: list[dict[str, Branch]] = [{} for _ in work]
        left, spent = [iter(own.forks) for own in found], [own.compute for own in found]
        while tried := [(i, fork) for i, own in enumerate(kept) if len(own) < most for fork in islice(left[i], most)]:
            stems = [(work[i], (*fork.prefix_ids, fork.token)) for i, fork in tried]
            tails = completed(tools, reader, stems, self.forks.step_tokens)
            for (i, fork), (_, stem), (tail, written) in zip(tried, stems, tails, strict=True):
                spent[i] += Compute(forward=1, decoded=written)
                ids = (*stem, *tail)
                text = decoded(tools.tokenizer, ids).strip()
                new = len(kept[i]) < most and text not in kept[i]
                if new and holds(tools, reader, self.step_checker, work[i], ids, fork.at):
                    kept[i][text] = Branch(fork, ids, len(found[i].forks))
        return [(list(own.values()), compute) for own, compute in zip(kept, spent, strict=True)]
