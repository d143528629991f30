"""Branch scoring: many short suffixes hanging off few cached sequences, at different positions, without a gradient.

A *trunk* is run once and its keys and values are kept. A *branch* leaves it at a position and sees the trunk up to
there and itself, nothing else. Branches of one trunk share rows of the batch, so thousands of them take few passes.
What it gives equals one plain pass over ``trunk[:at] + tokens`` a branch (our own decision; no counterpart in the
published method).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from latentrevise.errors import InputError
from latentrevise.model import memory
from latentrevise.model.cache import PromptCache
from latentrevise.model.compute import Compute
from latentrevise.model.packing import bucket, pack_branches
from latentrevise.model.policy import Policy

# A row's branches attend to the whole row, mask or not, so a row is closed at about this many tokens.
_ROW = 256


class _Rows(Protocol):
    def __getitem__(self, rows: slice, /) -> Any: ...


Measured = TypeVar("Measured", bound=_Rows)


@dataclass(frozen=True)
class Branch:
    """``tokens`` behind the first ``at`` tokens of trunk number ``trunk``.

    scored_from: the first token to be scored; those before it are only read (an edited step and the answer template,
    say, before the answer).
    """

    trunk: int
    at: int
    tokens: Sequence[int]
    scored_from: int = 0


@dataclass(frozen=True)
class BranchScores:
    """logprobs: float32 on the CPU, one tensor a branch: ``log p(tokens[j] | trunk[:at], tokens[:j])`` for ``j`` from
    ``scored_from``; nats, temperature 1, unfiltered.

    trunk_tokens: tokens of each trunk that went through the model (those before its last branch; 0 for a trunk without
    branches). branch_tokens: the same for each branch; its last token is predicted and never fed.
    """

    logprobs: list[Tensor]
    trunk_tokens: list[int]
    branch_tokens: list[int]

    @property
    def total(self) -> Tensor:
        """The summed log-probability of each branch, float32 ``[n]``."""
        if not self.logprobs:
            return torch.zeros(0)
        return torch.stack([logprobs.sum() for logprobs in self.logprobs])

    @property
    def compute(self) -> Compute:
        """Everything that was run. Where a trunk was cached already (a sampled rollout), charge the branches alone."""
        return Compute(forward=sum(self.trunk_tokens) + sum(self.branch_tokens))


def score_branches(
    policy: Policy,
    trunks: Sequence[Sequence[int] | Tensor],
    branches: Sequence[Branch],
    token_budget: int | None = None,
) -> BranchScores:
    """Log-probabilities of many short branches that leave a few trunks at different positions.

    trunks: token ids, or embeddings ``[L, d]`` (a prompt and a revised prefix); each is run once. branches: see
    ``Branch``; any order, any number a trunk. token_budget: padded tokens in one batch; None: from free memory.
    Raises InputError for a branch that leaves its trunk out of range or scores nothing.
    """

    def logprob(hidden: Tensor, targets: Tensor) -> Tensor:
        return policy.head.logprob(hidden, targets).cpu()

    found, trunk_tokens = visit_branches(policy, trunks, branches, logprob, token_budget)
    return BranchScores([torch.cat(parts) for parts in found], trunk_tokens, [len(b.tokens) - 1 for b in branches])


def visit_branches(
    policy: Policy,
    trunks: Sequence[Sequence[int] | Tensor],
    branches: Sequence[Branch],
    measure: Callable[[Tensor, Tensor], Measured],
    token_budget: int | None = None,
) -> tuple[list[list[Measured]], list[int]]:
    """Run the branches as ``score_branches`` does, and ``measure`` what each of their tokens is predicted from.

    measure: takes hidden states ``[n, d]`` and the tokens that follow ``[n]``, and returns something with a row for
    each, which can be sliced. Returns of each branch its slices, whose rows are its tokens' from ``scored_from`` on, in
    order; and ``trunk_tokens``.
    """
    for t, trunk in enumerate(trunks):
        _check_trunk(policy, trunk, f"trunk {t}")
    work = [_checked(policy, trunks, i, branch) for i, branch in enumerate(branches)]
    of_trunk: dict[int, list[int]] = {}
    for i, branch in enumerate(work):
        of_trunk.setdefault(branch.trunk, []).append(i)
    used = list(of_trunk)
    needed = [max(work[i].at for i in of_trunk[t]) for t in used]
    found: dict[int, list[Measured]] = {}

    def run(batch: list[int]) -> None:
        cache = policy.prompt_cache([trunks[used[b]][: needed[b]] for b in batch])
        place = {used[b]: row for row, b in enumerate(batch)}
        mine = [i for b in batch for i in of_trunk[used[b]]]
        parts = _first_tokens(policy, work, mine, place, cache, measure)
        rows = [row for b in batch for row in _rows(work, of_trunk[used[b]])]
        sizes = [(work[row[0]].at, sum(len(work[i].tokens) - 1 for i in row)) for row in rows]

        def run_rows(chosen: list[int]) -> None:
            _later_tokens(policy, work, [rows[r] for r in chosen], place, cache, measure, parts)

        memory.in_batches(policy, sizes, budget, share, run_rows, "row of branches")
        found.update(parts)

    with policy.frozen(), torch.no_grad():
        budget = token_budget or memory.token_budget(policy)
        share = memory.cached_share(policy)
        memory.in_batches(policy, [(0, n) for n in needed], budget, share, run, "trunk")
    trunk_tokens = [0] * len(trunks)
    for t, n in zip(used, needed, strict=True):
        trunk_tokens[t] = n
    return [found[i] for i in range(len(work))], trunk_tokens


def completion_logprobs(
    policy: Policy,
    contexts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    token_budget: int | None = None,
) -> list[Tensor]:
    """Log-probability of each completion token behind its plain context: float32 ``[len(completion)]`` on the CPU.

    Contexts that are equal are run once. An empty completion has no log-probs.
    """
    trunks = {tuple(context): i for i, context in enumerate(dict.fromkeys(tuple(c) for c in contexts))}
    branches = [
        Branch(trunks[tuple(context)], len(context), completion)
        for context, completion in zip(contexts, completions, strict=True)
        if len(completion)
    ]
    scores = iter(score_branches(policy, list(trunks), branches, token_budget).logprobs)
    return [next(scores) if len(completion) else torch.zeros(0) for completion in completions]


def _check_trunk(policy: Policy, trunk: Sequence[int] | Tensor, what: str) -> None:
    if not isinstance(trunk, Tensor):
        policy.check_ids(trunk, what)
    elif trunk.is_floating_point() and (trunk.ndim != 2 or trunk.shape[1] != policy.table.shape[1]):
        raise InputError(
            f"{what}: embeddings of shape {tuple(trunk.shape)}, but the model takes [L, {policy.table.shape[1]}]; make"
            " them with this model's embedding module"
        )
    elif not trunk.is_floating_point():
        policy.check_ids(trunk.tolist(), what)


def _checked(policy: Policy, trunks: Sequence[Sequence[int] | Tensor], i: int, branch: Branch) -> Branch:
    if not 0 <= branch.trunk < len(trunks):
        raise InputError(f"branch {i}: trunk {branch.trunk}, but there are {len(trunks)} trunks")
    length = len(trunks[branch.trunk])
    tokens = tuple(int(token) for token in branch.tokens)
    if not 1 <= branch.at <= length:
        raise InputError(
            f"branch {i}: at = {branch.at}, but trunk {branch.trunk} has {length} tokens; a branch leaves it behind"
            " at least one of them"
        )
    if not 0 <= branch.scored_from < len(tokens):
        raise InputError(
            f"branch {i}: scored_from = {branch.scored_from} leaves nothing to score of {len(tokens)} tokens"
        )
    if min(tokens) < 0:
        raise InputError(f"branch {i}: it holds a negative id; drop the padding")
    policy.check_ids(tokens, f"branch {i}")
    policy.check_length(branch.at + len(tokens), f"branch {i}")
    return Branch(branch.trunk, branch.at, tokens, branch.scored_from)


def _rows(work: Sequence[Branch], own: list[int]) -> list[list[int]]:
    """The branches of one trunk that must be run, in rows; those of one token are scored by the trunk itself."""
    rows: list[list[int]] = []
    room = 0
    # By position, so that a row's trunk need not be longer than its branches reach; then a row's longest comes first.
    for i in sorted((i for i in own if len(work[i].tokens) > 1), key=lambda i: (-work[i].at, i)):
        fed = len(work[i].tokens) - 1
        if fed > room:
            rows.append([])
            room = _ROW
        rows[-1].append(i)
        room -= fed
    return rows


def _first_tokens(
    policy: Policy,
    work: Sequence[Branch],
    mine: list[int],
    place: dict[int, int],
    cache: PromptCache,
    measure: Callable[[Tensor, Tensor], Measured],
) -> dict[int, list[Measured]]:
    """What is measured of the branches' first tokens, which the trunk's own hidden states predict."""
    scored = [i for i in mine if work[i].scored_from == 0]
    found: dict[int, list[Measured]] = {i: [] for i in mine}
    if scored:
        rows = torch.tensor([place[work[i].trunk] for i in scored], device=policy.device)
        before = torch.tensor([work[i].at - 1 for i in scored], device=policy.device)
        targets = torch.tensor([work[i].tokens[0] for i in scored], device=policy.device)
        measured = measure(cache.hidden[rows, before], targets)
        for row, i in enumerate(scored):
            found[i].append(measured[row : row + 1])
    return found


def _later_tokens(
    policy: Policy,
    work: Sequence[Branch],
    rows: list[list[int]],
    place: dict[int, int],
    cache: PromptCache,
    measure: Callable[[Tensor, Tensor], Measured],
    parts: dict[int, list[Measured]],
) -> None:
    packing = pack_branches(
        [[(work[i].at, work[i].tokens, work[i].scored_from) for i in row] for row in rows],
        policy.device,
        policy.buckets,
    )
    trunk = torch.tensor([place[work[row[0]].trunk] for row in rows], device=policy.device)
    longest = max(work[row[0]].at for row in rows)
    if policy.buckets:
        longest = bucket(longest)
    ready = policy.prepare(
        packing.tokens, packing.position, packing.segment, cache.select(trunk, longest), packing.reach
    )
    hidden = policy.hidden(ready)
    measured = measure(hidden.index_select(0, packing.score_index), packing.targets)
    stop = 0
    for i in (i for row in rows for i in row):
        start, stop = stop, stop + len(work[i].tokens) - max(work[i].scored_from, 1)
        parts[i].append(measured[start:stop])
