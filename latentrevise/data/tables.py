"""Rows from files: JSONL, JSON, CSV, TSV and parquet, compressed or in shards, as plain Python values."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import IO, Any

from latentrevise.data.remote import fetched, is_url
from latentrevise.errors import InputError

log = logging.getLogger(__name__)

_AS_THEY_ARE = frozenset((str, int, bool, type(None)))
_DEEPEST = 100  # lists and objects in each other
_TOO_DEEP = f"more than {_DEEPEST} lists or objects stand in each other; flatten it"
_SHOWN = 200  # characters of what a message quotes

_TABLES: dict[str, tuple[str, ...]] = {"to_pylist": (), "to_dicts": (), "to_dict": ("records",)}

Rows = Iterator[tuple[int, Any]]


class BadRow(Exception):
    """A row that is left out: a reason code, and a message that says what to do."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def read_rows(source: str | os.PathLike[str] | Iterable[Mapping[str, Any]], *, told: bool = True) -> Rows:
    """Numbered rows of a file, of a folder of shards (in the order of their names, numbered through), of either behind
    a URL, or as given.

    Lines of JSONL are numbered from 1, other rows from 0. A row that cannot be read comes as a ``BadRow``. told: log
    that a folder's files are read as one. Raises InputError when nothing can be read.
    """
    if is_url(source):
        with fetched(source) as path:
            yield from read_rows(path, told=told)
        return
    if isinstance(source, (str, os.PathLike)):
        path = Path(source).expanduser()
        shards = _shards(path) if path.is_dir() else [path]
        if len(shards) == 1:
            yield from _read(shards[0])
        else:
            if told:
                log.warning(
                    "%s: %d files are read as one, %s to %s", path, len(shards), shards[0].name, shards[-1].name
                )
            yield from enumerate(row for shard in shards for _, row in _read(shard))
        return
    if isinstance(source, Mapping):
        raise InputError(
            f"prompts: a mapping of {', '.join(map(str, source))} is no list of rows; give one of its parts"
        )
    rows: Any = source
    if hasattr(rows, "columns"):  # tables of pyarrow, polars and pandas iterate over their columns
        make = next((name for name in _TABLES if callable(getattr(rows, name, None))), None)
        rows = rows if make is None else getattr(rows, make)(*_TABLES[make])
    why = "the row is not a mapping of columns; give dictionaries"
    for number, row in enumerate(rows):
        yield number, row if isinstance(row, Mapping) else BadRow("not-a-row", why)


def file_hash(path: str | os.PathLike[str]) -> str:
    """Of a file's bytes, or of those of a folder's files. Raises OSError."""
    path, digest = Path(path).expanduser(), hashlib.sha256()
    for one in sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]:
        with one.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def plain_row(row: Any) -> Any:
    """A row as ``plain`` values, or the ``BadRow`` that it is or turns out to be."""
    if isinstance(row, BadRow):
        return row
    try:
        cells = plain(row)
        json.dumps(cells, ensure_ascii=False, default=str).encode()
    except BadRow as error:
        return error
    except UnicodeEncodeError:
        return BadRow("bad-text", "it holds half of a surrogate pair, which is no character; repair the file")
    except ValueError:  # Python writes no longer ones
        return BadRow("huge-number", "it holds a whole number of more than 4300 digits; write it as text")
    return cells


def plain(value: Any, depth: int = 0) -> Any:
    """A value as Python's own types: arrays and tuples as lists, their scalars as numbers, NaN and NA as None.

    Raises BadRow for what is nested too deep, or holds itself.
    """
    if type(value) in _AS_THEY_ARE:  # a look at most of a large file
        return value
    if depth > _DEEPEST:
        raise BadRow("too-deep", _TOO_DEEP)
    if type(value) is dict or isinstance(value, Mapping):
        return {str(key): plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)) or getattr(value, "ndim", 0) != 0:
        return [plain(item, depth + 1) for item in value]
    if hasattr(value, "tolist"):
        # A short float's own digits: 0.1 in float32 is not 0.10000000149.
        value = float(str(value)) if isinstance(value.tolist(), float) else value.tolist()
    none = value.is_nan() if isinstance(value, Decimal) else isinstance(value, float) and value != value
    return None if none or type(value).__name__ in ("NAType", "NaTType") else value


def shown(text: str) -> str:
    """A text as a message quotes it: its beginning where it is long."""
    return repr(text) if len(text) <= _SHOWN else f"{text[:_SHOWN]!r}... ({len(text):,} characters)"


def _shards(folder: Path) -> list[Path]:
    """The data files of a folder; all must be of one kind."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".") and _kind(p) in _READERS)
    kinds = sorted({_kind(p) for p in files})
    if len(kinds) != 1:
        found = f"files of several kinds ({', '.join(kinds)})" if kinds else f"no {', '.join(_READERS)} file"
        raise InputError(f"prompt folder {folder} holds {found}; give one of its files, or a folder of one kind")
    return files


def _kind(path: Path) -> str:
    """The suffix that says what a file holds; compression beside."""
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()


def _read(path: Path) -> Rows:
    if not path.is_file():
        raise InputError(f"prompt file {path} does not exist or is no file; check the path")
    reader = _READERS.get(_kind(path))
    if reader is None:
        raise InputError(
            f"prompt file {path} ends in {path.suffix!r}; give a {', '.join(_READERS)} file (text may be compressed:"
            " .jsonl.gz), or rename it to what it is"
        )
    try:
        yield from reader(path)
    except UnicodeDecodeError as error:
        raise InputError(
            f"prompt file {path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it"
        ) from error
    except csv.Error as error:
        raise InputError(f"prompt file {path} is not readable CSV ({error}); quote its cells, or give JSONL") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"prompt file {path} is not a whole gzip file ({error}); fetch it anew") from error
    except OSError as error:
        raise InputError(f"prompt file {path} can't be read ({error.strerror or error})") from error


def _open(path: Path, newline: str | None = None, errors: str = "strict") -> IO[str]:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", errors=errors, newline=newline)
    return path.open(encoding="utf-8-sig", errors=errors, newline=newline)


def _parsed(text: str, where: str) -> Any:
    """JSON. Raises BadRow with the reason; ``where`` it stands."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        told = f"{where} is not JSON ({error.msg} at line {error.lineno}, column {error.colno}); repair it"
        raise BadRow("bad-json", told) from error
    except RecursionError as error:
        raise BadRow("too-deep", f"{where}: {_TOO_DEEP}") from error
    except ValueError as error:  # Python reads no longer ones
        told = f"{where} holds a whole number of more than 4300 digits; write it as text"
        raise BadRow("huge-number", told) from error


def _read_jsonl(path: Path) -> Rows:
    first = True
    with _open(path, errors="surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            row: Any
            try:
                if not _is_text(line):
                    if first:
                        raise InputError(f"prompt file {path} is not UTF-8 text (see its line {number}); convert it")
                    raise BadRow("bad-text", f"line {number} is not UTF-8 text; repair it")
                row = _parsed(line, f"line {number}")
            except BadRow as error:
                if first:
                    _hint_at_json(path)
                row = error
            else:
                if first and isinstance(row, list):
                    _hint_at_json(path)
                if not isinstance(row, dict):
                    row = BadRow("not-a-row", f"line {number} is not a JSON object; write one a line")
            first = False
            yield number, row


def _is_text(line: str) -> bool:
    try:
        line.encode()
    except UnicodeEncodeError:
        return False
    return True


def _hint_at_json(path: Path) -> None:
    """Raises InputError where a ``.jsonl`` file begins with a list, or an object over several lines."""
    with _open(path, errors="surrogateescape") as file:
        text = file.read().strip()
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return
    if isinstance(value, list) and not any(isinstance(item, dict) for item in value):
        return
    remedy = "rename it to .json" if end == len(text) else "write each object on a line of its own (jq -c . FILE)"
    what = "a JSON list" if isinstance(value, list) else "JSON over several lines"
    raise InputError(f"prompt file {path} is {what}, not one object a line; {remedy}")


def _read_json(path: Path) -> Rows:
    with _open(path) as file:
        text = file.read()
    try:
        content = _parsed(text, f"prompt file {path}")
    except BadRow as error:
        lines = ", or name it .jsonl if it holds one object a line" if error.reason == "bad-json" else ""
        raise InputError(f"{error}{lines}") from error
    if isinstance(content, dict):
        content = next(
            (content[key] for key in ("data", "prompts", "rows") if isinstance(content.get(key), list)), content
        )
    if not isinstance(content, list):
        raise InputError(f"prompt file {path} holds no list of rows; give a list, or an object with one under 'data'")
    for number, row in enumerate(content):
        told = f"row {number} is not a JSON object; repair it"
        yield number, row if isinstance(row, dict) else BadRow("not-a-row", told)


def _read_csv(path: Path, dialect: str = "excel") -> Rows:
    with _open(path, newline="") as lines:
        reader = csv.DictReader(lines, dialect=dialect)
        names = [name for name in reader.fieldnames or () if name]
        if len(set(names)) < len(names):
            raise InputError(f"prompt file {path} has several columns of one name ({', '.join(names)}); rename them")
        for number, row in enumerate(reader):
            if None in row or None in row.values():
                told = f"row {number} has more or fewer cells than the header; quote what parts cells"
                yield number, BadRow("bad-csv", told)
            else:
                yield number, row


def _read_tsv(path: Path) -> Rows:
    return _read_csv(path, "excel-tab")


def _read_parquet(path: Path) -> Rows:
    from latentrevise.data.parquet import GROUP, TableFile

    number = 0
    with TableFile(path, remedy="fetch it, or write it anew") as file:
        parts = (whole.slice(first, GROUP) for whole in file.groups() for first in range(0, whole.num_rows, GROUP))
        for group in parts:
            columns = []
            for name in group.column_names:
                try:
                    columns.append(group[name].to_pylist())
                except (ValueError, OverflowError, ArithmeticError) as error:
                    told = f"column {name!r} of type {group[name].type} has no values in Python ({error})"
                    raise InputError(f"prompt file {path}: {told}; write it as text, or leave it out") from error
            for cells in zip(*columns, strict=True):
                yield number, dict(zip(group.column_names, cells, strict=True))
                number += 1


_READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}
