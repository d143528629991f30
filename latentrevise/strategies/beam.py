"""``pivot-beam``: change several decisions of a failed rollout one after the other, each by the answer's probability.

The pivot, iterated. It needs partial credit: where one right decision alone shows nothing in the answer, it keeps
values of the first decision by chance, and with them the combinations it finds. Our own decision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from latentrevise.model.compute import Compute
from latentrevise.strategies.base import Tools
from latentrevise.strategies.candidates import Reader, target_values
from latentrevise.strategies.pair import Combination, Decisions, Pair


@dataclass(frozen=True)
class Beam(Pair):
    """One greedy continuation of each of the best combinations among those that a beam search reaches.

    Of each decision but the last the ``pair.beam`` values are kept that are best behind those kept before, what follows
    in the step being written greedily. Behind them every value of the last decision is a combination, scored as all
    are.
    """

    def _listed(self, tools: Tools, found: Sequence[Decisions]) -> list[list[Combination]]:
        reader = Reader(tools, found[0].item.template_ids, self.forks.banned)
        rows: list[list[tuple[int, ...]]] = [[()] for _ in found]
        for depth in range(self.config.decisions - 1):
            tried = [
                (i, row, token)
                for i, own in enumerate(found)
                if depth < len(own.values) - 1
                for row in rows[i]
                for token, _ in own.values[depth]
            ]
            branches = [(found[i].item, found[i].forced(row), found[i].positions[depth], v) for i, row, v in tried]
            scored: dict[int, list[tuple[float, tuple[int, ...]]]] = {}
            values = target_values(tools, reader, branches, self.forks.step_tokens)
            for (i, row, token), (value, compute) in zip(tried, values, strict=True):
                scored.setdefault(i, []).append((value, (*row, token)))
                found[i].compute += compute
            for i, own_scored in scored.items():
                # A stable sort: of equal values the more probable token.
                best = sorted(own_scored, key=lambda pair: pair[0], reverse=True)[: self.config.beam]
                rows[i] = [row for _, row in best]
                # What stands between this decision and the next is read behind each value that is kept.
                between = found[i].positions[depth + 1] - found[i].positions[depth]
                found[i].compute += Compute(forward=between * len(best))
        return [
            [(row, last) for row in own_rows for last, _ in own.values[-1]] if own.values else []
            for own_rows, own in zip(rows, found, strict=True)
        ]
