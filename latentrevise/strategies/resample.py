"""The controls without an answer: sample again, from the prompt or from the plain failed prefix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from latentrevise.strategies.base import Proposal, Tools, Work, recut, shares


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
    """Continue the failed prefixes as they are: what a revision changes, without the revision.

    rho: cut each rollout behind this share of its tokens; None: where the run cuts.
    """

    name: str = "resample-prefix"
    rho: float | None = None
    uses_answer: bool = False
    backend: str = "none"

    def propose(self, tools: Tools, work: Sequence[Work], samples: int) -> list[list[Proposal]]:
        proposals = []
        for item in work:
            cuts = item.cuts if self.rho is None else [recut(cut, self.rho) for cut in item.cuts]
            proposals.append(
                [
                    Proposal(n=n, plain_ids=cut.prefix_ids, parent=cut.sample_id, original_ids=cut.prefix_ids)
                    for cut, n in zip(cuts, shares(samples, len(cuts)), strict=True)
                ]
            )
        return proposals
