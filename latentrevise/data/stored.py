"""Rows of a parquet file that are read where they are asked for."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Generic, overload

import pyarrow as pa

from latentrevise.data.parquet import REMEDY, TableFile, read_table
from latentrevise.data.records import Record, records_of


class Stored(Sequence[Record], Generic[Record]):
    """The rows of one file of ``write_records``; of them one group is held, the last that was asked for.

    Raises InputError, as ``read_records`` does, where the file can't be read or doesn't hold ``cls``.
    """

    def __init__(self, path: str | os.PathLike[str], cls: type[Record], remedy: str = REMEDY) -> None:
        self.path, self.cls, self._remedy = Path(path), cls, remedy
        self._file = TableFile(path, remedy)
        self._ends = list(accumulate(self._file.sizes))
        self._held: tuple[int, list[Record]] = (-1, [])

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, at: int) -> Record: ...
    @overload
    def __getitem__(self, at: slice) -> list[Record]: ...
    def __getitem__(self, at: int | slice) -> Record | list[Record]:
        places = range(len(self))[at]
        return self._at(places) if isinstance(places, int) else [self._at(place) for place in places]

    def __iter__(self) -> Iterator[Record]:
        return (self._at(place) for place in range(len(self)))

    def column(self, name: str) -> pa.ChunkedArray:
        """One column of all rows, as Arrow holds it."""
        return read_table(self.path, [name], remedy=self._remedy).column(name)

    def _at(self, place: int) -> Record:
        group = bisect_right(self._ends, place)
        if self._held[0] != group:
            self._held = (group, records_of(self._file.group(group), self.cls, self.path))
        return self._held[1][place - (self._ends[group - 1] if group else 0)]
