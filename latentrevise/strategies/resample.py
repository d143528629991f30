"""The controls without an answer: sample again, from the prompt or from the plain failed prefix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from latentrevise.strategies.base import Proposal, Tools, Work, shares


@dataclass(frozen=True)
class Resample:
    """Fresh rollouts from the prompt. What any method must beat at equal compute."""

    name: str = "resample"
    uses_answer: bool = False
    backend: str = "none"

    def propose(self, tools: Tools, work: Sequence[Work], samples: int) -> list[list[Proposal]]:
        return [[Proposal(n=samples)] for _ in work]


@dataclass(frozen=True)
class ResamplePrefix:
    """Continue the failed prefixes as they are: what a revision changes, without the revision."""

    name: str = "resample-prefix"
    uses_answer: bool = False
    backend: str = "none"

    def propose(self, tools: Tools, work: Sequence[Work], samples: int) -> list[list[Proposal]]:
        return [
            [
                Proposal(n=n, plain_ids=cut.prefix_ids, parent=cut.sample_id, original_ids=cut.prefix_ids)
                for cut, n in zip(item.cuts, shares(samples, len(item.cuts)), strict=True)
            ]
            for item in work
        ]
