"""``explain``: let the policy explain the answer it is told, and learn the explanation behind the plain question.

In the style of ExPO (arXiv 2507.02834), which needs what a revision needs, a prompt and its gold answer, and is thus
its nearest relative in text; ours shares no code with it. The sample is drawn behind a prompt that holds the answer,
but is verified, weighed and trained behind the question alone: its two log-prob streams say how far one is from the
other. The guards ``told`` and ``early-answer`` turn away explanations that lean on what they were told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from latentrevise.strategies.asking import ask, check_places
from latentrevise.strategies.base import Proposal, Tools, Work


@dataclass(frozen=True)
class ExplainConfig:
    """template: what is asked, with the question (of a conversation the last message) at ``{prompt}`` and the answer at
    ``{answer}``; ``{form}`` becomes the way of answering that belongs to the run's answer template (under an
    answer pattern of one's own, say it in its place). Our own wording."""

    template: str = (
        "{prompt}\n\nThe final answer is {answer}. Write the complete step-by-step solution as if you had found it"
        " yourself: never say that the answer was given, state it only once your steps have derived it, and end with"
        " it {form}."
    )

    def __post_init__(self) -> None:
        check_places(self, "template", "prompt", "answer")


@dataclass(frozen=True)
class Explain:
    """All samples from one context: the template, filled in."""

    config: ExplainConfig
    name: str = "explain"
    uses_answer: bool = True
    backend: str = "none"

    def propose(self, tools: Tools, work: Sequence[Work], samples: int) -> list[list[Proposal]]:
        template = self.config.template
        asked = [ask(tools, item, "explain.template", template, answer=item.target) for item in work]
        return [[Proposal(n=samples, context_ids=context)] for context in asked]
