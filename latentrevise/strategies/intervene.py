"""``intervene``: name the first wrong step of a failed rollout, put a correction in its place, go on from there.

After InT (arXiv 2601.14209), where the policy verifies its own attempt against a reference and proposes one
intervention at the first error. Ours has the gold answer alone, asks in two parts (which step; then that step anew,
behind the steps before it), and lets a step checker name the step where the run has one. The row is the rollout up to
the error, the correction, and what the policy writes behind them unprompted. The wording is our own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from latentrevise.checkers.loading import StepChecker
from latentrevise.data.records import Rollout, decoded, row_seed
from latentrevise.errors import ConfigError
from latentrevise.model.compute import Compute
from latentrevise.strategies.asking import ask, check_places, write
from latentrevise.strategies.base import Proposal, Tools, Work
from latentrevise.strategies.candidates import Reader, charged, chosen, spread
from latentrevise.strategies.steps import Steps, first_false, steps_of


@dataclass(frozen=True)
class InterveneConfig:
    """locate: asks for the number of the first wrong one of the numbered ``{steps}``, read where no step checker is
    set. correct: what the step is written anew behind, followed by the steps before it; it may name the wrong
    ``{step}``. Both have the question at ``{prompt}`` and the answer at ``{answer}``. corrections: sampled for each
    rollout; step_tokens: of one at most; number_tokens: of the reply with the number."""

    locate: str = (
        "{prompt}\n\nThe final answer is {answer}, but this solution comes to another one:\n\n{steps}\n\nWhich step is"
        " the first wrong one? Reply with its number alone."
    )
    correct: str = (
        "{prompt}\n\nThe final answer is {answer}. In a solution that came to another one, this step was wrong: {step}"
        "\n\nWrite the complete step-by-step solution with that step put right. Never say that the answer was given or"
        " that a step was wrong, state the answer only once your steps have derived it, and end with it {form}."
    )
    corrections: int = 4
    step_tokens: int = 64
    number_tokens: int = 16

    def __post_init__(self) -> None:
        check_places(self, "locate", "prompt", "answer", "steps")
        check_places(self, "correct", "prompt", "answer")
        if min(self.corrections, self.step_tokens, self.number_tokens) < 1:
            raise ConfigError(
                f"InterveneConfig: corrections = {self.corrections!r}, step_tokens = {self.step_tokens!r},"
                f" number_tokens = {self.number_tokens!r}; each must be at least 1"
            )


@dataclass(frozen=True)
class Intervene:
    """The distinct corrections share the samples; without any they are drawn from the question."""

    config: InterveneConfig
    banned: tuple[str, ...]
    step_checker: StepChecker | None
    name: str = "intervene"
    uses_answer: bool = True
    backend: str = "none"

    def propose(self, tools: Tools, work: Sequence[Work], samples: int) -> list[list[Proposal]]:
        reader = Reader(tools, work[0].template_ids, self.banned)
        spent = [Compute() for _ in work]
        attempts = [
            (i, rollout, steps)
            for i, item in enumerate(work)
            for rollout in chosen(item)
            if len(steps := steps_of(reader, rollout.completion_ids))
        ]
        wrong = self._locate(tools, work, attempts, spent)
        found = [(*attempt, step) for attempt, step in zip(attempts, wrong, strict=True) if step is not None]
        made: list[list[Proposal]] = [[] for _ in work]
        for (i, rollout, steps, step), corrections in zip(
            found, self._correct(tools, reader, work, found, spent), strict=True
        ):
            kept = steps.before(step)
            made[i] += [
                Proposal(n=1, plain_ids=(*kept, *ids), parent=rollout.sample_id, original_ids=kept)
                for ids in corrections
            ]
        return [charged(spread(own, samples), samples, compute) for own, compute in zip(made, spent, strict=True)]

    def _locate(
        self, tools: Tools, work: Sequence[Work], attempts: Sequence[tuple[int, Rollout, Steps]], spent: list[Compute]
    ) -> list[int | None]:
        """The first wrong step of each attempt; None where none is named."""
        if (check := self.step_checker) is not None:
            return [first_false(tools, work[i], check, steps) for i, _, steps in attempts]
        contexts = []
        for i, _, steps in attempts:
            texts = [decoded(tools.tokenizer, steps.step(j)).strip() for j in range(len(steps))]
            numbered = "\n".join(f"{j}. {text}" for j, text in enumerate(texts, 1))
            contexts.append(
                ask(tools, work[i], "intervene.locate", self.config.locate, answer=work[i].target, steps=numbered)
            )
        seeds = [row_seed(work[i].seed, self.name, "locate", rollout.sample_id) for i, rollout, _ in attempts]
        replies, computes = write(tools, contexts, seeds, greedy=True, max_tokens=self.config.number_tokens)
        named: list[int | None] = []
        for (i, _, steps), reply, compute in zip(attempts, replies, computes, strict=True):
            spent[i] += compute
            number = re.search(r"\d+", reply[0].text) if reply else None
            step = int(number[0]) - 1 if number else -1
            named.append(step if 0 <= step < len(steps) else None)
        return named

    def _correct(
        self,
        tools: Tools,
        reader: Reader,
        work: Sequence[Work],
        found: Sequence[tuple[int, Rollout, Steps, int]],
        spent: list[Compute],
    ) -> list[list[tuple[int, ...]]]:
        """The distinct steps that the policy, told the answer, writes in each wrong one's place; one that opens the
        answer is none."""
        config, contexts = self.config, []
        for i, _, steps, step in found:
            wrong = decoded(tools.tokenizer, steps.step(step)).strip()
            asked = ask(tools, work[i], "intervene.correct", config.correct, answer=work[i].target, step=wrong)
            contexts.append((*asked, *steps.before(step)))
        seeds = [row_seed(work[i].seed, self.name, "correct", rollout.sample_id) for i, rollout, _, _ in found]
        texts, computes = write(
            tools, contexts, seeds, n=config.corrections, max_tokens=config.step_tokens, **reader.boundary.stops
        )
        corrections = []
        for (i, _, steps, step), own, compute in zip(found, texts, computes, strict=True):
            spent[i] += compute
            kept = steps.before(step)
            taken = (written.ids[: reader.boundary.first(kept, written.ids)] for written in own)
            distinct = dict.fromkeys(ids for ids in taken if ids)
            distinct.pop(steps.step(step), None)
            corrections.append([ids for ids in distinct if reader.reasoning(ids) == len(ids)])
        return corrections
