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

from latentrevise.revise.revision import FailedRollout, ReviseConfig

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
class Packing:
    """Index arrays of ``B`` rollouts with suffixes padded to ``S``, ``T`` prefix tokens and ``N`` scored tokens in all.

    tokens: int64 ``[B, S]``, the plain ids (the prefix's own, where ``z`` will be put).
    segment: int64 ``[B, S]``, PAD, PREFIX, FAILED or GOLD.
    offset: int64 ``[B, S]``, position counted from the end of the prompt.
    prefix_index: int64 ``[T]``, where the prefix tokens lie in the flattened ``[B * S]``, rollout by rollout.
    prefix_row: int64 ``[T]``, the rollout of each; prefix_ids: int64 ``[T]``, its plain token.
    score_index, targets, score_row: int64 ``[N]``: the flat position that predicts each scored token, the token, the
        rollout. score_gold: bool ``[N]``, an answer token or one of the failed continuation.
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
    score_gold: Tensor

    @property
    def lengths(self) -> list[int]:
        """Prefix length of each rollout."""
        return torch.bincount(self.prefix_row, minlength=self.tokens.shape[0]).tolist()

    @property
    def suffix_tokens(self) -> list[int]:
        """Tokens of each row that go through the model: padding is not counted."""
        return (self.segment != PAD).sum(1).tolist()


def pack(
    rollouts: Sequence[FailedRollout], config: ReviseConfig, device: torch.device, buckets: bool = False
) -> Packing:
    """Lay the rollouts out; the branches whose weight is 0 are left out of the pass altogether.

    buckets: pad to a ``bucket``.
    """
    rows = [_row(rollout, config) for rollout in rollouts]
    width = max(len(row.tokens) for row in rows)
    if buckets:
        width = bucket(width)
    shape = (len(rows), width)
    tokens, segment, offset = (
        torch.zeros(shape, dtype=torch.long),
        torch.full(shape, PAD),
        torch.zeros(shape, dtype=torch.long),
    )
    flat: dict[str, list[int]] = {
        "index": [],
        "row": [],
        "ids": [],
        "at": [],
        "target": [],
        "score_row": [],
        "gold": [],
    }
    for b, (rollout, row) in enumerate(zip(rollouts, rows, strict=True)):
        length = len(row.tokens)
        tokens[b, :length] = torch.tensor(row.tokens)
        segment[b, :length] = torch.tensor(row.segment)
        offset[b, :length] = torch.tensor(row.offset)
        flat["index"] += range(b * width, b * width + len(rollout.prefix_ids))
        flat["row"] += [b] * len(rollout.prefix_ids)
        flat["ids"] += rollout.prefix_ids
        for at, target, gold in row.scored:
            flat["at"].append(b * width + at)
            flat["target"].append(target)
            flat["score_row"].append(b)
            flat["gold"].append(gold)
    as_long = {name: torch.tensor(values, dtype=torch.long, device=device) for name, values in flat.items()}
    return Packing(
        tokens=tokens.to(device),
        segment=segment.to(device),
        offset=offset.to(device),
        prefix_index=as_long["index"],
        prefix_row=as_long["row"],
        prefix_ids=as_long["ids"],
        score_index=as_long["at"],
        targets=as_long["target"],
        score_row=as_long["score_row"],
        score_gold=as_long["gold"].bool(),
    )


@dataclass
class _Row:
    tokens: list[int]
    segment: list[int]
    offset: list[int]
    scored: list[tuple[int, int, int]]  # (column that predicts, token predicted, 1 for an answer token)


def _row(rollout: FailedRollout, config: ReviseConfig) -> _Row:
    length = len(rollout.prefix_ids)
    row = _Row(list(rollout.prefix_ids), [PREFIX] * length, list(range(length)), [])
    if config.beta > 0:
        failed = list(rollout.continuation_ids[: config.away_window])
        _append_branch(row, failed, length, first_scored=0, segment=FAILED)
    if config.alpha > 0:
        gold = list(rollout.template_ids) + list(rollout.answer_ids)
        _append_branch(row, gold, length, first_scored=len(rollout.template_ids), segment=GOLD)
    return row


def _append_branch(row: _Row, branch: list[int], prefix: int, *, first_scored: int, segment: int) -> None:
    start = len(row.tokens)
    for j in range(first_scored, len(branch)):
        # The first token of a branch is predicted by the last token of the prefix, wherever the branch itself lies.
        row.scored.append((start + j - 1 if j else prefix - 1, branch[j], int(segment == GOLD)))
    fed = branch[:-1]
    row.tokens += fed
    row.segment += [segment] * len(fed)
    row.offset += range(prefix, prefix + len(fed))


def suffix_length(rollout: FailedRollout, config: ReviseConfig) -> int:
    """Tokens of the rollout's row, without padding."""
    return len(_row(rollout, config).tokens)


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
