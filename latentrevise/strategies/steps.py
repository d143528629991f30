"""Steps of a rollout's reasoning, and the first that a step checker calls false."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from latentrevise.checkers.loading import StepChecker
from latentrevise.data.records import Rollout, decoded
from latentrevise.strategies.base import Tools, Work
from latentrevise.strategies.candidates import Reach, Reader


@dataclass(frozen=True)
class Steps:
    """The reasoning of a completion: its ids, and where each step ends in them, the last with the reasoning."""

    ids: tuple[int, ...]
    ends: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ends)

    def before(self, step: int) -> tuple[int, ...]:
        """The ids of all steps in front of that one (from 0)."""
        return self.ids[: self.ends[step - 1] if step else 0]

    def step(self, step: int) -> tuple[int, ...]:
        return self.ids[len(self.before(step)) : self.ends[step]]


def steps_of(reader: Reader, ids: Sequence[int]) -> Steps:
    """The steps of a completion in front of its answer."""
    own = tuple(ids[: reader.reasoning(ids)])
    ends = [end for end in reader.ends(ids) if end <= len(own)]
    return Steps(own, tuple(ends if not own or ends[-1:] == [len(own)] else [*ends, len(own)]))


def first_false(tools: Tools, item: Work, check: StepChecker, steps: Steps) -> int | None:
    """The first step (from 0) that the checker calls false; None where it calls none so."""

    def text(ids: Sequence[int]) -> str:
        return decoded(tools.tokenizer, ids)

    verdicts = (check(item.prompt.text, text(steps.before(i)), text(steps.step(i))) for i in range(len(steps)))
    return next((i for i, holds in enumerate(verdicts) if holds is False), None)


def to_first_false(tools: Tools, reader: Reader, check: StepChecker) -> Reach:
    """At how many places, its first ones, a rollout may be left: up to the end of its first false step."""

    def reach(item: Work, rollout: Rollout) -> int:
        steps = steps_of(reader, rollout.completion_ids)
        false = first_false(tools, item, check, steps)
        return len(rollout.completion_ids) if false is None else steps.ends[false]

    return reach


def holds(tools: Tools, reader: Reader, check: StepChecker, item: Work, ids: Sequence[int], at: int) -> bool:
    """Whether the checker lets the step pass that the completion's place ``at`` stands in, its last one."""
    start = max((end for end in reader.ends(ids) if end <= at), default=0)
    before, step = (decoded(tools.tokenizer, part) for part in (ids[:start], ids[start:]))
    return check(item.prompt.text, before, step) is not False
