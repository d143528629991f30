"""``branch-checked``: the most probable unseen forks whose steps hold, and from there step by step, checked.

``branch-mass`` leaves the known failures where a policy would most probably have gone elsewhere, also behind a false
step; ``step-checked`` begins each rollout anew and so writes the probable false steps again. No gold answer is read.
Our own decision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from latentrevise.checkers.loading import StepChecker
from latentrevise.data.records import decoded
from latentrevise.model.compute import Compute
from latentrevise.strategies.base import Proposal, Tools, Work
from latentrevise.strategies.candidates import (
    Fork,
    ForkConfig,
    Reader,
    completed,
    continue_from,
    find_forks,
    most_probable,
)
from latentrevise.strategies.step_checked import Path, StepCheckedConfig, arrived, walk
from latentrevise.strategies.steps import holds, to_first_false


@dataclass(frozen=True)
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
        found = find_forks(tools, reader, work, [item.failed for item in work], self.forks, reach)
        spent = [own.compute for own in found]
        ranked = [most_probable(own.forks)[: self.forks.max_forks] for own in found]
        paths = []
        for own, forks in zip(self._held(tools, reader, work, ranked, samples, spent), found, strict=True):
            starts = [(ids, continue_from(fork, len(forks.forks))) for fork, ids in own]
            paths.append([Path(j, *starts[j % len(starts)]) if starts else Path(j) for j in range(samples)])
        walk(tools, reader, self.step_checker, self.steps.tries, self.name, list(zip(work, paths, strict=True)))
        return [arrived(own, samples, compute) for own, compute in zip(paths, spent, strict=True)]

    def _held(
        self,
        tools: Tools,
        reader: Reader,
        work: Sequence[Work],
        ranked: Sequence[Sequence[Fork]],
        samples: int,
        spent: list[Compute],
    ) -> list[list[tuple[Fork, tuple[int, ...]]]]:
        """The first forks whose steps hold, ``samples`` of different text, and the ids up to the end of the step. No
        more are tried at a time than are still lacking; what that took is added to ``spent``."""
        held: list[dict[str, tuple[Fork, tuple[int, ...]]]] = [{} for _ in work]
        left = [iter(forks) for forks in ranked]
        while tried := [
            (i, fork) for i, own in enumerate(held) for _, fork in zip(range(samples - len(own)), left[i], strict=False)
        ]:
            stems = [(work[i], (*fork.prefix_ids, fork.token)) for i, fork in tried]
            tails = completed(tools, reader, stems, self.forks.step_tokens)
            for (i, fork), (_, stem), (tail, written) in zip(tried, stems, tails, strict=True):
                spent[i] += Compute(forward=1, decoded=written)
                ids = (*stem, *tail)
                text = decoded(tools.tokenizer, ids).strip()
                if text not in held[i] and holds(tools, reader, self.step_checker, work[i], ids, fork.at):
                    held[i][text] = fork, ids
        return [list(own.values()) for own in held]
