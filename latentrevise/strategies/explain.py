"""``explain``: let the policy explain the answer it is told, and learn the explanation behind the plain question.

In the style of ExPO (arXiv 2507.02834), which needs what a revision needs, a prompt and its gold answer, and is thus
its nearest relative in text; ours shares no code with it. The sample is drawn behind a prompt that holds the answer,
but is verified, weighed and trained behind the question alone: its two log-prob streams say how far one is from the
other. The guards ``told`` and ``early-answer`` turn away explanations that lean on what they were told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from latentrevise.errors import ConfigError
from latentrevise.strategies.base import Proposal, Tools, Work
from latentrevise.verify.patterns import way_of_answering


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
        for place in ("{prompt}", "{answer}"):
            if place not in self.template:
                raise ConfigError(f"ExplainConfig.template = {self.template!r}: put {place} where it belongs")


@dataclass(frozen=True)
class Explain:
    """All samples from one context: the template, filled in."""

    config: ExplainConfig
    name: str = "explain"
    uses_answer: bool = True
    backend: str = "none"

    def propose(self, tools: Tools, work: Sequence[Work], samples: int) -> list[list[Proposal]]:
        return [[Proposal(n=samples, context_ids=self._context(tools, item, item.target))] for item in work]

    def _context(self, tools: Tools, item: Work, answer: str) -> tuple[int, ...]:
        tokenizer, prompt = tools.tokenizer, item.prompt
        form = way_of_answering(str(tokenizer.decode(list(item.template_ids))))
        # Split first: a question that holds "{answer}" itself stays as it is.
        template = self.config.template.replace("{form}", form)
        around = [part.replace("{answer}", answer) for part in template.split("{prompt}")]
        *before, last = prompt.conversation
        text = last["content"].join(around)
        if not prompt.messages and prompt.ids == tuple(tokenizer.encode(prompt.text)):
            return tuple(tokenizer.encode(text))
        # The question went through the chat template, so what is asked instead does, behind the same messages.
        messages = [*before, {**last, "content": text}]
        encoded: Any = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, **tools.chat_template_kwargs
        )
        return tuple(encoded["input_ids"])
