"""Is the answer worth reading here? The implicit-value gate: measured on solved prompts, before compute is spent.

Strategies that score branches by ``log pi(answer | branch)`` can only win where that score knows which branch succeeds,
and whether it does is a property of the policy and the task. On prompts that the policy sometimes solves it can be
seen: leave a rollout by every plausible token, score each branch, continue each greedily, and ask how well the score
ranks the branches that succeed above those that fail. Our own decision; so are the thresholds, which were read from
one curve of a prototype, where noise was added to a good score until it was worth no more than gold-free branching.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from latentrevise.config import at_least_one
from latentrevise.data.records import decoded, row_seed
from latentrevise.engines import Request
from latentrevise.model.compute import Compute
from latentrevise.recovery.guards import auc, bootstrap_mean
from latentrevise.strategies.base import Tools, Work
from latentrevise.strategies.candidates import Fork, ForkConfig, Forks, Reader, chosen, find_forks, score

# AUC from which scoring beats gold-free branching: where a score costs nothing, and where it costs the share of a
# continuation that it did in the prototype.
FREE, CHARGED, CHARGED_COST = 0.8, 0.95, 0.2
FEWEST = 10  # prompts with both kinds of branches, below which nothing is recommended


@dataclass(frozen=True)
class GateConfig:
    """prompts: solved prompts looked at, at most; forks: branches of each, drawn at random where there are more."""

    prompts: int = 64
    forks: int = 32

    def __post_init__(self) -> None:
        at_least_one(self, "prompts", "forks")


def implicit_value(
    tools: Tools,
    work: Sequence[Work],
    succeeds: Callable[[Sequence[tuple[str, str]]], Sequence[bool]],
    forks: ForkConfig,
    config: GateConfig,
    checked: bool = False,
) -> dict[str, Any]:
    """Measure the gate on solved prompts. checked: the run has a step checker, so strategies that read it are advised.

    work: solved prompts, each with the rollout to leave among its ``cuts`` (a failed one, as in a recovery, where there
    is one). succeeds: judges (answer, completion) pairs. Returns what goes into ``gate.json``: the AUC within a prompt,
    averaged over the prompts that have branches of both kinds, ``[mean, low, high]`` with a bootstrap interval over
    prompts, of the answer score (``value``), of the policy's own log-probability of the branch (``prior``) and of their
    sum (``posterior``); costs in tokens a branch; and what it recommends.
    """
    work = list(work[: config.prompts])
    if not work:
        return _verdict([], 0, 0, 0.0, 0.0, checked)
    reader = Reader(tools, work[0].template_ids, forks.banned)
    found = [
        _drawn(item, own, config.forks) for item, own in zip(work, _forks(tools, reader, work, forks), strict=True)
    ]
    # What finding the forks took is not counted against the score: gold-free branching pays it, too.
    scored = score(tools, reader, work, [replace(own, compute=Compute()) for own in found], forks.step_tokens)
    pairs = [(item, fork) for item, own in zip(work, scored, strict=True) for fork in own.forks]
    requests = [Request((*item.prompt.ids, *fork.prefix_ids, fork.token)) for item, fork in pairs]
    greedy = replace(tools.sampling, temperature=0.0)
    params = [replace(greedy, max_new_tokens=min(greedy.max_new_tokens, tools.left(r.length))) for r in requests]
    completions = [own[0] for own in tools.engine.generate(requests, params)]
    texts = [decoded(tools.tokenizer, c.ids) for c in completions]
    labels = succeeds([(item.prompt.answer, text) for (item, _), text in zip(pairs, texts, strict=True)])
    by_prompt: dict[str, list[tuple[Fork, bool]]] = {}
    for (item, fork), label in zip(pairs, labels, strict=True):
        by_prompt.setdefault(item.prompt.id, []).append((fork, label))
    count = max(len(pairs), 1)
    scoring = sum(own.compute.passes for own in scored) / count
    continuing = sum(len(c.ids) + (c.finish_reason == "stop") for c in completions) / count
    return _verdict(list(by_prompt.values()), len(work), sum(labels), scoring, continuing, checked)


def _forks(tools: Tools, reader: Reader, work: Sequence[Work], config: ForkConfig) -> list[Forks]:
    return find_forks(tools, reader, work, [chosen(item) for item in work], config)


def _drawn(item: Work, own: Forks, most: int) -> Forks:
    draw = torch.Generator().manual_seed(row_seed(item.seed, "gate"))
    order = sorted(torch.randperm(len(own.forks), generator=draw).tolist()[:most])
    return replace(own, forks=[own.forks[i] for i in order])


_SCORES: dict[str, Callable[[Fork], float]] = {
    "value": lambda fork: fork.value or 0.0,
    "prior": lambda fork: fork.mass,
    "posterior": lambda fork: (fork.value or 0.0) + fork.mass,
}


def _verdict(
    prompts: Sequence[Sequence[tuple[Fork, bool]]],
    looked_at: int,
    successes: int,
    scoring: float,
    continuing: float,
    checked: bool,
) -> dict[str, Any]:
    mixed = [own for own in prompts if len({label for _, label in own}) == 2]
    rates = {
        name: list(
            bootstrap_mean(
                [auc([key(f) for f, good in own if good], [key(f) for f, good in own if not good]) for own in mixed]
            )
        )
        for name, key in _SCORES.items()
    }
    cost = scoring / continuing if continuing else 0.0
    break_even = FREE + (CHARGED - FREE) * min(1.0, cost / CHARGED_COST)
    strategies, reason = _recommended(rates["value"], break_even, len(mixed), checked)
    return {
        "prompts": looked_at,
        "prompts_with_both": len(mixed),
        "branches": sum(map(len, prompts)),
        "successes": successes,
        "auc": rates,
        "scoring_tokens": scoring,
        "continuation_tokens": continuing,
        "break_even": break_even,
        "recommended": strategies,
        "reason": reason,
    }


def _recommended(value: Sequence[float], break_even: float, prompts: int, checked: bool) -> tuple[list[str], str]:
    mean, low, high = value
    if prompts < FEWEST:
        return [], (
            f"only {prompts} solved prompts have both branches that succeed and branches that fail, fewer than"
            f" {FEWEST}: add easier prompts, or mine more rollouts"
        )
    known = f"the answer score's AUC is {mean:.2f} [{low:.2f}, {high:.2f}], break-even is at about {break_even:.2f}"
    scored, unscored = ("pivot-checked", "branch-checked") if checked else ("pivot", "branch-mass")
    if low >= break_even:
        return [scored], f"{known}: score branches by the answer"
    if high < break_even:
        return [unscored], f"{known}: leave the failures without reading the answer"
    return [scored, unscored], f"{known}, within the interval: try both on a few prompts"
