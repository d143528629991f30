"""``retry`` and ``retry-told``: sample again with the failed attempt in view (RISE, arXiv 2407.18219).

No gold answer is read. ``retry`` shows the attempt, ``retry-told`` says besides that its answer is wrong, which is what
a verifier's verdict tells. RISE trains on such second turns; here what is sampled is verified, weighed and trained
behind the question alone, as for every strategy. Our own wording, in one message and not in turns of a conversation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from latentrevise.strategies.asking import ask, check_places
from latentrevise.strategies.base import Proposal, Tools, Work, shares
from latentrevise.strategies.candidates import chosen


@dataclass(frozen=True)
class RetryConfig:
    """shown: what ``retry`` is sampled behind; told: what ``retry-told`` is; with the question at ``{prompt}``, the
    attempt at ``{attempt}`` and the way of answering at ``{form}``."""

    shown: str = (
        "{prompt}\n\nAn attempt at a solution:\n\n{attempt}\n\nWrite a complete step-by-step solution of your own, and"
        " give its final answer {form}."
    )
    told: str = (
        "{prompt}\n\nAn attempt at a solution, whose final answer is wrong:\n\n{attempt}\n\nWrite a complete and"
        " correct step-by-step solution that makes no mention of this attempt, and give its final answer {form}."
    )

    def __post_init__(self) -> None:
        check_places(self, "shown", "prompt", "attempt")
        check_places(self, "told", "prompt", "attempt")


@dataclass(frozen=True)
class Retry:
    """One context for each of the failed rollouts that the run chose for revision; they share the samples."""

    name: str
    template: str
    setting: str
    uses_answer: bool = False
    backend: str = "none"

    def propose(self, tools: Tools, work: Sequence[Work], samples: int) -> list[list[Proposal]]:
        proposals = []
        for item in work:
            attempts = chosen(item)
            contexts = [
                ask(tools, item, self.setting, self.template, attempt=attempt.completion.strip())
                for attempt in attempts
            ]
            proposals.append(
                [
                    Proposal(n=n, context_ids=context, parent=attempt.sample_id)
                    for attempt, context, n in zip(attempts, contexts, shares(samples, len(attempts)), strict=True)
                ]
            )
        return proposals
