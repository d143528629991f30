"""What a recovery is worth: intervals, unbiased pass@k, leak guards, reflection markers.

Reaching the right answer proves little: a revision can hand the answer over instead of repairing the reasoning, and
reaches a random wrong target just as often when it does. So every rate stands beside the wrong-target rate, every
strategy beside plain resampling at its own compute, and a recovered sample becomes a label only when no guard objects.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from latentrevise.errors import ConfigError
from latentrevise.hull import Mixture


def wilson(successes: float, trials: int, z: float = 1.959964) -> tuple[float, float, float]:
    """Rate and its Wilson interval (95 % by default): ``(p, low, high)``. Without a trial: ``(0, 0, 1)``."""
    if trials == 0:
        return 0.0, 0.0, 1.0
    p = successes / trials
    centre = p + z * z / (2 * trials)
    spread = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return p, max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that ``k`` of ``n`` samples hold a correct one (Chen et al. 2021)."""
    if k > n:
        raise ConfigError(f"pass@{k} from {n} samples: draw at least k samples")
    if n - correct < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - correct + 1, n + 1))


@dataclass(frozen=True)
class GuardConfig:
    """Thresholds of the leak guards; None switches a guard off. Our own decision.

    leak_weight: an answer token that the revision put into the prefix with at least this weight, where neither the
        prompt nor the failed prefix has it, is a leak. min_derivation_tokens: tokens a continuation needs before its
        answer.
    min_tokens: tokens a continuation needs at all. min_plain_logprob: nats a token; the mean log-probability of the
        continuation after the *plain* prefix must reach it, or a trainer would learn a text its policy finds absurd.
    """

    leak_weight: float | None = 0.05
    min_derivation_tokens: int | None = 8
    min_tokens: int | None = 4
    min_plain_logprob: float | None = -2.5


@dataclass(frozen=True)
class Candidate:
    """A verified-correct sample, as the guards see it.

    before_answer: continuation tokens in front of the final answer; mixture: None where nothing was revised.
    """

    prompt_ids: Sequence[int]
    original_ids: Sequence[int]
    plain_ids: Sequence[int]
    mixture: Mixture | None
    answer_ids: Sequence[int]
    completion_ids: Sequence[int]
    before_answer: int
    plain_logprobs: Sequence[float]


def _leaks(candidate: Candidate, config: GuardConfig) -> bool:
    if config.leak_weight is None or candidate.mixture is None:
        return False
    known = set(candidate.prompt_ids) | set(candidate.original_ids)
    answer = set(candidate.answer_ids) - known
    ids, weights = candidate.mixture.ids, candidate.mixture.weights
    return any(bool(((ids == token) & (weights >= config.leak_weight)).any()) for token in answer)


def _bare(candidate: Candidate, config: GuardConfig) -> bool:
    return config.min_derivation_tokens is not None and candidate.before_answer < config.min_derivation_tokens


def _implausible(candidate: Candidate, config: GuardConfig) -> bool:
    if config.min_plain_logprob is None or not candidate.plain_logprobs:
        return False
    return sum(candidate.plain_logprobs) / len(candidate.plain_logprobs) < config.min_plain_logprob


def _short(candidate: Candidate, config: GuardConfig) -> bool:
    return config.min_tokens is not None and len(candidate.completion_ids) < config.min_tokens


GUARDS: dict[str, Callable[[Candidate, GuardConfig], bool]] = {
    "prefix-leak": _leaks,
    "bare-answer": _bare,
    "implausible": _implausible,
    "short": _short,
}


def guard(candidate: Candidate, config: GuardConfig) -> list[str]:
    """The codes of all guards that object; an empty list admits the sample."""
    return [code for code, objects in GUARDS.items() if objects(candidate, config)]


MARKERS = {
    "wait": r"\bwait\b",
    "check": r"\b(?:check|verify|double-check)\b",
    "however": r"\b(?:however|but|actually)\b",
    "again": r"\b(?:again|redo|alternatively|instead)\b",
}


def markers(texts: Sequence[str]) -> dict[str, float]:
    """Share of the texts with each kind of reflection marker."""
    found = {name: re.compile(pattern, re.IGNORECASE) for name, pattern in MARKERS.items()}
    return {name: sum(bool(p.search(t)) for t in texts) / max(len(texts), 1) for name, p in found.items()}
