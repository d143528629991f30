"""``dart``: resample until a rollout is correct, or a budget is spent (DART-Math, arXiv 2407.13690, in its tokens).

Prompts that are easy to recover stop early, so that the budget goes to the hard ones. The rule is the published one in
spirit: stop at the first correct rollout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from latentrevise.config import at_least_one
from latentrevise.strategies.base import Proposal, Tools, Work


@dataclass(frozen=True)
class DartConfig:
    """cap: rollouts a prompt at most; drawn in rounds of the run's ``samples``, the last of which is drawn whole."""

    cap: int = 64

    def __post_init__(self) -> None:
        at_least_one(self, "cap")


@dataclass(frozen=True)
class Dart:
    """Fresh rollouts in rounds, until one is correct."""

    config: DartConfig
    name: str = "dart"
    uses_answer: bool = False
    backend: str = "none"

    def propose(self, tools: Tools, work: Sequence[Work], samples: int) -> list[list[Proposal]]:
        return [[Proposal(n=samples, rounds=math.ceil(self.config.cap / samples))] for _ in work]
