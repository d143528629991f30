"""What the discrete strategies share: where a failed rollout could have gone on differently, and what that leads to.

A *fork* leaves a failed rollout in front of one of its tokens and forces a plausible one that no rollout in view took
there. Its *branch* is the rollout up to there, the forced token, and the greedy completion of the step. Its *value* is
the log-probability of the target behind the branch and the answer template; the rest of the failed rollout, which
would repeat the error, is dropped. Its *mass* is the log-probability that a fresh rollout leaves the known ones by
this fork. All of it is our own decision.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

from torch import Tensor

from latentrevise.config import at_least_one, require
from latentrevise.data.boundary import Boundary
from latentrevise.data.records import Rollout
from latentrevise.engines import Request, SamplingParams
from latentrevise.model.branches import Branch, score_branches, visit_branches
from latentrevise.model.compute import Compute
from latentrevise.strategies.base import Choice, Proposal, Tools, Work, shares


@dataclass(frozen=True)
class ForkConfig:
    """Which forks are looked at.

    p_min: the probability a forced token needs where it is forced. The default suits moves that a model knows but
    seldom makes; 0.02 keeps the list short where rollouts are long. max_forks: looked at for each prompt; the strategy
    says which, where there are more. max_positions: of each rollout, its first ones; what an answer or ``banned`` opens
    is never looked at. step_tokens: a step ends here if no boundary does.
    banned: no token that holds one of these texts is forced, and a rollout's reasoning ends where one appears. Nor is
    a special token forced, or the word that opens the answer template: "answer now" is the leak in its discrete form.
    """

    p_min: float = 0.002
    max_forks: int = 64
    max_positions: int = 2048
    step_tokens: int = 64
    banned: tuple[str, ...] = ("</think>", "boxed")

    def __post_init__(self) -> None:
        require(
            self,
            p_min=(0.0 < self.p_min < 1.0, "in (0, 1)"),
            banned=(all(self.banned), "texts that are not empty: an empty one is in every token"),
        )
        at_least_one(self, "max_forks", "max_positions", "step_tokens")


@dataclass(frozen=True)
class Fork:
    """Leave ``rollout`` in front of its token ``at`` and force ``token``.

    logprob: of the token there; entropy: of the policy there; mass: of reaching the place and taking the token; value:
    of the target behind the branch, None where it was not scored. All in nats.
    """

    rollout: Rollout
    at: int
    token: int
    logprob: float
    entropy: float
    mass: float
    value: float | None = None

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        return self.rollout.completion_ids[: self.at]


@dataclass
class Forks:
    """The forks of one prompt, in the order of the rollouts and their positions, and what finding them took."""

    forks: list[Fork]
    compute: Compute = field(default_factory=Compute)


class Reader:
    """What tokens say: which of them may be forced, where an answer opens, where a step ends."""

    def __init__(self, tools: Tools, template_ids: Sequence[int], banned: tuple[str, ...]) -> None:
        self._tools = tools
        self._banned = banned
        # What opens an answer where it is none of the texts that are banned anyhow: "####", "Answer:".
        mark = str(tools.tokenizer.decode(list(template_ids))).strip()
        self._openers = banned if len(mark) < 2 or any(text in mark for text in banned) else (*banned, mark)
        self._template = frozenset(template_ids)
        self._texts: dict[int, str] = {}
        self._opener = next((text for token in template_ids if (text := self.text(token).strip())), None)
        self.boundary = tools.boundary or Boundary("\n", tools.tokenizer)
        self._ends: dict[tuple[int, ...], list[int]] = {}

    def text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = str(self._tools.tokenizer.decode([token]))
        return self._texts[token]

    def may_force(self, token: int) -> bool:
        text = self.text(token)
        return text.strip() != self._opener and not any(banned in text for banned in self._banned)

    def ends(self, ids: Sequence[int]) -> list[int]:
        """How many of a rollout's ids each of its steps ends behind; read once."""
        key = tuple(ids)
        if key not in self._ends:
            self._ends[key] = self.boundary.ends(key)
        return self._ends[key]

    def reasoning(self, ids: Sequence[int]) -> int:
        """How many tokens come before the answer, or whatever ``banned`` opens."""

        def banned(part: Sequence[int]) -> bool:
            text = self._tools.tokenizer.decode(list(part))
            return any(each in text for each in self._openers)

        if not banned(ids):
            return len(ids)
        # Such a text may be spread over tokens: where it is complete, then where it begins.
        end = bisect_left(range(len(ids)), True, key=lambda n: banned(ids[: n + 1]))
        last = end + 1
        while not banned(ids[end:last]):
            end -= 1
        while end and ids[end - 1] in self._template:
            end -= 1
        return end


def chosen(item: Work) -> list[Rollout]:
    """The failed rollouts that the run chose for revision."""
    names = {cut.sample_id for cut in item.cuts}
    return [rollout for rollout in item.failed if rollout.sample_id in names]


@dataclass(frozen=True)
class Reading:
    """The policy along a rollout: one row for each of its first ``len(logprobs)`` tokens.

    logprobs: of the rollout's own tokens; entropies; alternatives: (token, logprob) of the plausible ones, the most
    probable first, the rollout's own among them. All in nats.
    """

    logprobs: list[float]
    entropies: list[float]
    alternatives: list[list[tuple[int, float]]]


def read(
    tools: Tools, contexts: Sequence[tuple[Sequence[int], Sequence[int]]], p_min: float, count: int
) -> list[Reading]:
    """One pass over each (prompt, tokens), over equal prompts once; no more than ``count`` alternatives a position."""
    policy = tools.policy

    def measure(hidden: Tensor, targets: Tensor) -> list[tuple[float, float, list[tuple[int, float]]]]:
        logprobs, entropies = policy.head.logprob_and_entropy(hidden, targets)
        ids, values, _ = policy.head.plausible(hidden, p_min, count, policy.allowed)
        listed = [
            [(token, value) for token, value in zip(*pair, strict=True) if token >= 0]
            for pair in zip(ids.tolist(), values.tolist(), strict=True)
        ]
        return list(zip(logprobs.tolist(), entropies.tolist(), listed, strict=True))

    prompts = {prompt: t for t, prompt in enumerate(dict.fromkeys(tuple(prompt) for prompt, _ in contexts))}
    branches = [Branch(prompts[tuple(prompt)], len(prompt), ids) for prompt, ids in contexts]
    found, _ = visit_branches(policy, list(prompts), branches, measure, tools.token_budget)
    readings = []
    for parts in found:
        logprobs, entropies, listed = zip(*chain.from_iterable(parts), strict=True)
        readings.append(Reading(list(logprobs), list(entropies), list(listed)))
    return readings


def room(tools: Tools, item: Work, step_tokens: int) -> int:
    """Positions of a completion behind which a forced token, the step it opens and the scored answer still fit."""
    behind = 1 + step_tokens + len(item.template_ids) + len(item.answer_ids)
    return max(0, tools.left(len(item.prompt.ids) + behind))


Reach = Callable[[Work, Rollout], int]  # at how many places of a rollout, its first ones, forks may leave it


def whole(item: Work, rollout: Rollout) -> int:
    """All places of a rollout."""
    return len(rollout.completion_ids)


def find_forks(
    tools: Tools,
    reader: Reader,
    work: Sequence[Work],
    rollouts: Sequence[Sequence[Rollout]],
    config: ForkConfig,
    reach: Reach = whole,
) -> list[Forks]:
    """The forks off the trie of ``rollouts``, one list a piece of work. reach: rollouts that begin alike must be given
    the same, or their whole common beginning.

    The record of a rollout holds the log-probs of its own tokens alone, so each distinct one is run once more; that is
    charged, without the prompt, whose keys and values are those of the sampling.
    """
    paths: list[tuple[int, Rollout, tuple[int, ...]]] = []
    for i, (item, own) in enumerate(zip(work, rollouts, strict=True)):
        distinct: dict[tuple[int, ...], Rollout] = {}
        for rollout in own:
            # The token that opens the answer is one more place to go on instead.
            end = min(reader.reasoning(rollout.completion_ids) + 1, config.max_positions)
            end = min(end, room(tools, item, config.step_tokens), reach(item, rollout))
            distinct.setdefault(rollout.completion_ids[:end], rollout)
        paths += [(i, rollout, ids) for ids, rollout in distinct.items() if ids]
    readings = read(tools, [(work[i].prompt.ids, ids) for i, _, ids in paths], config.p_min, config.max_forks)
    found = [Forks([]) for _ in work]
    of_item: dict[int, list[tuple[Rollout, tuple[int, ...], Reading]]] = {}
    for (i, rollout, ids), reading in zip(paths, readings, strict=True):
        of_item.setdefault(i, []).append((rollout, ids, reading))
        found[i].compute += Compute(forward=len(ids) - 1)
    for i, read_paths in of_item.items():
        found[i].forks = [fork for fork in _off_trie(read_paths) if reader.may_force(fork.token)]
    return found


def _off_trie(paths: Sequence[tuple[Rollout, tuple[int, ...], Reading]]) -> Iterator[Fork]:
    """Every plausible step off the trie of the paths, where the first path that comes by finds it."""
    children: list[dict[int, int]] = [{}]
    places: dict[int, tuple[int, int, float]] = {}  # node: path, position, log-probability to get there
    for p, (_, ids, reading) in enumerate(paths):
        node, mass = 0, 0.0
        for at, token in enumerate(ids):
            places.setdefault(node, (p, at, mass))
            mass += reading.logprobs[at]
            if token not in children[node]:
                children[node][token] = len(children)
                children.append({})
            node = children[node][token]
    for node, (p, at, mass) in places.items():
        rollout, _, reading = paths[p]
        for token, logprob in reading.alternatives[at]:
            if token not in children[node]:
                yield Fork(rollout, at, token, logprob, reading.entropies[at], mass + logprob)


def most_probable(forks: Sequence[Fork]) -> list[Fork]:
    """By mass, the highest first; of one mass the more probable token."""
    return sorted(forks, key=lambda fork: (fork.mass, fork.logprob), reverse=True)


def next_steps(
    tools: Tools,
    reader: Reader,
    contexts: Sequence[tuple[Sequence[int], Sequence[int]]],
    step_tokens: int,
    least: int = 1,
) -> list[tuple[tuple[int, ...], int]]:
    """What the policy greedily writes behind each (prompt, ids) up to the next end of a step, at least so many tokens;
    and the tokens decoded."""
    stops = reader.boundary.stops
    params = SamplingParams(
        temperature=0.0,
        max_new_tokens=step_tokens,
        stop=(*tools.sampling.stop, *stops["stop"]),
        stop_pattern=stops["stop_pattern"],
        logprobs=False,
    )
    found = []
    written = tools.engine.generate([Request((*prompt, *ids)) for prompt, ids in contexts], params)
    for (_, ids), (completion,) in zip(contexts, written, strict=True):
        end = reader.boundary.first(ids, completion.ids, least)
        # What ends a step is kept and counted; what else ended it, an end-of-sequence token, is not among the ids.
        ended = completion.finish_reason == "stop" and end is None
        found.append((completion.ids[:end], len(completion.ids) + ended))
    return found


def score(tools: Tools, reader: Reader, work: Sequence[Work], found: Sequence[Forks], step_tokens: int) -> list[Forks]:
    """The same forks with their values."""
    forks = [(i, fork) for i, own in enumerate(found) for fork in own.forks]
    branches = [(work[i], fork.rollout.completion_ids, fork.at, fork.token) for i, fork in forks]
    scored = [Forks([], own.compute) for own in found]
    for (i, fork), (value, compute) in zip(forks, target_values(tools, reader, branches, step_tokens), strict=True):
        scored[i].forks.append(replace(fork, value=value))
        scored[i].compute += compute
    return scored


def target_values(
    tools: Tools, reader: Reader, branches: Sequence[tuple[Work, tuple[int, ...], int, int]], step_tokens: int
) -> list[tuple[float, Compute]]:
    """``log pi(target | branch, template)`` of each branch, and what that took.

    A branch: the work, a completion, the position where it is left, the token that is forced there; its step is
    completed greedily, and an answer that this opens is left out. Charged are the forced token, what was decoded,
    template and answer; the completion up to there is cached.
    """
    tails = completed(tools, reader, [(item, (*ids[:at], token)) for item, ids, at, token in branches], step_tokens)
    rows = [(item, ids, at, (token, *tail)) for (item, ids, at, token), (tail, _) in zip(branches, tails, strict=True)]
    return [
        (value, Compute(forward=compute.forward, decoded=decoded))
        for (value, compute), (_, decoded) in zip(values_behind(tools, rows), tails, strict=True)
    ]


def completed(
    tools: Tools, reader: Reader, stems: Sequence[tuple[Work, tuple[int, ...]]], step_tokens: int
) -> list[tuple[tuple[int, ...], int]]:
    """The greedy rest of the step that each beginning of a completion leaves open, without an answer that it opens; and
    the tokens decoded."""
    contexts = [(item.prompt.ids, ids) for item, ids in stems]
    closed = [reader.boundary.closes(ids) for _, ids in stems]
    unfinished = [context for context, done in zip(contexts, closed, strict=True) if not done]
    written = iter(next_steps(tools, reader, unfinished, step_tokens, least=0))
    tails = [((), 0) if done else next(written) for done in closed]
    return [(tail[: reader.reasoning(tail)], decoded) for tail, decoded in tails]


def values_behind(
    tools: Tools, rows: Sequence[tuple[Work, tuple[int, ...], int, tuple[int, ...]]]
) -> list[tuple[float, Compute]]:
    """``log pi(target | completion[:at], ids, template)`` of each (work, completion, at, ids), and what that took:
    template and answer."""
    trunks: dict[tuple[int, ...], int] = {}
    branches, computes = [], []
    for item, completion, at, ids in rows:
        trunk = trunks.setdefault((*item.prompt.ids, *completion), len(trunks))
        before = (*ids, *item.template_ids)
        branches.append(Branch(trunk, len(item.prompt.ids) + at, (*before, *item.answer_ids), scored_from=len(before)))
        computes.append(Compute(forward=len(item.template_ids) + len(item.answer_ids)))
    scores = score_branches(tools.policy, list(trunks), branches, token_budget=tools.token_budget)
    return list(zip(scores.total.tolist(), computes, strict=True))


def continue_from(fork: Fork, candidates: int) -> Proposal:
    """Go on behind the forced token; the rest of the step is written anew. candidates: the fork is the best of."""
    return Proposal(
        n=1,
        plain_ids=(*fork.prefix_ids, fork.token),
        parent=fork.rollout.sample_id,
        original_ids=fork.prefix_ids,
        trace=Choice((fork.at,), (fork.token,), (fork.logprob,), fork.entropy, fork.mass, fork.value, candidates),
    )


def spread(proposals: Sequence[Proposal], samples: int) -> list[Proposal]:
    """The samples shared out among the proposals, the first ones first."""
    taken = proposals[:samples]
    return [replace(p, n=n) for p, n in zip(taken, shares(samples, len(taken)), strict=True)] if taken else []


def one_greedy_each(proposals: Sequence[Proposal], samples: int) -> list[Proposal]:
    """One greedy continuation of each of the first proposals; samples that are left are spread over the same ones."""
    taken = proposals[:samples]
    return [*(replace(p, n=1, greedy=True) for p in taken), *spread(taken, samples - len(taken))]


def charged(proposals: Sequence[Proposal], samples: int, compute: Compute) -> list[Proposal]:
    """The proposals, the first charged with what finding all of them took.

    Without any, the samples are drawn from the prompt: where no token of a rollout has a plausible alternative, its
    prefixes lead nowhere else. The trace then names no token.
    """
    first, *others = proposals or [Proposal(n=samples, trace=Choice())]
    return [replace(first, compute=compute), *others]
