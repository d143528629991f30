"""The figures of a run: what was recovered, what it is worth, what it cost, what plain resampling gives for that."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from latentrevise.data.records import Rollout, Sample, Start, Verdict
from latentrevise.model.compute import Compute
from latentrevise.recovery.guards import (
    GUARDS,
    guard_curves,
    guard_rates,
    guard_trade_off,
    markers,
    pass_at_k,
    wilson,
)
from latentrevise.verify.verifier import understood

# Names of the side arms: a strategy aimed at a wrong answer, and the equal-compute control.
WRONG, POOL = "@wrong", "resample@equal"


@dataclass(frozen=True)
class Outcome:
    """One arm's results. ``wrong``: it aimed at a random wrong answer. prompts: those it was given. kept: trajectories
    that the selection left of its admitted samples."""

    arm: str
    strategy: str
    uses_answer: bool
    wrong: bool
    prompts: Sequence[str]
    compute: Compute
    rows: list[tuple[Start, Sample, Verdict]]
    kept: int = 0


def run_metrics(
    outcomes: Sequence[Outcome],
    *,
    rollouts: Mapping[str, Sequence[Rollout]],
    zero_hit: Sequence[str],
    aimed_wrong: Sequence[str],
    mined: Compute,
    left_out: int,
    checked: bool,
    chained: bool = False,
    label: str | None = None,
    set_aside: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Everything that goes into ``metrics.json``.

    zero_hit: prompts that were to be recovered; aimed_wrong: those of them with a wrong target. mined: what the
    rollouts cost, a prompt read once a round. left_out: input rows
    that were not usable; ``unparsed``: rollouts whose answer the verifier does not understand. checked: whether
    derivations were checked. chained: each strategy was given the prompts that those before it had not recovered;
    then ``chain`` has the figures of all of them together. set_aside: what is known of the parts that were given up
    (see ``stages``); no arm's rate counts their prompts. Rates are ``[rate, low, high]`` with 95 % Wilson intervals
    over prompts; compute is in token passes (forward 1, backward 2, decoded 1, cached 0). ``control``: plain resampling
    at an arm's token passes; ``control_seconds``: at its seconds, which are those of this machine, engine and batch.
    """
    by_arm = {outcome.arm: outcome for outcome in outcomes}
    pool = by_arm.get(POOL)
    control = None if pool is None or not pool.prompts else _Control(pool, checked)
    failed = [len(r.completion_ids) for name in zero_hit for r in rollouts[name]]
    verdicts = Counter(r.verdict for own in rollouts.values() for r in own)
    return {
        "family": label,
        "prompts": len(rollouts),
        "rows_left_out": left_out,
        "set_aside": list(set_aside),
        "rollouts": dict(verdicts),
        "mined": {"forward": mined.forward, "decoded": mined.decoded, "passes": mined.passes},
        "unparsed": sum(not understood(r.extracted) for own in rollouts.values() for r in own),
        "solved": sum(any(r.verdict == "correct" for r in own) for own in rollouts.values()),
        "undecided": sum(
            any(r.verdict == "unknown" for r in own) and not any(r.verdict == "correct" for r in own)
            for own in rollouts.values()
        ),
        "zero_hit": len(zero_hit),
        "derivations_checked": checked,
        "arms": {
            outcome.arm: _arm(outcome, by_arm, aimed_wrong, checked, control, fmean(failed) if failed else 0.0)
            for outcome in outcomes
        },
        "chain": _chain(outcomes, zero_hit, checked, control) if chained else None,
        "guards": _guards([row for o in outcomes if not o.wrong for row in o.rows]) if checked else None,
        "control_curve": [] if control is None else control.curve(),
    }


class _Control:
    """Plain resampling at any compute, from one pool of samples a prompt and the unbiased pass@k."""

    def __init__(self, pool: Outcome, checked: bool) -> None:
        self.checked, prompts = checked, pool.prompts
        verdicts = defaultdict(list)
        for _, _, verdict in pool.rows:
            verdicts[verdict.prompt_id].append(verdict)
        self.correct = [sum(v.verdict == "correct" for v in verdicts[name]) for name in prompts]
        self.valid = [sum(bool(v.valid) for v in verdicts[name]) for name in prompts]
        self.size = min(len(verdicts[name]) for name in prompts)
        self.tokens = pool.compute.passes / max(len(pool.rows), 1)
        self.seconds = pool.compute.seconds / max(len(pool.rows), 1)

    def at(self, passes: float) -> dict[str, Any]:
        """The share recovered by as many fresh rollouts as ``passes`` a prompt buy (at least one)."""
        return self._bought(passes / self.tokens)

    def at_seconds(self, seconds: float) -> dict[str, Any]:
        """The same for the seconds a prompt that the strategy took, on this machine and engine."""
        return self._bought(seconds / self.seconds)

    def _bought(self, rollouts: float) -> dict[str, Any]:
        wanted = max(1, round(rollouts))
        return {**self._rates(min(wanted, self.size)), "wanted": wanted}

    def curve(self) -> list[dict[str, Any]]:
        points, k = [], 1
        while k < self.size:
            points.append(self._rates(k))
            k *= 2
        return [*points, self._rates(self.size)]

    def _rates(self, k: int) -> dict[str, Any]:
        def rate(counts: list[int]) -> list[float]:
            mean = fmean(pass_at_k(self.size, c, k) for c in counts)
            return list(wilson(mean * len(counts), len(counts)))

        return {
            "samples": k,
            "tokens": k * self.tokens,
            "recovered_rate": rate(self.correct),
            "valid_rate": rate(self.valid) if self.checked else None,
        }


def _arm(
    outcome: Outcome,
    by_arm: Mapping[str, Outcome],
    aimed_wrong: Sequence[str],
    checked: bool,
    control: _Control | None,
    failed_length: float,
) -> dict[str, Any]:
    count = len(outcome.prompts)
    hit = {v.prompt_id for _, _, v in outcome.rows if v.hits_target}
    per_prompt = outcome.compute.passes / max(count, 1)
    result: dict[str, Any] = {
        "strategy": outcome.strategy,
        "target": "wrong" if outcome.wrong else "gold",
        "prompts": count,
        "samples_per_prompt": len(outcome.rows) / max(count, 1),
        "recovered": len(hit),
        "recovered_rate": list(wilson(len(hit), count)),
        "compute": {
            "forward": outcome.compute.forward,
            "backward": outcome.compute.backward,
            "decoded": outcome.compute.decoded,
            "per_prompt": per_prompt,
        },
        "seconds": outcome.compute.seconds,
    }
    if outcome.wrong:
        return result
    correct = [(start, s, v) for start, s, v in outcome.rows if v.verdict == "correct"]
    valid = {v.prompt_id for _, _, v in correct if v.valid}
    # A strategy that reads the answer was run again on the wrong one; the others reach it by chance, on the same
    # samples.
    wrong = by_arm.get(outcome.arm + WRONG) if outcome.uses_answer else outcome
    wrong_rate = None
    aimed = set(aimed_wrong) & set(outcome.prompts)
    if wrong is not None and aimed:
        wrong_rate = wilson(len({v.prompt_id for _, _, v in wrong.rows if v.hits_wrong}), len(aimed))
    admitted = [v for _, _, v in correct if v.guard is None]
    rejections = Counter(code for _, _, v in correct if v.guard for code in v.guard.split(","))
    result |= {
        "valid": len(valid) if checked else None,
        "valid_rate": list(wilson(len(valid), count)) if checked else None,
        "wrong_target_rate": None if wrong_rate is None else list(wrong_rate),
        # With nothing reached on the wrong side the ratio has no value; the interval above says what is known.
        "selectivity": None if not wrong_rate or not wrong_rate[0] else result["recovered_rate"][0] / wrong_rate[0],
        "control": None if control is None else control.at(per_prompt),
        "control_seconds": None if control is None else control.at_seconds(outcome.compute.seconds / max(count, 1)),
        "guards": {code: {"rejected": rejections[code], "of": len(correct)} for code in GUARDS},
        "correct_samples": len(correct),
        "admitted": len(admitted),
        "admitted_prompts": len({v.prompt_id for v in admitted}),
        "admitted_valid": sum(bool(v.valid) for v in admitted) if checked else None,
        "guarded": guard_rates([(v.guard is None, bool(v.valid)) for _, _, v in correct]) if checked else None,
        "kept": outcome.kept,
        "length": {
            "failed_mean": failed_length,
            "recovered_mean": fmean(len(start.plain_ids) + len(s.completion_ids) for start, s, _ in correct)
            if correct
            else None,
        },
        "reliance": _reliance(correct),
        "markers": {
            "recovered": markers([s.completion for _, s, _ in correct]),
            "all": markers([s.completion for _, s, _ in outcome.rows]),
        },
    }
    return result


def _chain(
    outcomes: Sequence[Outcome], zero_hit: Sequence[str], checked: bool, control: _Control | None
) -> dict[str, Any]:
    """All strategies of a chain together, over all zero-hit prompts."""
    own = [o for o in outcomes if not o.wrong and o.arm != POOL]
    rows = [v for o in own for _, _, v in o.rows if v.verdict == "correct"]
    per_prompt = sum(o.compute.passes for o in own) / max(len(zero_hit), 1)

    def rate(found: set[str]) -> list[float]:
        return list(wilson(len(found), len(zero_hit)))

    return {
        "recovered_rate": rate({v.prompt_id for v in rows}),
        "admitted_rate": rate({v.prompt_id for v in rows if v.guard is None}),
        "valid_rate": rate({v.prompt_id for v in rows if v.valid}) if checked else None,
        "per_prompt": per_prompt,
        "control": None if control is None else control.at(per_prompt),
    }


def _guards(rows: Sequence[tuple[Start, Sample, Verdict]]) -> dict[str, Any]:
    """What the guards are worth on everything that is right and was checked, all strategies together."""
    judged = [v for _, _, v in rows if v.verdict == "correct" and v.valid is not None]
    measured = [(v.signals or {}, bool(v.valid)) for v in judged]
    return {
        **guard_rates([(v.guard is None, bool(v.valid)) for v in judged]),
        "curves": guard_curves(measured),
        "trade_off": guard_trade_off(measured),
    }


def _reliance(correct: Sequence[tuple[Start, Sample, Verdict]]) -> float | None:
    """Mean plain minus mean sampling log-prob of the correct samples, nats a token: how much of a continuation's
    probability comes from what the plain prefix does not say."""
    gaps = [
        fmean(v.plain_logprobs) - fmean(s.sampling_logprobs)
        for _, s, v in correct
        if v.plain_logprobs and s.sampling_logprobs
    ]
    return fmean(gaps) if gaps else None
