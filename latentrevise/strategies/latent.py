"""``latent``: revise the embeddings of a failed prefix, then continue from it (arXiv 2606.29938).

One class serves the published method (full hull, continuation from the latent itself), the restricted form (plausible
hull, entropic, rounded to tokens) and the ablations: they differ in their ``ReviseConfig`` and their window alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from latentrevise.reviser import Reviser
from latentrevise.revision import Compute, ReviseConfig
from latentrevise.strategies.base import Cut, Proposal, Tools, Work, shares
from latentrevise.strategies.candidates import ForkConfig, Reader, read, room

Window = Literal["prefix", "entropy"]


@dataclass(frozen=True)
class Latent:
    """Revise each chosen failed rollout once; the samples are spread over the revised prefixes.

    window: what is revised: ``prefix``, the run's cut of the rollout; ``entropy``, the step in which the policy is
    least sure of a token, with all before it kept as it was (our own decision). forks: how long a step may be, and
    where the reasoning ends.
    """

    name: str
    config: ReviseConfig
    uses_answer: bool = True
    window: Window = "prefix"
    forks: ForkConfig = field(default_factory=ForkConfig)

    @property
    def backend(self) -> str:
        return self.config.backend or "auto"

    def propose(self, tools: Tools, work: Sequence[Work], samples: int) -> list[list[Proposal]]:
        pairs = [(item, cut) for item in work for cut in item.cuts]
        windows = [((), cut, Compute()) for _, cut in pairs] if self.window == "prefix" else self._windows(tools, pairs)
        rollouts = [item.rollout(cut, kept) for (item, _), (kept, cut, _) in zip(pairs, windows, strict=True)]
        found = zip(windows, Reviser(tools.policy, self.config).revise(rollouts), strict=True)
        proposals: list[list[Proposal]] = []
        for item in work:
            own = []
            for n in shares(samples, len(item.cuts)):
                (kept, cut, compute), revision = next(found)
                own.append(
                    Proposal(
                        n=n,
                        plain_ids=(*kept, *revision.argmax_ids().tolist()),
                        mixture=revision.mixture.behind(kept),
                        latent=self.config.rounding == "none",
                        kept=len(kept),
                        parent=cut.sample_id,
                        original_ids=(*kept, *cut.prefix_ids),
                        compute=revision.compute + compute,
                        trace=revision.trace,
                    )
                )
            proposals.append(own)
        return proposals

    def _windows(self, tools: Tools, pairs: Sequence[tuple[Work, Cut]]) -> list[tuple[tuple[int, ...], Cut, Compute]]:
        """What is kept of each rollout, the rest cut behind the step to revise, and what finding that step took.

        One pass over the rollout's reasoning, whose log-probs are recorded and whose entropies are not.
        """
        reader = Reader(tools, pairs[0][0].template_ids, self.forks.banned)
        rollouts = [(*cut.prefix_ids, *cut.continuation_ids) for _, cut in pairs]
        looked_at = []
        for (item, _), ids in zip(pairs, rollouts, strict=True):
            # What failed keeps a token, whatever the window.
            end = min(reader.reasoning(ids), len(ids) - 1, self.forks.max_positions)
            looked_at.append(ids[: max(1, min(end, room(tools, item, self.forks.step_tokens)))])
        contexts = [(item.prompt.ids, ids) for (item, _), ids in zip(pairs, looked_at, strict=True)]
        windows = []
        for (_, cut), ids, part, reading in zip(
            pairs, rollouts, looked_at, read(tools, contexts, self.forks.p_min, 1), strict=True
        ):
            at = max(range(len(part)), key=lambda i: reading.entropies[i])
            start, end = _step_around(reader, part, at, self.forks.step_tokens)
            revised = Cut(cut.sample_id, ids[start:end], ids[end:])
            windows.append((ids[:start], revised, Compute(forward=len(part) - 1)))
        return windows


def _step_around(reader: Reader, ids: Sequence[int], at: int, step_tokens: int) -> tuple[int, int]:
    """Start and end of the step that the token ``at`` lies in; a step takes ``step_tokens`` at the most."""
    start = 0
    for end, token in enumerate(ids, 1):
        if reader.ends_step(token) or end - start == step_tokens or end == len(ids):
            if at < end:
                break
            start = end
    return start, end
