"""``pivot-pair``: change several decisions of a failed rollout at once, where no single change shows in the answer.

The decisions are the places of highest entropy in the first step. A *combination* forces one plausible token at each of
them and keeps what stands between. Few combinations are all scored exactly. Of many, those to be scored are found
*row by row*: all decisions but the last are hard tokens, the last is the uniform mixture of its plausible ones, and one
gradient ranks these. With two decisions in mixtures at once a gradient ranks nothing: the mixed state is none that
tokens can reach. Our own decision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice, product

import torch

from latentrevise.data.records import Rollout, row_seed
from latentrevise.errors import ConfigError
from latentrevise.model.branches import Branch, score_branches
from latentrevise.model.compute import Compute
from latentrevise.revise.hull import Mixture
from latentrevise.revise.reviser import Reviser
from latentrevise.revise.revision import FailedRollout, ReviseConfig
from latentrevise.strategies.base import Choice, Proposal, Tools, Work
from latentrevise.strategies.candidates import (
    ForkConfig,
    Reader,
    charged,
    chosen,
    next_steps,
    one_greedy_each,
    read,
    room,
    target_values,
)


@dataclass(frozen=True)
class PairConfig:
    """Which combinations are looked at.

    decisions: how many places are changed together. steps: they are looked for in the first so many steps of the
    rollout. p_min, max_values: the probability a token needs to be one of a decision's values, and how many there may
    be; it takes the place of ``forks.p_min``, since a combination may hold two rare tokens.
    exhaustive: score all combinations if there are no more. Otherwise rows: combinations of all decisions but the last
    that are tried, the most probable first; rescored: combinations that are scored, the best by their row's gradient.
    beam: see ``Beam``, which knows no ``exhaustive``, ``rows`` and ``rescored``.
    marker: what the model writes when it finds its own step wrong ("wait", as it stands behind a step). With it, each
    value of the first decision is tried with the rest of the rollout's step as it was and one more step is written;
    only the ``marker_keep`` values behind which the marker is least probable remain. It reads no answer.
    """

    decisions: int = 2
    steps: int = 1
    p_min: float = 0.001
    max_values: int = 32
    exhaustive: int = 256
    rows: int = 256
    rescored: int = 64
    beam: int = 4
    marker: str | None = None
    marker_keep: int = 4

    def __post_init__(self) -> None:
        if not 0.0 < self.p_min < 1.0:
            raise ConfigError(f"PairConfig.p_min = {self.p_min!r}: it must be in (0, 1)")
        for name in ("decisions", "steps", "max_values", "rows", "rescored", "beam", "marker_keep"):
            if getattr(self, name) < 1:
                raise ConfigError(f"PairConfig.{name} = {getattr(self, name)!r}: it must be at least 1")


@dataclass
class Decisions:
    """Where one rollout is changed, and into what.

    positions: in its completion, ascending. values: (token, logprob in nats) at each, the most probable first, given
    the rollout's own tokens before. end: of the step the last position lies in. entropy: of the policy at the first
    position, nats. compute: what was spent on them so far.
    """

    item: Work
    rollout: Rollout
    positions: tuple[int, ...] = ()
    values: list[list[tuple[int, float]]] = field(default_factory=list)
    end: int = 0
    entropy: float = 0.0
    compute: Compute = field(default_factory=Compute)

    @property
    def combinations(self) -> int:
        return math.prod(len(values) for values in self.values) if self.values else 0

    @property
    def row_tokens(self) -> int:
        """Tokens of a row that no cache holds: from its first forced one up to the last decision."""
        return self.positions[-1] - self.positions[0]

    def forced(self, row: Sequence[int]) -> tuple[int, ...]:
        """The completion up to the last decision, with the row's tokens in place of its own."""
        ids = list(self.rollout.completion_ids[: self.positions[-1]])
        for at, token in zip(self.positions, row, strict=False):
            ids[at] = token
        return tuple(ids)


Combination = tuple[tuple[int, ...], int]  # tokens of all decisions but the last, token of the last


@dataclass(frozen=True)
class Pair:
    """One greedy continuation of each of the best combinations.

    More than one combination often gives the target, and only one is right: so samples are spread, never put on one.
    """

    name: str
    forks: ForkConfig
    config: PairConfig
    uses_answer: bool = True
    backend: str = "none"

    def propose(self, tools: Tools, work: Sequence[Work], samples: int) -> list[list[Proposal]]:
        reader = Reader(tools, work[0].template_ids, self.forks.banned)
        found = self._decisions(tools, reader, work)
        if self.config.marker is not None:
            self._check_first(tools, reader, [own for own in found if own.values], self.config.marker)
        listed = self._listed(tools, found)
        branches = [
            (own.item, own.forced(row), own.positions[-1], last)
            for own, combinations in zip(found, listed, strict=True)
            for row, last in combinations
        ]
        scored = iter(target_values(tools, reader, branches, self.forks.step_tokens))
        proposals = []
        for own, combinations in zip(found, listed, strict=True):
            values = []
            for _ in combinations:
                value, compute = next(scored)
                values.append(value)
                own.compute += compute
            # A stable sort: of equal values the first listed.
            order = sorted(range(len(values)), key=lambda i: values[i], reverse=True)
            ranked = [self._proposal(own, combinations[i], values[i], len(values)) for i in order[:samples]]
            proposals.append(charged(one_greedy_each(ranked, samples), samples, own.compute))
        return proposals

    def _listed(self, tools: Tools, found: Sequence[Decisions]) -> list[list[Combination]]:
        """The combinations to be scored exactly. The rows' tokens are charged here."""
        few = [own.combinations <= self.config.exhaustive for own in found]
        ranked = iter(self._by_row(tools, [own for own, all_ in zip(found, few, strict=True) if not all_]))
        listed = []
        for own, all_ in zip(found, few, strict=True):
            if all_ and own.values:
                own.compute += Compute(forward=own.row_tokens * (own.combinations // len(own.values[-1])))
            listed.append([_combination(own, i) for i in range(own.combinations)] if all_ else next(ranked))
        return listed

    def _decisions(self, tools: Tools, reader: Reader, work: Sequence[Work]) -> list[Decisions]:
        """The places of highest entropy at which there is a choice; none where a rollout offers none."""
        found = [Decisions(item, chosen(item)[0]) for item in work]
        windows = []
        for own in found:
            ids = own.rollout.completion_ids
            stop = min(reader.reasoning(ids), room(tools, own.item, self.forks.step_tokens))
            ends = [end for end in reader.ends(ids) if end <= stop]
            end = next(islice(ends, self.config.steps - 1, None), stop)
            windows.append(ids[: min(end, self.config.steps * self.forks.step_tokens)])
        usable = [(own, ids) for own, ids in zip(found, windows, strict=True) if ids]
        readings = read(
            tools, [(own.item.prompt.ids, ids) for own, ids in usable], self.config.p_min, self.config.max_values
        )
        for (own, ids), reading in zip(usable, readings, strict=True):
            own.compute += Compute(forward=len(ids) - 1)
            values = [[v for v in listed if reader.may_force(v[0])] for listed in reading.alternatives]
            open_ = [at for at in range(len(ids)) if len(values[at]) > 1]
            open_.sort(key=lambda at: -reading.entropies[at])
            own.positions = tuple(sorted(open_[: self.config.decisions]))
            own.values = [values[at] for at in own.positions]
            if own.values:
                last = own.positions[-1]
                ends = reader.ends(own.rollout.completion_ids)
                own.end = next((end for end in ends if last < end <= len(ids)), len(ids))
                own.entropy = reading.entropies[own.positions[0]]
        return found

    def _check_first(self, tools: Tools, reader: Reader, found: Sequence[Decisions], marker: str) -> None:
        """Keep the values of the first decision behind which the model is the least likely to find fault."""
        marker_ids = tuple(tools.tokenizer.encode(marker, add_special_tokens=False))
        if not marker_ids:
            raise ConfigError(f"PairConfig.marker = {marker!r} has no token under this tokenizer; give another text")
        tried = [(own, value) for own in found for value in own.values[0]]
        stems = []
        for own, (token, _) in tried:
            ids = list(own.rollout.completion_ids[: own.end])
            ids[own.positions[0]] = token
            stems.append((own.item.prompt.ids, ids))
        written = next_steps(tools, reader, stems, self.forks.step_tokens)
        trunks, branches = [], []
        for i, ((prompt, ids), (own, _), (step, decoded)) in enumerate(zip(stems, tried, written, strict=True)):
            stem = (*prompt, *ids)
            first = len(own.item.prompt.ids) + own.positions[0]
            before = (*stem[first:], *step)
            trunks.append(stem[:first])
            branches.append(Branch(i, first, (*before, *marker_ids), scored_from=len(before)))
            own.compute += Compute(forward=len(stem) - first + len(marker_ids) - 1, decoded=decoded)
        scores = iter(score_branches(tools.policy, trunks, branches, token_budget=tools.token_budget).total.tolist())
        for own in found:
            fault = [next(scores) for _ in own.values[0]]
            order = sorted(range(len(fault)), key=lambda i: fault[i])
            own.values[0] = [own.values[0][i] for i in sorted(order[: self.config.marker_keep])]

    def _by_row(self, tools: Tools, found: Sequence[Decisions]) -> list[list[Combination]]:
        """The combinations that the rows' gradients rank first.

        With the last decision at the mixture ``z``, a token ``v`` in its place gives about
        ``-NLL(z) - <dNLL/dz, E_v - z>``; one forward and backward pass a row, over the last decision, what is left of
        the rollout's own step, the template and the answer.
        """
        rows: list[tuple[int, tuple[int, ...]]] = []
        rollouts: list[FailedRollout] = []
        mixtures: list[Mixture] = []
        for i, own in enumerate(found):
            item, last = own.item, own.positions[-1]
            rest = own.rollout.completion_ids[last + 1 : own.end]
            mixture = _uniform_then([token for token, _ in own.values[-1]], rest)
            likely = sorted(product(*own.values[:-1]), key=lambda row: -sum(logprob for _, logprob in row))
            for row in likely[: self.config.rows]:
                tokens = tuple(token for token, _ in row)
                prefix = (own.rollout.completion_ids[last], *rest)
                prompt = (*item.prompt.ids, *own.forced(tokens))
                rows.append((i, tokens))
                rollouts.append(FailedRollout(prompt, prefix, (), item.answer_ids, template_ids=item.template_ids))
                mixtures.append(mixture)
                passed = _relaxed(own)
                own.compute += Compute(forward=own.row_tokens + passed, backward=passed)
        reviser = Reviser(tools.policy, ReviseConfig.answer_only(token_budget=tools.token_budget))
        scored: list[list[tuple[float, Combination]]] = [[] for _ in found]
        table = tools.policy.table
        for (i, tokens), mixture, at in zip(rows, mixtures, reviser.value_and_grad(rollouts, mixtures), strict=True):
            values = mixture.ids[0].long()
            away = table[values].float() - mixture[:1].embed(table).float()
            linear = (-at.guide - away @ at.grad[0]).tolist()
            scored[i] += [(score, (tokens, v)) for score, v in zip(linear, values.tolist(), strict=True)]
        best = [sorted(own, key=lambda pair: -pair[0])[: self.config.rescored] for own in scored]
        return [[combination for _, combination in own] for own in best]

    def _proposal(self, own: Decisions, combination: Combination, value: float, candidates: int) -> Proposal:
        row, last = combination
        logprobs = [dict(values)[token] for values, token in zip(own.values, (*row, last), strict=True)]
        return Proposal(
            n=1,
            plain_ids=(*own.forced(row), last),
            parent=own.rollout.sample_id,
            original_ids=own.rollout.completion_ids[: own.positions[0]],
            trace=Choice(own.positions, (*row, last), tuple(logprobs), own.entropy, None, value, candidates),
        )


@dataclass(frozen=True)
class PairRandom(Pair):
    """The control of the ranking by row: combinations drawn at random, scored exactly, at equal compute.

    As many as the rows' gradients and the scores behind them would have paid for, at most all. That is so where
    ``pivot-pair`` scores all, too; to draw all would be the same.
    """

    def _listed(self, tools: Tools, found: Sequence[Decisions]) -> list[list[Combination]]:
        listed = []
        for own in found:
            # To score a combination takes what a row's forward pass does, as far as its step is as long as the
            # rollout's own; and a backward pass takes twice that.
            rows = min(self.config.rows, own.combinations // len(own.values[-1])) if own.values else 0
            count = self.config.rescored + 3 * rows
            draw = torch.Generator().manual_seed(row_seed(own.item.seed, self.name))
            drawn = torch.randperm(own.combinations, generator=draw)[:count].tolist()
            listed.append([_combination(own, i) for i in drawn])
            own.compute += Compute(forward=own.row_tokens * len({row for row, _ in listed[-1]}) if drawn else 0)
        return listed


def _relaxed(own: Decisions) -> int:
    """Tokens behind a row up to the last one of the answer, which is predicted and not fed."""
    return own.end - own.positions[-1] + len(own.item.template_ids) + len(own.item.answer_ids) - 1


def _combination(own: Decisions, index: int) -> Combination:
    """Combination number ``index``; the last decision changes fastest."""
    tokens = []
    for values in reversed(own.values):
        index, i = divmod(index, len(values))
        tokens.append(values[i][0])
    return tuple(reversed(tokens[1:])), tokens[0]


def _uniform_then(tokens: Sequence[int], rest: Sequence[int]) -> Mixture:
    """The uniform mixture of ``tokens``, and behind it the tokens of ``rest`` as they are."""
    ids = torch.tensor([list(tokens), *[[token] * len(tokens) for token in rest]], dtype=torch.int32)
    weights = torch.zeros(ids.shape)
    weights[:, 0] = 1.0
    weights[0] = 1.0 / len(tokens)
    return Mixture(ids, weights)
