"""Parquet files in row groups, read one at a time, each column of each held against a digest of its values.

The format's own checksums cover the bytes of a page, but neither the page's header nor the file's footer: a bit that
flips there can change values that are read, and nothing says so (tried: 4 in 14,000 bits). So the footer also has a
digest of the values, by row group and column, which covers whatever lies between the disk and them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from latentrevise.data.storage import atomic_write
from latentrevise.errors import InputError

GROUP = 1024  # rows that are written, and may be read, at a time
REMEDY = "delete it and run again; nothing else is lost"
_DIGESTS = b"digests"


class TableWriter:
    """Writes row groups, each as it comes."""

    def __init__(self, writer: pq.ParquetWriter) -> None:
        self._writer, self._digests = writer, list[dict[str, str]]()
        self.rows = 0

    def write(self, table: pa.Table) -> None:
        """One row group; nothing for a table without rows."""
        if table.num_rows:
            self._writer.write_table(table, row_group_size=table.num_rows)
            self._digests.append({name: _digest(table[name]) for name in table.column_names})
            self.rows += table.num_rows

    def end(self) -> None:
        self._writer.add_key_value_metadata({_DIGESTS: json.dumps(self._digests)})


@contextmanager
def table_writer(path: str | os.PathLike[str], schema: pa.Schema) -> Iterator[TableWriter]:
    """A parquet file, there when the ``with`` ends without an error. Raises RunError where it cannot be written."""
    with (
        atomic_write(path) as temporary,
        pq.ParquetWriter(temporary, schema, compression="zstd", write_page_checksum=True) as file,
    ):
        writer = TableWriter(file)
        yield writer
        writer.end()


def write_table(path: str | os.PathLike[str], table: pa.Table) -> None:
    """A table to a parquet file, atomically."""
    with table_writer(path, table.schema) as out:
        for first in range(0, table.num_rows, GROUP):
            out.write(table.slice(first, GROUP))


class TableFile:
    """A parquet file that is open: its row groups, one at a time. remedy: what errors say to do. Raises InputError
    where it is none, or not what was written."""

    def __init__(self, path: str | os.PathLike[str], remedy: str = REMEDY) -> None:
        self.path, self._remedy = Path(path), remedy
        with self._told():
            self._file = pq.ParquetFile(path, page_checksum_verification=True)
            about = self._file.metadata
            self.columns: list[str] = self._file.schema_arrow.names
            self.sizes = [about.row_group(i).num_rows for i in range(about.num_row_groups)]
            told = (about.metadata or {}).get(_DIGESTS)
            self._digests: list[dict[str, str]] | None = None if told is None else json.loads(told)
            if self._digests is not None and len(self._digests) != len(self.sizes):
                raise ValueError("it has lost or gained row groups")

    def __enter__(self) -> TableFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def group(self, index: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Columns (None: all) of one row group."""
        with self._told():
            table = self._file.read_row_group(index, None if columns is None else list(columns))
            self._check(table, index, columns)
            return table.replace_schema_metadata()

    def groups(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        for index in range(len(self.sizes)):
            yield self.group(index, columns)

    def empty(self, columns: Sequence[str] | None = None) -> pa.Table:
        """No rows, of the same columns."""
        with self._told():
            table = self._file.schema_arrow.remove_metadata().empty_table()
            return table if columns is None else table.select(list(columns))

    def _check(self, table: pa.Table, index: int, columns: Sequence[str] | None) -> None:
        if absent := set(columns or ()) - set(table.column_names):
            raise ValueError(f"it has no column {', '.join(sorted(absent))}")
        if self._digests is None:
            return
        for name in table.column_names:
            if self._digests[index].get(name) != _digest(table[name]):
                raise ValueError(f"column {name} is not what was written: its digest differs")

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, LookupError, TypeError, AttributeError, MemoryError, pa.ArrowException) as error:
            told = str(error).strip().split("\n")[0] or type(error).__name__
            raise InputError(f"{self.path}: not a readable parquet file ({told}); {self._remedy}") from error


def read_table(
    path: str | os.PathLike[str],
    columns: Sequence[str] | None = None,
    *,
    where: pc.Expression | None = None,
    remedy: str = REMEDY,
) -> pa.Table:
    """A parquet file, or the rows of it that ``where`` holds for. Raises InputError with the remedy."""
    with TableFile(path, remedy) as file:
        groups = (group if where is None else group.filter(where) for group in file.groups(columns))
        return pa.concat_tables([file.empty(columns), *groups])


def _digest(column: pa.ChunkedArray) -> str:
    """SHA-256 of the values, however they lie in memory; 16 hex digits."""
    digest = hashlib.sha256()
    _feed(digest, column.combine_chunks())
    return digest.hexdigest()[:16]


def _feed(digest: Any, array: pa.Array) -> None:
    kind = array.type
    digest.update(f"{len(array)} {array.null_count} ".encode())
    if array.null_count:
        digest.update(np.packbits(array.is_valid().to_numpy(zero_copy_only=False)))
    if pa.types.is_struct(kind):
        for child in array.flatten():
            _feed(digest, child)
        return
    array = array.drop_null()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        digest.update(pc.list_value_length(array).to_numpy().astype(np.int64))
        _feed(digest, array.flatten())
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        digest.update(pc.binary_length(array).to_numpy().astype(np.int64))
        digest.update(_text(array))
    elif not pa.types.is_null(kind):
        digest.update(np.ascontiguousarray(array.to_numpy(zero_copy_only=False)))


def _text(array: pa.Array) -> memoryview:
    """The characters of strings without nulls, one behind another, as they lie."""
    wide = np.int64 if pa.types.is_large_string(array.type) else np.int32
    _, offsets, characters = array.buffers()
    if not len(array) or characters is None:
        return memoryview(b"")
    ends = np.frombuffer(offsets, wide)[array.offset : array.offset + len(array) + 1]
    return memoryview(characters)[ends[0] : ends[-1]]
