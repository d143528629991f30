"""How failed rollouts lie in one batch of the packed pass.

A row is one rollout. Its keys are the cached prompt, then its own *suffix*: the revised prefix, and behind it the two
branches, which share the prefix and are blind to each other, their positions both starting where the prefix ends::

    cached prompt x (P) | prefix z (T) | failed continuation c (W - 1) | template + answer (M - 1)
    position   0 .. P-1 | P .. P+T-1   | P+T ..                        | P+T ..

Branches that are only scored (``pack_branches``) leave a cached trunk, each at a position of its own, and are blind to
all others. The last token of a branch is predicted but never fed. Rows are padded on the right; the mask knows
positions and segments, so neither padding nor the layout reaches the result. Nothing here knows a model: ids and
indices only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PAD, PREFIX, FAILED, GOLD = -1, 0, 1, 2


@dataclass(frozen=True)
class BranchPacking:
    """Index arrays of ``B`` rows of branches, each row behind one trunk; padded to ``S``.

    tokens, segment, position, reach: int64 ``[B, S]``; a segment of its own for each branch; reach is where the branch
    leaves the trunk. score_index, targets: int64 ``[N]``, the flat position that predicts each scored token that is not
    the first of its branch, and the token.
    """

    tokens: Tensor
    segment: Tensor
    position: Tensor
    reach: Tensor
    score_index: Tensor
    targets: Tensor


def bucket(length: int) -> int:
    """The next length on a grid of eight to each doubling (and of multiples of 8), so that shapes repeat."""
    step = max(8, 1 << max(0, (length - 1).bit_length() - 4))
    return -(-length // step) * step


def pack_branches(
    rows: Sequence[Sequence[tuple[int, Sequence[int], int]]], device: torch.device, buckets: bool = False
) -> BranchPacking:
    """Lay branches out; a row is a list of (position where it leaves the trunk, tokens, first scored token).

    buckets: pad to a ``bucket``.
    """
    width = max(sum(len(tokens) - 1 for _, tokens, _ in row) for row in rows)
    if buckets:
        width = bucket(width)
    flat: dict[str, list[int]] = {name: [] for name in ("tokens", "segment", "position", "reach")}
    score_index: list[int] = []
    targets: list[int] = []
    for b, row in enumerate(rows):
        start = b * width
        for segment, (at, tokens, first) in enumerate(row, start=1):
            fed = len(tokens) - 1
            flat["tokens"] += tokens[:-1]
            flat["segment"] += [segment] * fed
            flat["position"] += range(at, at + fed)
            flat["reach"] += [at] * fed
            scored = max(first, 1)
            score_index += range(start + scored - 1, start + fed)
            targets += tokens[scored:]
            start += fed
        free = (b + 1) * width - start
        flat["segment"] += [PAD] * free
        for name in ("tokens", "position", "reach"):
            flat[name] += [0] * free
    grid = {name: torch.tensor(values, device=device).view(len(rows), width) for name, values in flat.items()}
    return BranchPacking(
        **grid,
        score_index=torch.tensor(score_index, dtype=torch.long, device=device),
        targets=torch.tensor(targets, dtype=torch.long, device=device),
    )


@dataclass(frozen=True)
class Suffix:
    """What of one rollout is fed and scored, behind its prompt: the revised prefix and two branches off its end.

    prefix: ``T`` tokens, the ones that are revised. failed: the failed continuation, scored whole; empty: no such
    branch. gold: template and answer, scored from ``template`` tokens on; empty: no such branch. score_prefix: score
    the prefix's own tokens too, each behind those before it.
    """

    prefix: Sequence[int]
    failed: Sequence[int] = ()
    gold: Sequence[int] = ()
    template: int = 0
    score_prefix: bool = False

    @property
    def fed(self) -> int:
        """Tokens that go through the model: the last of a branch is predicted only."""
        return len(self.prefix) + max(len(self.failed) - 1, 0) + max(len(self.gold) - 1, 0)


@dataclass(frozen=True)
class Packing:
    """Index arrays of ``B`` rollouts with suffixes padded to ``S``, ``T`` prefix tokens and ``N`` scored tokens in all.

    tokens: int64 ``[B, S]``, the plain ids (the prefix's own, where ``z`` will be put).
    segment: int64 ``[B, S]``, PAD, PREFIX, FAILED or GOLD.
    offset: int64 ``[B, S]``, position counted from the end of the prompt.
    prefix_index: int64 ``[T]``, where the prefix tokens lie in the flattened ``[B * S]``, rollout by rollout.
    prefix_row: int64 ``[T]``, the rollout of each; prefix_ids: int64 ``[T]``, its plain token.
    score_index, targets, score_row, score_kind: int64 ``[N]``: the flat position that predicts each scored token
        (``B * S + b``: the last token of prompt b), the token, the rollout, and FAILED, GOLD or PREFIX.
    lengths: prefix length of each rollout. suffix_tokens: tokens of each row that go through the model, without
        padding.
    """

    tokens: Tensor
    segment: Tensor
    offset: Tensor
    prefix_index: Tensor
    prefix_row: Tensor
    prefix_ids: Tensor
    score_index: Tensor
    targets: Tensor
    score_row: Tensor
    score_kind: Tensor
    lengths: list[int]
    suffix_tokens: list[int]

    def scored(self, hidden: Tensor, prompt_hidden: Tensor) -> Tensor:
        """The states ``[N, d]`` that predict the scored tokens; hidden: ``[B * S, d]``, prompt_hidden: ``[B, d]``."""
        size = len(hidden)
        own = hidden.index_select(0, self.score_index.clamp(max=size - 1))
        first = self.score_index >= size
        before = prompt_hidden.index_select(0, (self.score_index - size).clamp_min(0))
        return torch.where(first.unsqueeze(-1), before.to(own.dtype), own)


def pack(rows: Sequence[Suffix], device: torch.device, buckets: bool = False) -> Packing:
    """Lay rollouts out. buckets: pad to a ``bucket``."""
    width = max(row.fed for row in rows)
    if buckets:
        width = bucket(width)
    size = len(rows) * width
    flat: dict[str, list[int]] = {name: [] for name in ("tokens", "segment", "offset")}
    prefix_index: list[int] = []
    scores: dict[str, list[int]] = {name: [] for name in ("at", "target", "row", "kind")}

    def score(at: Sequence[int], targets: Sequence[int], row: int, kind: int) -> None:
        scores["at"] += at
        scores["target"] += targets
        scores["row"] += [row] * len(targets)
        scores["kind"] += [kind] * len(targets)

    for b, row in enumerate(rows):
        first, length = b * width, len(row.prefix)
        prefix_index += range(first, first + length)
        parts = [(PREFIX, row.prefix, 0)]
        if row.score_prefix:
            score([size + b, *range(first, first + length - 1)], row.prefix, b, PREFIX)
        at = first + length
        for segment, branch, template in ((FAILED, row.failed, 0), (GOLD, row.gold, row.template)):
            if not branch:
                continue
            # The first token of a branch is predicted by the last token of the prefix, wherever the branch itself lies.
            predicting = [first + length - 1, *range(at, at + len(branch) - 1)]
            score(predicting[template:], branch[template:], b, segment)
            parts.append((segment, branch[:-1], length))
            at += len(branch) - 1
        for segment, tokens, offset in parts:
            flat["tokens"] += tokens
            flat["segment"] += [segment] * len(tokens)
            flat["offset"] += range(offset, offset + len(tokens))
        free = width - row.fed
        flat["tokens"] += [0] * free
        flat["segment"] += [PAD] * free
        flat["offset"] += [0] * free

    def array(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    return Packing(
        **{name: array(values).view(len(rows), width) for name, values in flat.items()},
        prefix_index=array(prefix_index),
        prefix_row=array([b for b, row in enumerate(rows) for _ in row.prefix]),
        prefix_ids=array([token for row in rows for token in row.prefix]),
        score_index=array(scores["at"]),
        targets=array(scores["target"]),
        score_row=array(scores["row"]),
        score_kind=array(scores["kind"]),
        lengths=[len(row.prefix) for row in rows],
        suffix_tokens=[row.fed for row in rows],
    )


def visible(
    query_segment: Tensor,
    query_position: Tensor,
    key_segment: Tensor,
    key_position: Tensor,
    window: int | None = None,
    reach: Tensor | None = None,
) -> Tensor:
    """Which queries see which keys: bool, all arguments elementwise and broadcast together.

    A key is seen by later positions of its own segment, and a key of the shared prefix by every later position; with a
    ``window``, by positions less than ``window`` away. Prompt keys carry the segment PREFIX. reach: where a query's
    branch leaves the shared prefix: it sees only the keys before that.
    """
    distance = query_position - key_position
    shared = key_segment == PREFIX
    if reach is not None:
        shared = shared & (key_position < reach)
    seen = ((query_segment == key_segment) | shared) & (key_segment != PAD) & (distance >= 0)
    return seen if window is None else seen & (distance < window)


def batches(sizes: Sequence[tuple[int, int]], token_budget: int, share: float = 1.0) -> list[list[int]]:
    """Split rows of (cached, fed) tokens into batches whose padded size stays within the budget; lists of indices.

    share: how much of a fed token a cached one counts.
    Rows are taken in order of length, the longest first, so that memory fails early if it has to. A batch also ends
    where padding would make up more than a quarter of what is fed. A row larger than the budget goes alone.
    """
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i][1], -sizes[i][0], i))
    found: list[list[int]] = []
    batch: list[int] = []
    cached = fed = real = 0
    for i in order:
        own_cached, own_fed = sizes[i]
        most = max(cached, own_cached)
        rows = len(batch) + 1
        if batch and ((share * most + fed) * rows > token_budget or 0.75 * fed * rows > real + own_fed):
            found.append(batch)
            batch, most, fed, real = [], own_cached, own_fed, 0
        batch.append(i)
        cached, fed, real = most, max(fed, own_fed), real + own_fed
    return [*found, batch] if batch else found
