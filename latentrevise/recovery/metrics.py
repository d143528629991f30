"""The figures of a run: what was recovered, what it is worth, what it cost, what plain resampling gives for that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from latentrevise.recovery.guards import GUARDS, guard_curves, guard_rates, guard_trade_off, pass_at_k, wilson
from latentrevise.recovery.mined import Mined
from latentrevise.recovery.outcome import Judged, Mean, Outcome

# Names of the side arms: a strategy aimed at a wrong answer, and the equal-compute control.
WRONG, POOL = "@wrong", "resample@equal"


def run_metrics(
    outcomes: Sequence[Outcome],
    judged: Judged,
    *,
    mined: Mined,
    left_out: int,
    checked: bool,
    chained: bool = False,
    label: str | None = None,
    set_aside: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Everything that goes into ``metrics.json``.

    judged: all outcomes' right samples. mined: what the rollouts came to. left_out: input rows that were not usable.
    checked: whether derivations were checked. chained: each strategy was given the prompts that those before it had not
    recovered; then ``chain`` has the figures of all of them together. set_aside: what is known of the parts that were
    given up (see ``stages``); no arm's rate counts their prompts. Rates are ``[rate, low, high]`` with 95 % Wilson
    intervals over prompts; compute is in token passes (forward 1, backward 2, decoded 1, cached 0). ``control``: plain
    resampling at an arm's token passes; ``control_seconds``: at its seconds, which are those of this machine, engine
    and batch.
    """
    by_arm = {outcome.arm: outcome for outcome in outcomes}
    pool = by_arm.get(POOL)
    control = None if pool is None or not pool.prompts else _Control(pool, checked)
    spent, failed = mined.compute, mined.failed_length.value or 0.0
    return {
        "family": label,
        "prompts": mined.prompts,
        "rows_left_out": left_out,
        "set_aside": list(set_aside),
        "rollouts": dict(mined.verdicts),
        "mined": {"forward": spent.forward, "decoded": spent.decoded, "passes": spent.passes},
        "unparsed": mined.unparsed,
        "solved": mined.solved,
        "undecided": mined.undecided,
        "zero_hit": mined.zero_hit,
        "derivations_checked": checked,
        "arms": {outcome.arm: _arm(outcome, by_arm, checked, control, failed) for outcome in outcomes},
        "chain": _chain(outcomes, mined.zero_hit, checked, control) if chained else None,
        "guards": _guards(judged) if checked else None,
        "control_curve": [] if control is None else control.curve(),
    }


class _Control:
    """Plain resampling at any compute, from one pool of samples a prompt and the unbiased pass@k."""

    def __init__(self, pool: Outcome, checked: bool) -> None:
        self.checked, self.size = checked, pool.fewest or 0
        self.correct, self.valid = Counter[int](), Counter[int]()
        for (right, valid), prompts in pool.by_prompt.items():
            self.correct[right] += prompts
            self.valid[valid] += prompts
        self.tokens = pool.compute.passes / max(pool.samples, 1)
        self.seconds = pool.compute.seconds / max(pool.samples, 1)

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
        def rate(prompts: Counter[int]) -> list[float]:
            mean = Mean()
            for right, count in prompts.items():
                mean.add(pass_at_k(self.size, right, k), count)
            return list(wilson((mean.value or 0.0) * mean.count, mean.count))

        return {
            "samples": k,
            "tokens": k * self.tokens,
            "recovered_rate": rate(self.correct),
            "valid_rate": rate(self.valid) if self.checked else None,
        }


def _arm(
    outcome: Outcome,
    by_arm: Mapping[str, Outcome],
    checked: bool,
    control: _Control | None,
    failed_length: float,
) -> dict[str, Any]:
    count = outcome.prompts
    per_prompt = outcome.compute.passes / max(count, 1)
    result: dict[str, Any] = {
        "strategy": outcome.strategy,
        "target": "wrong" if outcome.wrong else "gold",
        "prompts": count,
        "samples_per_prompt": outcome.samples / max(count, 1),
        "recovered": outcome.hit,
        "recovered_rate": list(wilson(outcome.hit, count)),
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
    # A strategy that reads the answer was run again on the wrong one; the others reach it by chance, on the same
    # samples, unless these ended at the right answer.
    by_chance = None if outcome.in_rounds else outcome
    wrong = by_arm.get(outcome.arm + WRONG) if outcome.uses_answer else by_chance
    wrong_rate = None
    if wrong is not None and outcome.aimed:
        wrong_rate = wilson(wrong.hits_wrong, outcome.aimed)
    result |= {
        "valid": outcome.valid if checked else None,
        "valid_rate": list(wilson(outcome.valid, count)) if checked else None,
        "wrong_target_rate": None if wrong_rate is None else list(wrong_rate),
        # With nothing reached on the wrong side the ratio has no value; the interval above says what is known.
        "selectivity": None if not wrong_rate or not wrong_rate[0] else result["recovered_rate"][0] / wrong_rate[0],
        "control": None if control is None else control.at(per_prompt),
        "control_seconds": None if control is None else control.at_seconds(outcome.compute.seconds / max(count, 1)),
        "guards": {code: {"rejected": outcome.rejections[code], "of": outcome.correct} for code in GUARDS},
        "correct_samples": outcome.correct,
        "admitted": outcome.admitted,
        "admitted_prompts": outcome.admitted_prompts,
        "admitted_valid": outcome.admitted_valid if checked else None,
        "guarded": guard_rates(outcome.guarded) if checked else None,
        "kept": outcome.kept,
        "length": {"failed_mean": failed_length, "recovered_mean": outcome.length.value},
        # Mean plain minus mean sampling log-prob of the correct samples, nats a token: how much of a continuation's
        # probability comes from what the plain prefix does not say.
        "reliance": outcome.reliance.value,
        "markers": {"recovered": outcome.markers_right.shares, "all": outcome.markers.shares},
    }
    return result


def _chain(outcomes: Sequence[Outcome], zero_hit: int, checked: bool, control: _Control | None) -> dict[str, Any]:
    """All strategies of a chain together, over all zero-hit prompts."""
    own = [o for o in outcomes if not o.wrong and o.arm != POOL]
    per_prompt = sum(o.compute.passes for o in own) / max(zero_hit, 1)

    def rate(found: int) -> list[float]:
        return list(wilson(found, zero_hit))

    return {
        "recovered_rate": rate(len(set().union(*(o.recovered_ids for o in own)))),
        "admitted_rate": rate(sum(o.admitted_prompts for o in own)),  # whom one recovers, none after it is given
        "valid_rate": rate(len(set().union(*(o.valid_ids for o in own)))) if checked else None,
        "per_prompt": per_prompt,
        "control": None if control is None else control.at(per_prompt),
    }


def _guards(judged: Judged) -> dict[str, Any]:
    """What the guards are worth on everything that is right and was checked, all strategies together."""
    return {
        **guard_rates(judged.counts),
        "curves": guard_curves(judged.samples),
        "trade_off": guard_trade_off(judged.samples),
    }
