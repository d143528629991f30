"""The rows of a batch while it is decoded: their keys and values, and what a row sees of them.

Two forms. ``Padded``: a line of the cache for each row. ``Packed``: one for each family of rows that share a prefix,
its keys and values read by all of them; a row's own tokens stand behind, and a mask hides them from the others. That
saves copying the prefix to each row and reading it once for each, and costs scores against the others' tokens; where
those are many, ``Packed`` turns into ``Padded``.
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


class Forward(Protocol):
    """One pass of the model behind ``cache``, which it fills: logits ``[B, count, V]`` of the last ``count`` tokens.

    mask: ``[B, L]`` (1: a token), additive ``[B, 1, S, L]``, or None: everything that came before is seen.
    """

    def __call__(
        self, cache: Cache, mask: Tensor | None, positions: Tensor, count: int = 1, **inputs: Tensor
    ) -> Tensor: ...


class Lines(Protocol):
    """keep: go on with these rows alone. feed: a token ``[B]`` to each row, at a position ``[B]``; logits ``[B, V]``.
    parted: the same rows, in the form that is the cheaper one by now."""

    def keep(self, rows: Tensor) -> None: ...

    def feed(self, tokens: Tensor, at: Tensor) -> Tensor: ...

    def parted(self) -> Lines: ...


class Padded:
    """A line of the cache for each row. mask: int64 ``[B, L]``; None: nothing is padded."""

    def __init__(self, forward: Forward, cache: Cache, mask: Tensor | None) -> None:
        self._forward, self._cache, self._mask = forward, cache, mask

    def keep(self, rows: Tensor) -> None:
        self._cache.batch_select_indices(rows)
        self._mask = None if self._mask is None else self._mask[rows]

    def feed(self, tokens: Tensor, at: Tensor) -> Tensor:
        if self._mask is not None:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
        return self._forward(self._cache, self._mask, at[:, None], input_ids=tokens[:, None])[:, 0]

    def parted(self) -> Lines:
        return self


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
        self._forward, self._empty, self._cache = forward, empty, cache
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
            self._cache.batch_select_indices(left)
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
        return self._forward(self._cache, mask, positions, self._wide, input_ids=ids)[where]

    def parted(self) -> Lines:
        scored = self._families * self._wide * (self._sees.shape[1] + self._wide)
        if scored <= _CROWDED * (int(self._sees.sum()) + len(self._sees)):
            return self
        counts = self._sees.sum(1)
        width = int(counts.max())
        # The hidden ones first, then those it sees in their order: cut to the last ones, padded on the left.
        columns = torch.argsort(self._sees.byte(), dim=1, stable=True)[:, -width:]
        mask = (torch.arange(width, device=counts.device) >= width - counts[:, None]).long()
        cache, whole = self._empty(), stored(self._cache)
        for index in range(len(whole)):
            keys, values = whole[index]
            cache.update(gathered(keys, self._family, columns), gathered(values, self._family, columns), index)
            # freed before the next layer's are copied
        return Padded(self._forward, cache, None if bool(mask.all()) else mask)


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """bool ``[G, S, L]`` as what is added to the scores, ``[G, 1, S, L]``; finite, or a padded row would give NaN."""
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
