"""What a run will take, before it is begun: a few of its prompts run to the end, and their cost times as many."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from latentrevise.data.prompts import spread
from latentrevise.data.records import RowError
from latentrevise.errors import ConfigError, InputError
from latentrevise.recovery.guards import pass_at_k, wilson
from latentrevise.recovery.measure import ArmTook, Measured, measure, mining
from latentrevise.recovery.metrics import POOL, WRONG
from latentrevise.recovery.pipeline import Recovery, control_size
from latentrevise.recovery.settings import RecoverConfig


@dataclass(frozen=True)
class Cost:
    """Of mining or of an arm, over the whole run: prompts that reach it, decoded tokens, token passes, seconds of one
    worker by stage (``revise``, ``sample``, ``verify``), bytes on disk, bytes of memory at the peak (None: not
    known)."""

    name: str
    prompts: float
    tokens: float
    passes: float
    stages: Mapping[str, float]
    disk: float
    memory: int | None

    @property
    def seconds(self) -> float:
        return sum(self.stages.values())

    @property
    def limit(self) -> str:
        """The stage that most of the time goes into, and which share of it."""
        stage = max(self.stages, key=self.stages.__getitem__)
        return f"{stage} ({self.stages[stage] / self.seconds:.0%})" if self.seconds else ""


@dataclass(frozen=True)
class Estimate:
    """Of a run by ``config`` over ``prompts``. sampled: prompts that were measured; zero_hit: share, with its 95 %
    Wilson interval; recovered: prompts with an admitted trajectory to expect, of those that are zero-hit by the
    measured settings. control: rollouts a prompt of the equal-compute control (0: there is none). costs: of ``mine``
    and of each arm. disk: bytes of the run. gpus: of a worker."""

    config: RecoverConfig
    prompts: int
    sampled: int
    zero_hit: tuple[float, float, float]
    recovered: float
    control: int
    costs: list[Cost]
    disk: float
    gpus: int

    @cached_property
    def seconds(self) -> tuple[float, float, float]:
        """Of one worker for everything, and between which bounds by the interval of the zero-hit share alone."""
        mine = self.costs[0].seconds
        rest = sum(cost.seconds for cost in self.costs[1:])
        share, low, high = self.zero_hit
        return (mine + rest, mine + rest * low / share, mine + rest * high / share) if share else (mine, mine, mine)

    @property
    def passes(self) -> float:
        return sum(cost.passes for cost in self.costs)

    @property
    def memory(self) -> int | None:
        return max((cost.memory for cost in self.costs if cost.memory is not None), default=None)


def sampled(
    recovery: Recovery, prompts: str | os.PathLike[str] | Iterable[Mapping[str, Any]], size: int | None = None
) -> tuple[Measured, int]:
    """What ``size`` prompts take (by default one part), spread evenly over all and run in the directory of a new
    ``recovery``; and how many rows are not usable.

    Raises ConfigError for a size below 1, InputError without a usable prompt, and what the run raises.
    """
    if size is not None and size < 1:
        raise ConfigError(f"a sample of {size} prompts: it must be at least 1")
    errors: list[RowError] = []
    chosen, usable = spread(recovery.job.read_prompts(prompts, errors), size or recovery.config.chunk)
    if not chosen:
        raise InputError(f"no usable prompt among {len(errors)} rows: {errors[0].message if errors else 'no rows'}")
    recovery.run.begin(recovery.job.header, chosen, errors)
    return replace(measure(recovery), usable=usable), len(errors)


def expected(sample: Measured, config: RecoverConfig) -> Estimate:
    """What a run takes over all that the sample stands for, by the settings that it was measured with, or by others:
    ``rollouts``, ``mine``, ``samples``, ``audit``, ``equal_compute``, ``equal_compute_cap``, ``stop_at_success`` may be
    less or other, ``strategies`` fewer or in another order, ``max_prompts`` less.

    Seconds and bytes follow passes while mining, and the number of samples behind it; what a strategy takes to propose
    is taken as it was, though with fewer rollouts and samples it may be less. What no measured prompt reached takes
    forever.
    """
    count = sample.usable if config.max_prompts is None else min(config.max_prompts, sample.usable)
    times = count / len(sample.rollouts)
    (spent, zero_hit), (before, _) = (mining(sample, *_drawn(own)) for own in (config, sample.config))
    share = spent.passes / before.passes * times
    stages = {"sample": sample.sampling * share, "verify": sample.verifying * share}
    tokens, passes = spent.decoded * times, spent.passes * times
    costs = [Cost("mine", count, tokens, passes, stages, sample.mined_disk * share, sample.mined_memory)]
    arms, left, control = _arms(sample, config)
    grown = times * zero_hit / max(len(sample.zero_hit), 1)
    costs += [_times(arm, grown) for arm in arms]
    return Estimate(
        config=config,
        prompts=count,
        sampled=len(sample.rollouts),
        zero_hit=wilson(zero_hit, len(sample.rollouts)),
        recovered=(len(sample.zero_hit) - left) * times,
        control=control,
        costs=costs,
        disk=sample.rest * times + sum(cost.disk for cost in costs),
        gpus=sample.gpus,
    )


def _drawn(config: RecoverConfig) -> tuple[int, int, int]:
    return config.rollouts, config.mine.rounds, config.mine.stop_after_correct


def _arms(sample: Measured, config: RecoverConfig) -> tuple[list[Cost], float, int]:
    """The arms over the measured zero-hit prompts, how many of these none is expected to recover, and the size of the
    equal-compute control."""
    costs, left = list[Cost](), dict.fromkeys(sample.zero_hit, 1.0)  # the chance that none before has recovered it
    for name in config.strategies:
        own, given = sample.arms[name], left if config.stop_at_success else dict.fromkeys(left, 1.0)
        kept = _kept(own, sample.config.samples, config.samples)
        costs.append(_arm(name, own, sum(given.values()), kept))
        if config.audit and (wrong := sample.arms.get(name + WRONG)):
            aimed = sum(chance for prompt, chance in given.items() if prompt in sample.aimed)
            costs.append(_arm(name + WRONG, wrong, aimed, _kept(wrong, sample.config.samples, config.samples)))
        for prompt, tries in own.tries.items():
            draws = max(1, round(_fewer(tries.samples, sample.config.samples, config.samples)))
            left[prompt] *= 1.0 - pass_at_k(tries.samples, tries.admitted, draws)
    size, pool = 0, sample.arms.get(POOL)
    if config.equal_compute and pool is not None and pool.tries:
        spent = [cost.passes for cost in costs if not cost.name.endswith(WRONG)]
        size = control_size(config, spent, len(left), sample.fresh)
        costs.append(_arm(POOL, pool, len(left), size / max(tries.samples for tries in pool.tries.values())))
    return costs, sum(left.values()), size


def _arm(name: str, own: ArmTook, given: float, kept: float) -> Cost:
    """An arm over so many prompts, with this share of its samples."""
    if not own.prompts:
        unknown = math.inf if given else 0.0
        stages = dict.fromkeys(("revise", "sample", "verify"), unknown)
        return Cost(name, given, unknown, unknown, stages, unknown, own.memory)
    share = given / own.prompts
    stages = {
        "revise": share * own.proposing.seconds,
        "sample": share * kept * own.sampling.seconds,
        "verify": share * kept * own.verifying,
    }
    tokens = share * (own.proposing.decoded + kept * own.sampling.decoded)
    passes = share * (own.proposing.passes + kept * own.sampling.passes)
    return Cost(name, given, tokens, passes, stages, share * kept * own.disk, own.memory)


def _times(cost: Cost, factor: float) -> Cost:
    return replace(
        cost,
        prompts=factor * cost.prompts,
        tokens=factor * cost.tokens,
        passes=factor * cost.passes,
        stages={stage: factor * seconds for stage, seconds in cost.stages.items()},
        disk=factor * cost.disk,
    )


def _fewer(drawn: int, before: int, now: int) -> float:
    """Samples of a prompt of which ``drawn`` were taken where ``before`` were asked for, if ``now`` are. Who took less
    had no more to take; who took more draws in rounds."""
    return min(drawn, now * max(1.0, drawn / before))


def _kept(own: ArmTook, before: int, now: int) -> float:
    """The same as a share of all samples of an arm."""
    drawn = [tries.samples for tries in own.tries.values()]
    return sum(_fewer(count, before, now) for count in drawn) / sum(drawn) if drawn else 1.0


def estimate_text(found: Estimate, left_out: int = 0, workers: int = 1) -> str:
    """The estimate as a table, and what most of the time goes into. left_out: rows that are not usable."""
    share, low, high = found.zero_hit
    lines = [
        f"{found.prompts:,} prompts ({left_out:,} rows left out); measured on {found.sampled:,} of them",
        f"zero-hit: {share:.0%} [{low:.0%}, {high:.0%}]",
        f"{'':24} {'prompts':>9} {'tokens':>12} {'passes':>13} {'hours':>8} {'GPU hours':>9} {'memory GB':>9}"
        f" {'disk GB':>8}  limited by",
    ]
    for line in found.costs:
        hours, memory = line.seconds / 3600, "" if line.memory is None else f"{line.memory / 1e9:,.3g}"
        lines.append(
            f"{line.name:24} {line.prompts:>9,.0f} {line.tokens:>12,.0f} {line.passes:>13,.0f} {hours:>8,.3g}"
            f" {hours * found.gpus:>9,.3g} {memory:>9} {line.disk / 1e9:>8,.3g}  {line.limit}"
        )
    total, least, most = (seconds / 3600 / workers for seconds in found.seconds)
    largest = max(found.costs, key=lambda line: line.seconds)
    part = largest.seconds / max(found.seconds[0], 1e-9)
    peak = "not known here" if found.memory is None else f"{found.memory / 1e9:,.3g} GB at the peak of the sample"
    lines += [
        f"in all {total:,.3g} hours [{least:,.3g}, {most:,.3g}] on {workers} worker{'s' * (workers > 1)} like this one,"
        f" {total * workers * found.gpus:,.3g} GPU hours; {part:.0%} of it is {largest.name}, by {largest.limit}",
        f"disk {found.disk / 1e9:,.3g} GB; memory {peak}",
    ]
    if not share:
        lines.append("no sampled prompt is zero-hit, so nothing is known of what follows mining; raise --sample")
    return "\n".join(lines)
