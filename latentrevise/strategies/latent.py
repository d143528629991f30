"""``latent``: revise the embeddings of a failed prefix, then continue from it (arXiv 2606.29938).

One class serves the published method (``ReviseConfig()``, the cut at 0.8, continuation from the mixture itself, its
text by Eq. 8), the restricted form (plausible hull, entropic, rounded to tokens) and the ablations: they differ in
their ``ReviseConfig``, their cut, their window and how they are written as text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from latentrevise.model.compute import Compute
from latentrevise.revise.hull import TextRule
from latentrevise.revise.reviser import Reviser
from latentrevise.revise.revision import ReviseConfig
from latentrevise.strategies.base import Cut, Proposal, Tools, Work, recut, shares
from latentrevise.strategies.candidates import ForkConfig, Reader, read, room

Window = Literal["prefix", "entropy"]


@dataclass(frozen=True)
class _Part:
    """What of a rollout is revised: the cut's prefix, behind ``kept_ids``; and what finding it took."""

    cut: Cut
    kept_ids: tuple[int, ...] = ()
    compute: Compute = field(default_factory=Compute)


@dataclass(frozen=True)
class Latent:
    """Revise each chosen failed rollout once; the samples are spread over the revised prefixes.

    window: what is revised: ``prefix``, the run's cut of the rollout; ``entropy``, the step in which the policy is
    least sure of a token, with all before it kept as it was (our own decision). forks: how long a step may be, and
    where the reasoning ends. rho: cut each rollout behind this share of its tokens, as the paper does; None: where the
    run cuts. text: how a mixture is written as tokens, see ``VocabularyHull.text_ids``.
    """

    name: str
    config: ReviseConfig
    uses_answer: bool = True
    window: Window = "prefix"
    forks: ForkConfig = field(default_factory=ForkConfig)
    rho: float | None = None
    text: TextRule = "heaviest"

    @property
    def backend(self) -> str:
        return self.config.backend or "auto"

    def propose(self, tools: Tools, work: Sequence[Work], samples: int) -> list[list[Proposal]]:
        pairs = [(item, cut if self.rho is None else recut(cut, self.rho)) for item in work for cut in item.cuts]
        parts = [_Part(cut) for _, cut in pairs] if self.window == "prefix" else self._windows(tools, pairs)
        rollouts = [item.rollout(part.cut, part.kept_ids) for (item, _), part in zip(pairs, parts, strict=True)]
        reviser = Reviser(tools.policy, self.config)
        found = zip(parts, reviser.revise(rollouts), strict=True)
        proposals: list[list[Proposal]] = []
        for item in work:
            own = []
            for n in shares(samples, len(item.cuts)):
                part, revision = next(found)
                text = revision.text_ids(reviser.hull, self.text).tolist()
                own.append(
                    Proposal(
                        n=n,
                        plain_ids=(*part.kept_ids, *text),
                        mixture=revision.mixture.behind(part.kept_ids),
                        latent=self.config.rounding == "none",
                        kept=len(part.kept_ids),
                        parent=part.cut.sample_id,
                        original_ids=(*part.kept_ids, *part.cut.prefix_ids),
                        compute=revision.compute + part.compute,
                        trace=revision.trace,
                    )
                )
            proposals.append(own)
        return proposals

    def _windows(self, tools: Tools, pairs: Sequence[tuple[Work, Cut]]) -> list[_Part]:
        """The step of each rollout in which the policy is least sure.

        One pass over the rollout's reasoning, whose log-probs are recorded and whose entropies are not.
        """
        reader = Reader(tools, pairs[0][0].template_ids, self.forks.banned)
        rollouts = [(*cut.prefix_ids, *cut.continuation_ids) for _, cut in pairs]
        contexts = []
        for (item, _), ids in zip(pairs, rollouts, strict=True):
            # What failed keeps a token, whatever the window.
            end = min(reader.reasoning(ids), len(ids) - 1, self.forks.max_positions)
            end = min(end, room(tools, item, self.forks.step_tokens))
            contexts.append((item.prompt.ids, ids[: max(end, 1)]))
        readings = read(tools, contexts, self.forks.p_min, 1)
        parts = []
        for (_, cut), ids, (_, looked_at), reading in zip(pairs, rollouts, contexts, readings, strict=True):
            at = max(range(len(looked_at)), key=reading.entropies.__getitem__)
            start, end = _step_around(reader, looked_at, at, self.forks.step_tokens)
            revised = Cut(cut.sample_id, ids[start:end], ids[end:])
            parts.append(_Part(revised, ids[:start], Compute(forward=len(looked_at) - 1)))
        return parts


def _step_around(reader: Reader, ids: Sequence[int], at: int, step_tokens: int) -> tuple[int, int]:
    """Start and end of the step that the token ``at`` lies in; a step takes ``step_tokens`` at the most."""
    start, ends = 0, reader.ends(ids)
    for end in range(1, len(ids) + 1):
        if end in ends or end - start == step_tokens or end == len(ids):
            if at < end:
                break
            start = end
    return start, end
