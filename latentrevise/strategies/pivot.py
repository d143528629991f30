"""``pivot``: force one plausible token on a failed rollout, chosen by how probable it makes the answer.

Every fork is tried as plain tokens: its step is completed greedily and the target scored behind it. Unlike a mixture of
embeddings, a branch can only raise the target's probability the way the policy itself would. Our own decision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from latentrevise.config import require
from latentrevise.data.records import Rollout, row_seed
from latentrevise.model.compute import Compute
from latentrevise.revise.reviser import Reviser
from latentrevise.revise.revision import FailedRollout, ReviseConfig
from latentrevise.strategies.base import Proposal, Tools, Work
from latentrevise.strategies.candidates import (
    Fork,
    ForkConfig,
    Forks,
    Reach,
    Reader,
    charged,
    chosen,
    continue_from,
    find_forks,
    one_greedy_each,
    score,
    spread,
    whole,
)


@dataclass(frozen=True)
class PivotConfig:
    """How forks are scored and which are taken.

    scope: forks off the rollouts ``chosen`` for revision, or off the trie of ``all`` failed ones. order: which forks
    are scored where there are more than ``max_forks``: those of the highest ``entropy`` of the policy there; of the
    highest ``mass``; of the highest ``gain``, the linear estimate of what the token does to the target's
    log-probability at the end of the step in place of the rollout's own (one forward and backward pass a step).
    mass_weight: a branch's score is ``value + mass_weight * mass``; with 1 that is, up to a constant, the branch's
    log-probability given the target. keep: the best branches that the samples are spread over; 0: one greedy
    continuation of each of the best.
    """

    scope: Literal["chosen", "all"] = "chosen"
    order: Literal["entropy", "mass", "gain"] = "entropy"
    mass_weight: float = 0.0
    keep: int = 0

    def __post_init__(self) -> None:
        require(self, keep=(self.keep >= 0, "0 or more"), mass_weight=(self.mass_weight >= 0, "0 or more"))

    def score(self, fork: Fork) -> float:
        """What a fork that was scored is ranked by."""
        assert fork.value is not None
        return fork.value + self.mass_weight * fork.mass


@dataclass(frozen=True)
class Pivot:
    """Score branches by the target, continue from the best."""

    name: str
    forks: ForkConfig
    config: PivotConfig
    uses_answer: bool = True
    backend: str = "none"

    def propose(self, tools: Tools, work: Sequence[Work], samples: int) -> list[list[Proposal]]:
        reader = Reader(tools, work[0].template_ids, self.forks.banned)
        found = candidates(tools, reader, work, self.forks, self.config)
        proposals = []
        for own in score(tools, reader, work, found, self.forks.step_tokens):
            best = sorted(own.forks, key=self.config.score, reverse=True)
            ranked = [continue_from(fork, len(best)) for fork in best]
            keep = self.config.keep
            made = spread(ranked[:keep], samples) if keep else one_greedy_each(ranked, samples)
            proposals.append(charged(made, samples, own.compute))
        return proposals


@dataclass(frozen=True)
class PivotRandom:
    """The control of ``pivot``: its candidates, and one greedy continuation of each of ``samples`` drawn at random."""

    forks: ForkConfig
    config: PivotConfig
    name: str = "pivot-random"
    uses_answer: bool = False
    backend: str = "none"

    def propose(self, tools: Tools, work: Sequence[Work], samples: int) -> list[list[Proposal]]:
        reader = Reader(tools, work[0].template_ids, self.forks.banned)
        proposals = []
        for item, own in zip(work, candidates(tools, reader, work, self.forks, self.config), strict=True):
            draw = torch.Generator().manual_seed(row_seed(item.seed, self.name))
            order = torch.randperm(len(own.forks), generator=draw).tolist()
            drawn = [continue_from(own.forks[i], len(order)) for i in order]
            proposals.append(charged(one_greedy_each(drawn, samples), samples, own.compute))
        return proposals


def candidates(
    tools: Tools,
    reader: Reader,
    work: Sequence[Work],
    forks: ForkConfig,
    config: PivotConfig,
    reach: Reach = whole,
) -> list[Forks]:
    """The forks to be scored, at most ``max_forks`` a prompt. reach: see ``find_forks``."""
    rollouts = [chosen(item) if config.scope == "chosen" else item.failed for item in work]
    found = find_forks(tools, reader, work, rollouts, forks, reach)
    many = [i for i, own in enumerate(found) if len(own.forks) > forks.max_forks]
    if config.order == "gain":
        keys = _gains(tools, reader, [work[i] for i in many], [found[i] for i in many])
    else:
        keys = [[getattr(fork, config.order) for fork in found[i].forks] for i in many]
    for i, key in zip(many, keys, strict=True):
        own = found[i].forks
        # Of one place the more probable token first; a sort is stable, so the rest keeps its order.
        ranked = sorted(range(len(own)), key=lambda j: (key[j], own[j].logprob), reverse=True)
        found[i].forks = [own[j] for j in ranked[: forks.max_forks]]
    return found


def _gains(tools: Tools, reader: Reader, work: Sequence[Work], found: Sequence[Forks]) -> list[list[float]]:
    """``<g, E[own token] - E[forced token]>`` of each fork, ``g`` the gradient of the target's NLL at the end of the
    step, with respect to the embedding at the fork; what it took is charged to ``found``."""
    steps: dict[tuple[int, str, int], tuple[int, Rollout, int]] = {}
    step_of: list[list[tuple[int, str, int]]] = []
    for i, own in enumerate(found):
        step_of.append([])
        for fork in own.forks:
            end = _step_end(reader, fork)
            key = i, fork.rollout.sample_id, end
            steps[key] = i, fork.rollout, end
            step_of[i].append(key)
    rows = [
        FailedRollout(
            work[i].prompt.ids,
            rollout.completion_ids[:end],
            (),
            work[i].answer_ids,
            template_ids=work[i].template_ids,
        )
        for i, rollout, end in steps.values()
    ]
    reviser = Reviser(tools.policy, ReviseConfig.answer_only(token_budget=tools.token_budget))
    gradients: dict[tuple[int, str, int], Tensor] = {}
    for key, row, evaluation in zip(steps, rows, reviser.value_and_grad(rows), strict=True):
        gradients[key] = evaluation.grad
        passed = len(row.prefix_ids) + len(row.template_ids) + len(row.answer_ids) - 1
        found[key[0]].compute += Compute(forward=passed, backward=passed)
    table = tools.policy.table

    def gain(fork: Fork, step: tuple[int, str, int]) -> float:
        move = table[fork.rollout.completion_ids[fork.at]].float() - table[fork.token].float()
        return float(gradients[step][fork.at] @ move)

    return [
        [gain(fork, step) for fork, step in zip(own.forks, keys, strict=True)]
        for own, keys in zip(found, step_of, strict=True)
    ]


def _step_end(reader: Reader, fork: Fork) -> int:
    """Where the rollout's step ends that the fork lies in."""
    ids = fork.rollout.completion_ids
    stop = max(reader.reasoning(ids), fork.at + 1)
    return next((end for end in reader.ends(ids) if fork.at < end <= stop), stop)
