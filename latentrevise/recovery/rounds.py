"""A prompt's continuations in rounds: which samples of its starts each round draws.

A round takes the next samples in the order of the starts, so what is drawn of a prompt is the first of what one round
draws, whenever it stops.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from latentrevise.data.records import Start
from latentrevise.recovery.settings import RoundsConfig


class Draw(NamedTuple):
    """One request: samples ``first`` to ``first + n`` of a start. repeat: which of its ``Start.rounds`` they are of,
    each of which has a seed of its own."""

    start: Start
    repeat: int
    first: int
    n: int

    @property
    def end(self) -> int:
        """How many samples its start has once this is drawn."""
        return self.start.n * self.repeat + self.first + self.n


@dataclass(frozen=True)
class Plan:
    """What a prompt is drawn in. stop: so many correct samples end it."""

    rounds: Sequence[Sequence[Draw]]
    stop: int


def plans(starts: Sequence[Start], config: RoundsConfig) -> dict[str, Plan]:
    """The plan of each prompt of some starts. Starts with rounds of their own (``dart``) keep these."""
    by_prompt: dict[str, list[Start]] = defaultdict(list)
    for start in starts:
        by_prompt[start.prompt_id].append(start)
    return {name: _plan(own, config) for name, own in by_prompt.items()}


def _plan(starts: Sequence[Start], config: RoundsConfig) -> Plan:
    repeats = max(start.rounds for start in starts)
    rule = RoundsConfig(rounds=repeats) if repeats > 1 else config
    whole = [Draw(start, repeat, 0, start.n) for start in starts for repeat in range(start.rounds)]
    total = sum(draw.n for draw in whole)
    rounds = (_within(whole, rule.drawn(total, number)) for number in range(rule.rounds))
    return Plan([own for own in rounds if own], rule.stop_after_correct)


def _within(whole: Sequence[Draw], wanted: range) -> list[Draw]:
    """Those of the samples, counted through all draws, that are wanted."""
    found, before = [], 0
    for draw in whole:
        first, end = max(wanted.start - before, 0), min(wanted.stop - before, draw.n)
        if first < end:
            found.append(draw._replace(first=first, n=end - first))
        before += draw.n
    return found


def repeated(starts: Sequence[Start], drawn: Mapping[str, int], config: RoundsConfig) -> dict[str, int]:
    """How many requests were made of each start beyond its first. drawn: its samples."""
    made = Counter(
        draw.start.start_id
        for plan in plans(starts, config).values()
        for own in plan.rounds
        for draw in own
        if draw.end <= drawn.get(draw.start.start_id, 0)
    )
    return {name: count - 1 for name, count in made.items()}
