"""``pivot-checked``: forks whose steps hold, the best of them by the answer, and from there step by step, checked.

``pivot-trie`` chooses by the answer alone: a fork behind a false step is as good as any. ``step-checked`` reads no
answer and begins each rollout anew. Here the step checker turns away forks that stand behind a false step or lead into
one, before they are scored, and false steps after them. Our own decision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

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
    values_behind,
)
from latentrevise.strategies.pivot import PivotConfig, candidates
from latentrevise.strategies.step_checked import Path, StepCheckedConfig, arrived, walk
from latentrevise.strategies.steps import holds, to_first_false


@dataclass(frozen=True)
class _Branch:
    """A fork with the greedy rest of its step. ids: from the start of the completion to the end of that step."""

    fork: Fork
    ids: tuple[int, ...]


@dataclass(frozen=True)
class PivotChecked:
    """A rollout a sample from the best branches, found and ranked as ``config``, that of ``pivot-trie``, says (with
    ``keep`` from so many); without a branch, from the question."""

    forks: ForkConfig
    config: PivotConfig
    steps: StepCheckedConfig
    step_checker: StepChecker
    name: str = "pivot-checked"
    uses_answer: bool = True
    backend: str = "none"

    def propose(self, tools: Tools, work: Sequence[Work], samples: int) -> list[list[Proposal]]:
        reader = Reader(tools, work[0].template_ids, self.forks.banned)
        branches, spent = self._branches(tools, reader, work)
        paths = []
        for own in self._ranked(tools, work, branches, spent):
            starts = [(branch.ids, continue_from(branch.fork, len(own))) for branch in own]
            best = starts[: self.config.keep or samples]
            paths.append([Path(j, *best[j % len(best)]) if best else Path(j) for j in range(samples)])
        walk(tools, reader, self.step_checker, self.steps.tries, self.name, list(zip(work, paths, strict=True)))
        return [arrived(own, samples, compute) for own, compute in zip(paths, spent, strict=True)]

    def _branches(
        self, tools: Tools, reader: Reader, work: Sequence[Work]
    ) -> tuple[list[list[_Branch]], list[Compute]]:
        """The branches whose steps up to their end are none that the checker calls false, one of each text; and what
        finding them took."""
        reach = to_first_false(tools, reader, self.step_checker)
        found = candidates(tools, reader, work, self.forks, self.config, reach)
        forks = [(i, fork) for i, own in enumerate(found) for fork in own.forks]
        stems = [(work[i], (*fork.prefix_ids, fork.token)) for i, fork in forks]
        kept: list[dict[str, _Branch]] = [{} for _ in work]
        spent = [own.compute for own in found]
        tails = completed(tools, reader, stems, self.forks.step_tokens)
        for (i, fork), (_, stem), (tail, written) in zip(forks, stems, tails, strict=True):
            branch = _Branch(fork, (*stem, *tail))
            text = decoded(tools.tokenizer, branch.ids).strip()
            new = text not in kept[i] and holds(tools, reader, self.step_checker, work[i], branch.ids, fork.at)
            # The forced token of a branch that is scored is charged with its score.
            spent[i] += Compute(forward=0 if new else 1, decoded=written)
            if new:
                kept[i][text] = branch
        return [list(own.values()) for own in kept], spent

    def _ranked(
        self, tools: Tools, work: Sequence[Work], branches: Sequence[Sequence[_Branch]], spent: list[Compute]
    ) -> list[list[_Branch]]:
        """The branches with the values of their forks, the best first; what that took is added to ``spent``."""
        flat = [(i, branch) for i, own in enumerate(branches) for branch in own]
        rows = [(work[i], b.fork.rollout.completion_ids, b.fork.at, b.ids[b.fork.at :]) for i, b in flat]
        ranked: list[list[_Branch]] = [[] for _ in work]
        for (i, branch), (value, compute) in zip(flat, values_behind(tools, rows), strict=True):
            spent[i] += compute
            ranked[i].append(replace(branch, fork=replace(branch.fork, value=value)))
        for own in ranked:
            own.sort(key=lambda branch: self.config.score(branch.fork), reverse=True)
        return ranked
