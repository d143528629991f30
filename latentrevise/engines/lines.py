"""The rows of a batch while it is decoded: their keys and values, and what a row sees of them.

Two forms. ``Padded``: a line of the cache for each row. ``Packed``: one for each family of rows that share a prefix,
its keys and values read by all of them; a row's own tokens stand behind, and a mask hides them from the others. That
saves copying the prefix to each row and reading it once for each, and costs scores against the others' tokens; where
those are many, a family's rows part into smaller ones of rows that see mostly the same (those of one prompt, where
prompts share a beginning), or into ``Padded``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from latentrevise.engines.cache import gathered, stored

# Keys scored a row in Packed over those in Padded, beyond which the rows part. Scoring a key for many rows at once is a
# matrix product; for one row it is a copy and a product with a vector.
_CROWDED = 6
_ALIKE = 0.8  # of what two rows see, so much in common puts them into one line still


class Forward(Protocol):
    """One pass of the model behind ``cache``, which it fills: logits ``[B, count, V]`` of the last ``count`` tokens.

    mask: ``[B, L]`` (1: a token), additive ``[B, 1, S, L]``, or None: everything that came before is seen.
    """

    def __call__(
        self, cache: Cache, mask: Tensor | None, positions: Tensor, count: int = 1, **inputs: Tensor
    ) -> Tensor: ...


class Lines(Protocol):
    """keep: go on with these rows alone. feed: a token ``[B]`` to each row, at a position ``[B]``; logits ``[B, V]``.
    parted: the same rows, in the form that is the cheaper one by now. place: the line of ``cache`` that a row reads,
    and the columns of what the row has run there, in its order."""

    cache: Cache

    def keep(self, rows: Tensor) -> None: ...

    def feed(self, tokens: Tensor, at: Tensor) -> Tensor: ...

    def parted(self) -> Lines: ...

    def place(self, row: int) -> tuple[int, Tensor]: ...


class Padded:
    """A line of the cache for each row. mask: int64 ``[B, L]``; None: nothing is padded."""

    def __init__(self, forward: Forward, cache: Cache, mask: Tensor | None) -> None:
        self._forward, self.cache, self._mask = forward, cache, mask

    def keep(self, rows: Tensor) -> None:
        self.cache.batch_select_indices(rows)
        self._mask = None if self._mask is None else self._mask[rows]

    def feed(self, tokens: Tensor, at: Tensor) -> Tensor:
        if self._mask is not None:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
        return self._forward(self.cache, self._mask, at[:, None], input_ids=tokens[:, None])[:, 0]

    def parted(self) -> Lines:
        return self

    def place(self, row: int) -> tuple[int, Tensor]:
        if self._mask is None:
            return row, torch.arange(self.cache.get_seq_length())
        return row, self._mask[row].nonzero()[:, 0]


class Packed:
    """A line of the cache for each of ``G`` families.

    family: int64 ``[B]``, of each row. sees: bool ``[B, K]``: what a row sees of its family's line. empty: makes a
    cache. dtype: of the masks, the model's.
    """

    def __init__(
        self,
        forward: Forward,
        empty: Callable[[], Cache],
        cache: Cache,
        family: Tensor,
        sees: Tensor,
        dtype: torch.dtype,
    ) -> None:
        self._forward, self._empty, self.cache = forward, empty, cache
        self._family, self._sees, self._dtype = family, sees, dtype
        self._number()

    def _number(self) -> None:
        """The place of each row among those of its family."""
        order = torch.argsort(self._family, stable=True)
        counts = torch.bincount(self._family)
        first = counts.cumsum(0) - counts
        self._slot = torch.empty_like(order)
        self._slot[order] = torch.arange(len(order), device=order.device) - first[self._family[order]]
        self._families, self._wide = len(counts), int(counts.max())

    def keep(self, rows: Tensor) -> None:
        self._family, self._sees = self._family[rows], self._sees[rows]
        left, self._family = torch.unique(self._family, return_inverse=True)
        if len(left) < self._families:
            self.cache.batch_select_indices(left)
        self._number()

    def feed(self, tokens: Tensor, at: Tensor) -> Tensor:
        own = torch.nn.functional.one_hot(self._slot, self._wide).bool()
        self._sees = torch.cat([self._sees, own], dim=1)
        shape, where = (self._families, self._wide), (self._family, self._slot)
        ids, positions = tokens.new_zeros(shape), at.new_zeros(shape)
        ids[where], positions[where] = tokens, at
        seen = self._sees.new_zeros(*shape, self._sees.shape[1])
        seen[where] = self._sees
        mask = additive(seen, self._dtype)
        return self._forward(self.cache, mask, positions, self._wide, input_ids=ids)[where]

    def parted(self) -> Lines:
        if not self._crowded(self._families, self._wide, self._sees.shape[1]):
            return self
        count, groups = self._alike()
        if count > self._families:
            lines, columns, real = self._columns(count, groups)
            if not self._crowded(count, int(torch.bincount(groups).max()), columns.shape[1]):
                sees = self._sees.gather(1, columns[groups])
                return Packed(self._forward, self._empty, self._moved(lines, columns), groups, sees, self._dtype)
        alone = torch.arange(len(self._sees), device=self._sees.device)
        lines, columns, real = self._columns(len(alone), alone)
        return Padded(self._forward, self._moved(lines, columns), None if bool(real.all()) else real.long())

    def place(self, row: int) -> tuple[int, Tensor]:
        return int(self._family[row]), self._sees[row].nonzero()[:, 0]

    def _crowded(self, lines: int, wide: int, width: int) -> bool:
        return lines * wide * (width + wide) > _CROWDED * (int(self._sees.sum()) + len(self._sees))

    def _alike(self) -> tuple[int, Tensor]:
        """The rows in groups: whoever has most of what it sees in common with a group's first row, in the rows' order.
        How many groups; int64 ``[B]``, the group of each row."""
        seen = self._sees.float()
        same = self._family[:, None] == self._family
        counts = seen.sum(1)
        alike = same & (seen @ seen.T >= _ALIKE * torch.maximum(counts[:, None], counts))
        groups, count = torch.full_like(self._family, -1), 0
        for row in range(len(groups)):
            if groups[row] < 0:
                groups[alike[row] & (groups < 0)] = count
                count += 1
        return count, groups

    def _columns(self, count: int, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For ``count`` groups of rows: the line of each, which of its columns any of them sees, in their order and
        padded on the left with some that none does ``[count, width]``, and which of those are seen."""
        seen = torch.zeros(count, self._sees.shape[1], device=groups.device).index_add_(0, groups, self._sees.float())
        lines = torch.empty(count, dtype=torch.long, device=groups.device).index_put_((groups,), self._family)
        width = int((seen > 0).sum(1).max())
        columns = torch.argsort((seen > 0).byte(), dim=1, stable=True)[:, -width:]
        return lines, columns, seen.gather(1, columns) > 0

    def _moved(self, lines: Tensor, columns: Tensor) -> Cache:
        """A cache of these columns of these lines."""
        cache, whole = self._empty(), stored(self.cache)
        for index in range(len(whole)):
            keys, values = whole[index]
            cache.update(gathered(keys, lines, columns), gathered(values, lines, columns), index)
            # freed before the next layer's are copied
        return cache


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """bool ``[G, S, L]`` as what is added to the scores, ``[G, 1, S, L]``; finite, or a padded row would give NaN."""
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
