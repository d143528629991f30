"""Keys and values that one call of the engine leaves behind for the next ones: a trie of tokens over one long line.

A strategy that goes step by step asks again and again for what it has been given, with a step more. Without this each
call runs all of it anew, which takes as long as the sampling (``python -m benchmarks forks``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from latentrevise.engines.cache import gathered, stored
from latentrevise.engines.lines import Lines


class Kept:
    """Each distinct position of the token sequences taken so far, once. empty: makes a cache. room: positions that are
    held at most; where more would come, all are forgotten first."""

    def __init__(self, empty: Callable[[], Cache], room: int) -> None:
        self._empty, self._room = empty, room
        self.forget()

    def forget(self) -> None:
        self._cache = self._empty()
        self._slots: dict[tuple[int, int], int] = {}  # slot of the position before (-1: none) and token: slot

    def known(self, ids: Sequence[int]) -> list[int]:
        """The slots of the leading positions that are held."""
        found, slot = [], -1
        for token in ids:
            following = self._slots.get((slot, token))
            if following is None:
                break
            found.append(slot := following)
        return found

    def fill(self, cache: Cache, slots: Tensor) -> None:
        """Put what is held into an empty cache of ``G`` lines. slots: int64 ``[G, L]``."""
        line = torch.zeros(len(slots), dtype=torch.long, device=slots.device)
        for index, (keys, values) in enumerate(stored(self._cache)):
            cache.update(gathered(keys, line, slots), gathered(values, line, slots), index)

    def take(self, lines: Lines, rows: Sequence[tuple[int, Sequence[int]]]) -> None:
        """Hold on to what these rows have run. rows: the number of each among ``lines``, and its tokens from the first
        on; those that it ran behind them are left out."""
        if len(self._slots) + sum(len(ids) for _, ids in rows) > self._room:
            self.forget()
        wanted: list[tuple[int, int]] = []
        for row, ids in rows:
            line, columns = lines.place(row)
            slot = -1
            for column, token in zip(columns.tolist(), ids, strict=False):
                known = self._slots.get((slot, token))
                if known is None:
                    known = self._slots[slot, token] = len(self._slots)
                    wanted.append((line, column))
                slot = known
        if not wanted:
            return
        line, column = torch.tensor(wanted).T
        for index, (keys, values) in enumerate(stored(lines.cache)):
            at = line.to(keys.device), slice(None), column.to(keys.device)
            self._cache.update(keys[at].transpose(0, 1)[None], values[at].transpose(0, 1)[None], index)
