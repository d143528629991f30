"""Which of a prompt's admitted trajectories go into training, and in which order.

    first       as they were sampled
    shortest    fewest tokens behind the prompt
    surprising  least probable behind the plain prefix, by mean log-prob: what the policy has most to learn from
    diverse     the shortest, then each time the one least like those taken, by shared token trigrams

``surprising`` follows surprisal-guided selection, which keeps the least likely correct sample; the others are our own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from latentrevise.data.records import Trajectory

Select = Literal["first", "shortest", "surprising", "diverse"]


def select(trajectories: Sequence[Trajectory], how: Select, keep: int | None = None) -> list[Trajectory]:
    """The trajectories of one prompt, best first, ``keep`` at most (None: all). Equals keep their order, and of equal
    texts only the first is taken."""
    distinct: dict[tuple[tuple[int, ...], tuple[int, ...]], Trajectory] = {}
    for t in trajectories:
        distinct.setdefault((t.plain_prefix_ids, t.completion_ids), t)
    found = list(distinct.values())
    return (_diverse(found) if how == "diverse" else sorted(found, key=_KEYS[how]))[:keep]


def _length(t: Trajectory) -> float:
    return len(t.plain_prefix_ids) + len(t.completion_ids)


def _likelihood(t: Trajectory) -> float:
    """Mean plain log-prob, nats a token; a continuation without a token is no surprise."""
    return sum(t.plain_logprobs) / len(t.plain_logprobs) if t.plain_logprobs else 0.0


_KEYS: dict[str, Callable[[Trajectory], float]] = {
    "first": lambda t: 0.0,
    "shortest": _length,
    "surprising": _likelihood,
}


def _diverse(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """By distance (1 - Jaccard similarity of trigrams) from the nearest one taken; the shortest comes first."""
    left = sorted(trajectories, key=_length)
    grams = {id(t): _trigrams((*t.plain_prefix_ids, *t.completion_ids)) for t in left}
    taken: list[Trajectory] = []
    while left:
        nearest = [max((_likeness(grams[id(t)], grams[id(other)]) for other in taken), default=0.0) for t in left]
        taken.append(left.pop(nearest.index(min(nearest))))
    return taken


def _trigrams(ids: Sequence[int]) -> set[tuple[int, ...]]:
    return {tuple(ids[i : i + 3]) for i in range(max(len(ids) - 2, 1))}


def _likeness(a: set[tuple[int, ...]], b: set[tuple[int, ...]]) -> float:
    return len(a & b) / len(a | b)
