"""Settings that fit a budget of hours, from what a sample took; what loses least is given up first.

    rounds      mining in rounds of ROUND rollouts: solved prompts have fewer rollouts; zero-hit prompts are the same
    control     the equal-compute control smaller, or none: no row is lost, what it is compared with is
    audit       no wrong-target arms: no row is lost, the wrong-target rates are
    chain       strategies one after another, the cheapest first, until one recovers the prompt: no recovered prompt is
                lost, further rows of it and the comparison are
    rollouts    fewer, down to a quarter: prompts that a later rollout would have solved count as zero-hit
    samples     fewer, down to a quarter: fewer recovered prompts
    strategies  fewer: first without the one whose prompts, which no other recovers, cost most
    prompts     fewer, but no fewer than were measured

Of each the mildest form that fits is taken, else the one that costs least, if that saves anything to speak of; then the
next is taken besides. When it fits, each is taken back as far as it still does, the last one first. All our own
decision.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml

from latentrevise.config import unlike
from latentrevise.errors import ConfigError, InputError
from latentrevise.recovery.estimate import Estimate, expected
from latentrevise.recovery.measure import Measured
from latentrevise.recovery.settings import RecoverConfig

ROUND = 4
"""Rollouts of a round that is proposed: what the page on scale measures."""
SAVES = 0.01
"""Of the hours, what a change must save at least to be worth what it loses."""
PART = 4
"""Rollouts and samples go down to one in so many."""

Changes = Mapping[str, Any]
"""Settings of a run by name, with their new values."""
Forms = Callable[[Measured, Estimate, float], Iterator[Changes]]
"""Of a sample, what is expected, and the seconds that one worker would have: what may be changed, the mildest first."""


@dataclass(frozen=True)
class Lever:
    """forms: what it may change; loses: what for, in words."""

    loses: str
    forms: Forms


@dataclass(frozen=True)
class Step:
    """A change, and what the run takes with it and all before it."""

    lever: Lever
    changes: Changes
    found: Estimate


@dataclass(frozen=True)
class Proposal:
    """before: the run as it was asked for. steps: what to change, none where it fits as it is. fits: whether it then
    does; else it is the least that there is."""

    before: Estimate
    steps: list[Step]
    fits: bool

    @property
    def found(self) -> Estimate:
        return self.steps[-1].found if self.steps else self.before


def hours_of(text: str) -> float:
    """``12h`` or ``90m`` in hours. Raises ConfigError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([hm])", text)
    hours = 0.0 if found is None else float(found[1]) / (60 if found[2] == "m" else 1)
    if not hours:
        raise ConfigError(
            f"--budget {text!r}: it is no time above zero with its unit; write hours or minutes, such as 12h or 90m"
        )
    return hours


def _rounds(sample: Measured, found: Estimate, budget: float) -> Iterator[Changes]:
    config = found.config
    if config.mine.rounds == 1 and config.rollouts >= 2 * ROUND:
        yield {"mine": replace(config.mine, rounds=config.rollouts // ROUND)}


def _control(sample: Measured, found: Estimate, budget: float) -> Iterator[Changes]:
    if found.control:
        yield from ({"equal_compute_cap": cap} for cap in range(found.control - 1, found.config.samples - 1, -1))
        yield {"equal_compute": False}


def _audit(sample: Measured, found: Estimate, budget: float) -> Iterator[Changes]:
    if found.config.audit:
        yield {"audit": False}


def _chain(sample: Measured, found: Estimate, budget: float) -> Iterator[Changes]:
    names, each = found.config.strategies, {line.name: line.seconds for line in found.costs}
    if not found.config.stop_at_success and len(names) > 1:
        yield {"stop_at_success": True, "strategies": tuple(sorted(names, key=each.__getitem__))}


def _rollouts(sample: Measured, found: Estimate, budget: float) -> Iterator[Changes]:
    config = found.config
    for count in range(config.rollouts - 1, math.ceil(config.rollouts / PART) - 1, -1):
        yield {"rollouts": count, **_rounds_of(config, "mine", max(count // ROUND, 1))}


def _samples(sample: Measured, found: Estimate, budget: float) -> Iterator[Changes]:
    config = found.config
    least = max(math.ceil(config.samples / PART), config.revised_rollouts)
    for count in range(config.samples - 1, least - 1, -1):
        yield {
            "samples": count,
            **_rounds_of(config, "continuations", count),
        }  # no larger rounds: they would stop later


def _rounds_of(config: RecoverConfig, name: str, most: int) -> Changes:
    own = getattr(config, name)
    return {} if own.rounds <= most else {name: replace(own, rounds=most)}


def _strategies(sample: Measured, found: Estimate, budget: float) -> Iterator[Changes]:
    while len(names := found.config.strategies) > 1:
        tried = [tuple(name for name in names if name != dropped) for dropped in names]
        others = [expected(sample, replace(found.config, strategies=kept)) for kept in tried]
        cheaper = [other for other in others if other.seconds[0] < found.seconds[0]]
        if not cheaper:
            return

        def lost(other: Estimate, found: Estimate = found) -> tuple[float, float]:
            saved = found.seconds[0] - other.seconds[0]
            return (found.recovered - other.recovered) / saved, -saved

        found = min(cheaper, key=lost)
        yield {"strategies": found.config.strategies}


def _prompts(sample: Measured, found: Estimate, budget: float) -> Iterator[Changes]:
    count = max(int(found.prompts * budget / found.seconds[0]), len(sample.rollouts))
    if count < found.prompts:
        yield {"max_prompts": count}


LEVERS = (
    Lever("correct rollouts of solved prompts beyond those that stop them", _rounds),
    Lever("no row; how far the equal-compute control reaches", _control),
    Lever("no row; the wrong-target rates", _audit),
    Lever("further rows of recovered prompts; the comparison of strategies", _chain),
    Lever("prompts that later rollouts would have solved count as zero-hit", _rollouts),
    Lever("recovered prompts, as far as fewer samples find none", _samples),
    Lever("recovered prompts that only these strategies recovered", _strategies),
    Lever("prompts", _prompts),
)


def propose(sample: Measured, hours: float, workers: int = 1) -> Proposal:
    """Settings by which a run over all that the sample stands for takes ``workers`` at most so many hours; what it
    takes by the settings of the sample where that is enough.

    Raises InputError where no measured prompt is zero-hit, since nothing is then known of what follows mining.
    """
    if not sample.zero_hit:
        raise InputError(
            f"none of the {len(sample.rollouts)} measured prompts is zero-hit, so it is not known what follows mining,"
            " and no settings can be proposed; raise --sample"
        )
    budget = hours * 3600 * workers
    before = expected(sample, sample.config)
    taken: list[tuple[Lever, Changes]] = []
    for lever in LEVERS:
        found = expected(sample, _with(sample, taken))
        if _fits(found, budget):
            break
        chosen = _form(sample, lever, found, budget)
        if chosen is not None:
            taken.append((lever, chosen))
    if fits := _fits(expected(sample, _with(sample, taken)), budget):
        taken = _taken_back(sample, taken, budget)
    steps = [
        Step(lever, changes, expected(sample, _with(sample, taken[: i + 1])))
        for i, (lever, changes) in enumerate(taken)
    ]
    return Proposal(before, steps, fits)


def _fits(found: Estimate, budget: float) -> bool:
    return found.seconds[0] <= budget * (1 + 1e-9)  # sums round


def _with(sample: Measured, taken: Sequence[tuple[Lever, Changes]]) -> RecoverConfig:
    config = sample.config
    for _, changes in taken:
        config = replace(config, **changes)
    return config


def _form(sample: Measured, lever: Lever, found: Estimate, budget: float) -> Changes | None:
    """The mildest form that fits, else the cheapest that saves something; None where none does."""
    cheapest, least = None, found.seconds[0] * (1 - SAVES)
    for changes in lever.forms(sample, found, budget):
        changed = expected(sample, replace(found.config, **changes))
        if _fits(changed, budget):
            return changes
        if changed.seconds[0] < least:
            cheapest, least = changes, changed.seconds[0]
    return cheapest


def _taken_back(sample: Measured, taken: Sequence[tuple[Lever, Changes]], budget: float) -> list[tuple[Lever, Changes]]:
    """The changes without those that are not needed beside the others, and the others no harsher than they must be."""
    kept = list(taken)
    for step in reversed(taken):
        i = kept.index(step)
        others = [*kept[:i], *kept[i + 1 :]]
        without = expected(sample, _with(sample, others))
        if _fits(without, budget):
            kept = others
            continue
        for changes in step[0].forms(sample, without, budget):
            milder = [*kept[:i], (step[0], changes), *kept[i + 1 :]]
            if _fits(expected(sample, _with(sample, milder)), budget):
                kept = milder
                break
    return kept


def proposal_text(proposal: Proposal, hours: float, workers: int = 1) -> str:
    """The changes as a table, what each saves and loses, and the settings as YAML that ``--config`` reads; all but the
    settings is a comment. Raises ConfigError with the least that it can be where nothing fits."""

    def of(found: Estimate) -> float:
        return found.seconds[0] / 3600 / workers

    before, after = proposal.before, proposal.found
    by = f"{workers} worker{'s' * (workers > 1)}"
    if not proposal.fits:
        raise ConfigError(
            f"--budget: no settings fit {hours:,.3g} hours on {by}; the least is {of(after):,.3g} hours"
            f" ({_assigned(before, after) or 'nothing can be given up'}); give more hours, or more --workers"
        )
    lines = [
        f"budget: {hours:,.3g} hours on {by}; as asked for {of(before):,.3g}, by these settings {of(after):,.3g}",
        f"{'hours':>9} {'saved':>9} {'recovered':>10}  what is changed, and lost",
        f"{of(before):>9,.3g} {'':>9} {before.recovered:>10,.1f}  nothing",
    ]
    for step in proposal.steps:
        saved, changes = of(before) - of(step.found), _assigned(before, step.found)
        numbers = f"{of(step.found):>9,.3g} {saved:>9,.3g} {step.found.recovered:>10,.1f}"
        lines.append(f"{numbers}  {changes}: {step.lever.loses}")
        before = step.found
    settings = yaml.safe_dump(unlike(after.config, RecoverConfig()), sort_keys=False).rstrip()
    return "\n".join([*(f"# {line}" for line in lines), settings])


def _assigned(before: Estimate, after: Estimate) -> str:
    """The settings that changed, as ``a.b=value``."""

    def each(values: Mapping[str, Any], path: str = "") -> Iterator[str]:
        for name, value in values.items():
            if isinstance(value, Mapping):
                yield from each(value, f"{path}{name}.")
            else:
                text = yaml.safe_dump([value], default_flow_style=True, width=10**6).strip()[1:-1]
                yield f"{path}{name}={text}"

    return ", ".join(each(unlike(after.config, before.config)))
