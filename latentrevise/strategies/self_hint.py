"""``self-hint``: an abstract hint that the policy writes from the gold answer (NuRL, arXiv 2509.25666).

The policy explains the answer it is told, then condenses the explanation into a hint. The hint stands behind the
question when rollouts are sampled; verified, weighed and trained they are behind the question alone. NuRL writes hints
offline and uses them where a group has no correct rollout, which is what a zero-hit prompt is. Wording, and the rule
that a hint which names the answer is not used, are our own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from latentrevise.config import at_least_one
from latentrevise.data.records import row_seed
from latentrevise.model.compute import Compute
from latentrevise.strategies.asking import Written, ask, check_places, write
from latentrevise.strategies.base import Proposal, Tools, Work
from latentrevise.strategies.candidates import charged, spread


@dataclass(frozen=True)
class SelfHintConfig:
    """rationale: asks for an explanation of ``{answer}``; empty: hints are written without one. hint: asks for the hint
    from ``{answer}`` and ``{rationale}``. solve: what is sampled behind, with ``{hint}``. ``{prompt}`` is the question
    in all three. hints: written for each prompt; of these the distinct ones that do not name the answer share the
    samples. hint_tokens: of one at most; stop: texts that end one."""

    rationale: str = "{prompt}\n\nThe final answer is {answer}. Explain step by step how it is reached."
    hint: str = (
        "{prompt}\n\nThe final answer is {answer}. It is reached so:\n{rationale}\n\nWrite a hint for somebody who has"
        " failed on this problem: in one or two sentences the key idea or the fact that is needed, without any step of"
        " the calculation and without the answer."
    )
    solve: str = "{prompt}\n\nHint: {hint}"
    hints: int = 4
    hint_tokens: int = 128
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rationale:
            check_places(self, "rationale", "prompt", "answer")
        check_places(self, "hint", "prompt", "answer", *(["rationale"] if self.rationale else []))
        check_places(self, "solve", "prompt", "hint")
        at_least_one(self, "hints", "hint_tokens")


@dataclass(frozen=True)
class SelfHint:
    """One context a hint. Without a usable hint the samples are drawn from the question."""

    config: SelfHintConfig
    name: str = "self-hint"
    uses_answer: bool = True
    backend: str = "none"

    def propose(self, tools: Tools, work: Sequence[Work], samples: int) -> list[list[Proposal]]:
        config, spent = self.config, [Compute() for _ in work]
        seeds = [row_seed(item.seed, self.name) for item in work]
        rationales = [""] * len(work)
        if config.rationale:
            asked = [ask(tools, item, "self_hint.rationale", config.rationale, answer=item.target) for item in work]
            texts, spent = write(tools, asked, seeds, greedy=True)
            rationales = [own[0].text.strip() if own else "" for own in texts]
        asked = [
            ask(tools, item, "self_hint.hint", config.hint, answer=item.target, rationale=rationale)
            for item, rationale in zip(work, rationales, strict=True)
        ]
        texts, computes = write(tools, asked, seeds, n=config.hints, max_tokens=config.hint_tokens, stop=config.stop)
        proposals = []
        for item, own, before, compute in zip(work, texts, spent, computes, strict=True):
            contexts = [ask(tools, item, "self_hint.solve", config.solve, hint=hint) for hint in _usable(own, item)]
            made = spread([Proposal(n=1, context_ids=context) for context in contexts], samples)
            proposals.append(charged(made, samples, before + compute))
        return proposals


def _usable(texts: Sequence[Written], item: Work) -> list[str]:
    """The distinct hints that do not name the target, where the question does not."""
    names = re.compile(rf"(?<!\w){re.escape(item.target.strip())}(?!\w)")
    hints = dict.fromkeys(text for written in texts if (text := written.text.strip()))
    return [hint for hint in hints if names.search(item.prompt.text) or not names.search(hint)]
