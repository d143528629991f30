"""What a recovery is worth: intervals, unbiased pass@k, leak guards, reflection markers.

Reaching the right answer proves little: a revision can hand the answer over instead of repairing the reasoning, and
reaches a random wrong target just as often when it does. So every rate stands beside the wrong-target rate, every
strategy beside plain resampling at its own compute, and a recovered sample becomes a label only when no guard objects.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from latentrevise.data.records import shared_head
from latentrevise.errors import ConfigError
from latentrevise.revise.hull import Mixture


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


def auc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Chance that a positive scores above a negative, a tie counting half; both must be there."""
    if not positive or not negative:
        raise ConfigError("auc needs at least one positive and one negative")
    above = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
    return above / (len(positive) * len(negative))


def bootstrap_mean(values: Sequence[float], draws: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Mean and its 95 % percentile interval over resampled values: ``(mean, low, high)``. Without a value (0, 0, 1)."""
    array = np.asarray(values, dtype=float)
    if not len(array):
        return 0.0, 0.0, 1.0
    # Resampling is drawing how often each value occurs.
    counts = np.random.default_rng(seed).multinomial(len(array), np.full(len(array), 1 / len(array)), size=draws)
    low, high = np.quantile(counts @ array / len(array), (0.025, 0.975))
    return float(array.mean()), float(low), float(high)


@dataclass(frozen=True)
class GuardConfig:
    """Thresholds of the leak guards, each with the code of its objection; None switches a guard off. Our own decision,
    measured in docs/audits.md.

    leak_weight: (``prefix-leak``) an answer token that the revision put into the prefix with at least this weight,
        where neither the prompt nor the failed prefix has it, is a leak. min_derivation_tokens: (``bare-answer``)
        tokens a trajectory needs between the failed rollout's own and the answer.
    min_tokens: (``short``) tokens a continuation needs at all. min_plain_logprob: (``implausible``) nats a token; the
        mean log-probability of the continuation after the *plain* prefix must reach it, or a trainer would learn a text
        its policy finds absurd.
    min_step_logprob: (``doubtful-step``) nats; what every token in front of the answer must reach there: a step that
        the policy does not believe is a false one more often than not. min_answer_logprob: (``unfounded-answer``) the
        same of the answer's tokens: the written steps must lead to it.
    min_agreement: (``unstable``) share of ``agreement_samples`` continuations, drawn anew behind the plain prefix and
        the steps up to ``agreement_cut`` of the continuation, that must come to the same answer (one greedy, the others
        sampled).
    min_contrast: (``undecided``) nats; by how much the answer must be likelier, behind prefix, steps and answer
        template, than the likeliest of the wrong answers at hand (those of the prompt's failed rollouts and the audit's
        target).
    min_founded: (``unfounded-operand``) share of the row's equations whose operands are all in the question or results
        before them; min_used: (``unused-fact``) share of the question's numbers that its equations use (see
        ``recovery.provenance``). For tasks whose derivations are equations over the question's numbers.
        min_true_steps: (``false-step``) share of the row's steps that the ``step_checker`` holds for true, of those
        that it judges. Of all these a trainer's repair measures neither ``min_agreement`` nor ``min_contrast``, and
        refuses them.
    max_text_nll: (``broken-text``) nats a token by which the text that a mixture is written as may be less likely,
        under the plain model, than the failed prefix it came from; beyond that the row's prefix is broken text (arXiv
        2606.29938, Eq. 8, does that to tables whose rows differ in norm). Our own decision.
    told: (``told``) turn away a text that says it was given the answer; max_mention: (``early-answer``) and one that
        names the answer within this first share of it. Both only where the sample was drawn behind a context that
        holds the answer.
    """

    leak_weight: float | None = 0.05
    min_derivation_tokens: int | None = 8
    min_tokens: int | None = 4
    min_plain_logprob: float | None = -2.5
    min_step_logprob: float | None = None
    min_answer_logprob: float | None = None
    min_agreement: float | None = None
    min_contrast: float | None = None
    min_founded: float | None = None
    min_used: float | None = None
    min_true_steps: float | None = None
    max_text_nll: float | None = 1.0
    told: bool = True
    max_mention: float | None = 0.5
    agreement_samples: int = 4
    agreement_cut: float = 0.5

    def __post_init__(self) -> None:
        if self.agreement_samples < 1 or not 0.0 <= self.agreement_cut < 1.0:
            raise ConfigError(
                f"GuardConfig: agreement_samples = {self.agreement_samples!r}, agreement_cut = {self.agreement_cut!r};"
                " give at least 1 sample and a share in [0, 1)"
            )


@dataclass(frozen=True)
class Candidate:
    """A verified-correct sample, as the guards see it.

    mixture: None where the prefix is plain text. completion_ids, completion: the continuation; before_answer: its
    tokens in front of the final answer. aimed: the strategy reads the answer, so that a token of it in the prefix is no
    chance. told: the sample was drawn behind a context that holds the answer. agreement: see ``GuardConfig``; None
    where it was not measured. text_nll: by how many nats a token the text that the mixture was written as is less
    likely than the failed prefix; None where the text itself was fed. text: see ``provenance.text_signals``.
    """

    prompt_ids: Sequence[int]
    original_ids: Sequence[int]
    plain_ids: Sequence[int]
    mixture: Mixture | None
    answer_ids: Sequence[int]
    completion_ids: Sequence[int]
    completion: str
    before_answer: int
    plain_logprobs: Sequence[float]
    aimed: bool = True
    told: bool = False
    agreement: float | None = None
    text_nll: float | None = None
    text: Mapping[str, float] = field(default_factory=dict)
    contrast: float | None = None


_TOLD = re.compile(
    r"\b(?:given|provided|stated|known|expected|target|reference|correct)\s+(?:final\s+)?answer\b"
    r"|\banswer\s+(?:\S+\s+){0,3}(?:was|is|were)\s+(?:given|provided|told|known|stated)\b"
    r"|\b(?:were|was|been|are)\s+(?:told|given)\s+(?:that\s+)?(?:the\s+)?(?:final\s+)?answer\b",
    re.IGNORECASE,
)


def signals(candidate: Candidate) -> dict[str, float]:
    """What the guards judge a sample by, as numbers; a signal that says nothing of this sample is left out."""
    known = set(candidate.prompt_ids) | set(candidate.original_ids)
    new = set(candidate.answer_ids) - known
    kept = shared_head(candidate.plain_ids, candidate.original_ids)
    found: dict[str, float] = {
        "leak": _leak(candidate, new) if candidate.aimed else 0.0,
        "derivation": len(candidate.plain_ids) + candidate.before_answer - kept,
        "length": len(candidate.completion_ids),
        **candidate.text,
    }
    logprobs = candidate.plain_logprobs
    steps, answer = logprobs[: candidate.before_answer], logprobs[candidate.before_answer :]
    if logprobs:
        found["plain"] = sum(logprobs) / len(logprobs)
    if steps:
        found["step"] = min(steps)
    if answer:
        found["answer"] = min(answer)
    if candidate.agreement is not None:
        found["agreement"] = candidate.agreement
    if candidate.contrast is not None:
        found["contrast"] = candidate.contrast
    if candidate.text_nll is not None:
        found["text"] = candidate.text_nll
    if candidate.told:
        found["told"] = float(bool(_TOLD.search(candidate.completion)))
        if new == set(candidate.answer_ids):
            found["mention"] = _mention(candidate)
    return found


def _leak(candidate: Candidate, new: set[int]) -> float:
    if candidate.mixture is None:
        return float(bool(new & set(candidate.plain_ids)))
    ids, weights = candidate.mixture.ids, candidate.mixture.weights
    return max((float(weights[ids == token].max()) for token in new if (ids == token).any()), default=0.0)


def _mention(candidate: Candidate) -> float:
    """Where the continuation first names the answer, as a share of it."""
    ids, answer = tuple(candidate.completion_ids), tuple(candidate.answer_ids)
    at = (i for i in range(len(ids)) if ids[i : i + len(answer)] == answer)
    return next(at, len(ids)) / max(len(ids), 1)


@dataclass(frozen=True)
class Guard:
    """Objects to a sample whose signal lies below (``least``), or else not below, the threshold ``setting``."""

    signal: str
    setting: str
    least: bool

    def objects(self, found: Mapping[str, float], config: GuardConfig) -> bool:
        threshold = getattr(config, self.setting)
        if threshold is None or threshold is False or self.signal not in found:
            return False
        return self.rejects(found[self.signal], float(threshold))

    def rejects(self, value: float, threshold: float) -> bool:
        return value < threshold if self.least else value >= threshold


GUARDS: dict[str, Guard] = {
    "prefix-leak": Guard("leak", "leak_weight", least=False),
    "bare-answer": Guard("derivation", "min_derivation_tokens", least=True),
    "implausible": Guard("plain", "min_plain_logprob", least=True),
    "short": Guard("length", "min_tokens", least=True),
    "doubtful-step": Guard("step", "min_step_logprob", least=True),
    "unfounded-answer": Guard("answer", "min_answer_logprob", least=True),
    "unstable": Guard("agreement", "min_agreement", least=True),
    "undecided": Guard("contrast", "min_contrast", least=True),
    "unfounded-operand": Guard("founded", "min_founded", least=True),
    "unused-fact": Guard("used", "min_used", least=True),
    "false-step": Guard("true", "min_true_steps", least=True),
    "broken-text": Guard("text", "max_text_nll", least=False),
    "told": Guard("told", "told", least=False),
    "early-answer": Guard("mention", "max_mention", least=True),
}


def guard(found: Mapping[str, float], config: GuardConfig) -> list[str]:
    """The codes of all guards that object to a sample of these signals; an empty list admits it."""
    return [code for code, each in GUARDS.items() if each.objects(found, config)]


def guard_rates(samples: Mapping[tuple[bool, bool], int]) -> dict[str, Any]:
    """How well guards tell valid derivations from others, from the numbers of checked samples by (admitted, valid).

    false_accept: invalid ones admitted; false_reject: valid ones turned away; contamination: invalid ones among the
    admitted. Each ``[rate, low, high]``, the interval as if samples were independent.
    """
    total = sum(samples.values())
    valid = sum(count for (_, v), count in samples.items() if v)
    admitted = sum(count for (a, _), count in samples.items() if a)
    both = samples.get((True, True), 0)
    return {
        "valid": valid,
        "invalid": total - valid,
        "admitted": admitted,
        "false_accept": list(wilson(admitted - both, total - valid)),
        "false_reject": list(wilson(valid - both, valid)),
        "contamination": list(wilson(admitted - both, admitted)),
    }


# Shares of the valid samples that a threshold is allowed to cost, at which thresholds are tried.
_FINE = (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
_COARSE = (0.0, 0.02, 0.05, 0.1, 0.2)  # of every guard against every other


def guard_curves(samples: Sequence[tuple[Mapping[str, float], bool]]) -> dict[str, list[dict[str, float]]]:
    """Each guard alone, over its thresholds: code -> points of ``threshold``, ``kept`` (share of the valid samples) and
    ``false_accept``. From (signals, valid) of checked samples."""
    valid = np.array([v for _, v in samples], dtype=bool)
    curves = {}
    for code, each in GUARDS.items():
        tried = _admissions(each, samples, valid, _FINE)
        points = [
            {
                "threshold": threshold,
                "kept": float(admits[valid].mean()) if valid.any() else 0.0,
                "false_accept": float(admits[~valid].mean()) if (~valid).any() else 0.0,
            }
            for threshold, admits in tried
        ]
        if any(not admits.all() for _, admits in tried):
            curves[code] = points
    return curves


def guard_trade_off(samples: Sequence[tuple[Mapping[str, float], bool]]) -> list[dict[str, Any]]:
    """What can be had by all guards together: the combinations of thresholds of which no other keeps more valid samples
    at as little contamination, the purest first. ``thresholds`` names those that are switched on."""
    valid = np.array([v for _, v in samples], dtype=bool)
    if not valid.any():
        return []
    options: list[list[tuple[str, float, np.ndarray]]] = []
    for code, each in GUARDS.items():
        tried = _admissions(each, samples, valid, _COARSE)
        if any(not admits.all() for _, admits in tried):
            options.append([("", 0.0, np.ones(len(samples), dtype=bool)), *((code, t, a) for t, a in tried)])
    found: dict[int, tuple[float, dict[str, float]]] = {}
    for combination in _combinations(options, valid):
        admitted, settings = combination
        kept = int((admitted & valid).sum())
        contamination = 1.0 - kept / int(admitted.sum()) if kept else 1.0
        if kept not in found or contamination < found[kept][0]:
            found[kept] = contamination, settings
    front: list[dict[str, Any]] = []
    for kept in sorted(found, reverse=True):
        contamination, settings = found[kept]
        if kept and (not front or contamination < front[-1]["contamination"]):
            front.append({"kept": kept / int(valid.sum()), "contamination": contamination, "thresholds": settings})
    return front[::-1]


def _admissions(
    each: Guard, samples: Sequence[tuple[Mapping[str, float], bool]], valid: np.ndarray, quantiles: Sequence[float]
) -> list[tuple[float, np.ndarray]]:
    """(threshold, which samples are admitted) at the quantiles of the valid samples' signals; distinct results only."""
    values = np.array([found.get(each.signal, np.nan) for found, _ in samples])
    known = values[valid & ~np.isnan(values)]
    tried: list[tuple[float, np.ndarray]] = []
    for quantile in quantiles if len(known) else ():
        # An upper threshold rejects what reaches it, so it lies a little above the value that must still pass.
        at = np.quantile(known, quantile if each.least else 1.0 - quantile, method="lower")
        threshold = float(at if each.least else at + 1e-6)
        admits = np.isnan(values) | ((values >= threshold) if each.least else (values < threshold))
        if not any(np.array_equal(admits, other) for _, other in tried):
            tried.append((threshold, admits))
    return tried


def _combinations(
    options: list[list[tuple[str, float, np.ndarray]]], valid: np.ndarray
) -> Iterator[tuple[np.ndarray, dict[str, float]]]:
    """Every choice of one option a guard that keeps at least half of the valid samples."""
    least = valid.sum() / 2

    def extend(
        i: int, admitted: np.ndarray, settings: dict[str, float]
    ) -> Iterator[tuple[np.ndarray, dict[str, float]]]:
        if (admitted & valid).sum() < least:
            return
        if i == len(options):
            yield admitted, settings
            return
        for code, threshold, admits in options[i]:
            yield from extend(i + 1, admitted & admits, {**settings, **({code: threshold} if code else {})})

    yield from extend(0, np.ones(len(valid), dtype=bool), {})


MARKERS = {
    "wait": r"\bwait\b",
    "check": r"\b(?:check|verify|double-check)\b",
    "however": r"\b(?:however|but|actually)\b",
    "again": r"\b(?:again|redo|alternatively|instead)\b",
}


class MarkerCounts:
    """How many texts there were, and how many of them with each kind of reflection marker."""

    def __init__(self) -> None:
        self.texts, self.found = 0, dict.fromkeys(MARKERS, 0)

    def add(self, text: str) -> None:
        self.texts += 1
        for name, pattern in _PATTERNS.items():
            self.found[name] += pattern.search(text) is not None

    @property
    def shares(self) -> dict[str, float]:
        return {name: count / max(self.texts, 1) for name, count in self.found.items()}


def markers(texts: Iterable[str]) -> dict[str, float]:
    """Share of the texts with each kind of reflection marker."""
    counts = MarkerCounts()
    for text in texts:
        counts.add(text)
    return counts.shares


_PATTERNS = {name: re.compile(pattern, re.IGNORECASE) for name, pattern in MARKERS.items()}
