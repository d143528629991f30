"""``latent``: revise the embeddings of a failed prefix, then continue from it (arXiv 2606.29938).

One class serves the published method (full hull, continuation from the latent itself), the restricted form (plausible
hull, entropic, rounded to tokens) and the ablations: they differ in their ``ReviseConfig`` alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from latentrevise.reviser import Reviser
from latentrevise.revision import ReviseConfig
from latentrevise.strategies.base import Proposal, Tools, Work, shares


@dataclass(frozen=True)
class Latent:
    """Revise each chosen failed rollout once; the samples are spread over the revised prefixes."""

    name: str
    config: ReviseConfig
    uses_answer: bool = True

    @property
    def backend(self) -> str:
        return self.config.backend or "auto"

    def propose(self, tools: Tools, work: Sequence[Work], samples: int) -> list[list[Proposal]]:
        revisions = iter(
            Reviser(tools.policy, self.config).revise([item.rollout(cut) for item in work for cut in item.cuts])
        )
        latent = self.config.rounding == "none"
        proposals: list[list[Proposal]] = []
        for item in work:
            own = []
            for cut, n in zip(item.cuts, shares(samples, len(item.cuts)), strict=True):
                revision = next(revisions)
                own.append(
                    Proposal(
                        n=n,
                        plain_ids=tuple(revision.argmax_ids().tolist()),
                        mixture=revision.mixture,
                        latent=latent,
                        parent=cut.sample_id,
                        original_ids=cut.prefix_ids,
                        compute=revision.compute,
                        trace=revision.trace,
                    )
                )
            proposals.append(own)
        return proposals
