"""How files are written and read: whole or not at all, and with a digest where nothing else would show a flipped bit.

Parquet has checksums of its pages and safetensors a digest (``records``, ``atoms``); here are JSON and what all share.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from latentrevise.errors import InputError, RunError

DIGEST = "digest"
_MARK = "sha256:"  # by which a digest is known also where its key is damaged


def stable_hash(value: Any, length: int = 16) -> str:
    """The first ``length`` hex digits of the SHA-256 of ``value`` as canonical JSON: the same everywhere and always."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is flushed to disk and renamed, on failure removed.

    A reader therefore sees the old file, or the whole new one, whenever the writer dies. Missing folders are created.
    Raises RunError if the place cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)
        try:
            with temporary.open("rb") as held:
                with suppress(OSError):  # not every file system has locks
                    fcntl.flock(held, fcntl.LOCK_EX)  # as long as this process lives, see ``leftovers``
                yield temporary
                _sync(temporary)
                os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync(path.parent)
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error.strerror or error}; choose an output directory that is writable and has space"
        ) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Indented JSON. NaN and infinity are refused (``ValueError``): they are not JSON."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_signed(path: str | os.PathLike[str], value: Mapping[str, Any]) -> None:
    """A JSON object with a digest of its content behind it."""
    write_json(path, _signed(value))


def read_signed(path: str | os.PathLike[str], remedy: str) -> dict[str, Any]:
    """What ``write_signed`` wrote, or an object without a digest, as it is. Raises RunError with the remedy where it
    cannot be read or is not what was written."""
    try:
        return _checked(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} can't be read ({error}); {remedy}") from error


def _signed(value: Mapping[str, Any]) -> dict[str, Any]:
    plain = json.loads(json.dumps(value, ensure_ascii=False, allow_nan=False))  # as it will be read
    return {**value, DIGEST: _MARK + stable_hash(plain)}


def _checked(value: Any) -> dict[str, Any]:
    """An object without its digest. Raises ValueError where that does not fit."""
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    told = value.pop(DIGEST, None)
    misplaced = told is None and any(isinstance(v, str) and v.startswith(_MARK) for v in value.values())
    if misplaced or (told is not None and told != _MARK + stable_hash(value)):
        raise ValueError("it is not what was written: its digest differs")
    return value


def write_jsonl(path: str | os.PathLike[str], rows: Iterable[Any], *, signed: bool = False) -> int:
    """One JSON object a line, from dataclasses or mappings; ``signed``: each with a digest. Returns their number."""
    count = 0
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as out:
        for row in rows:
            plain = dict(row) if isinstance(row, Mapping) else dataclasses.asdict(row)
            plain = _signed(plain) if signed else plain
            out.write(json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n")
            count += 1
    return count


def read_jsonl(path: str | os.PathLike[str], *, signed: bool = False) -> list[dict[str, Any]]:
    """What ``write_jsonl`` wrote; nothing where there is no file. Its lines end at ``\\n`` alone: texts may hold other
    characters at which ``str.splitlines`` parts them (U+2028, U+2029, U+0085)."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        rows = [json.loads(line) for line in text.split("\n") if line]
        return [_checked(row) for row in rows] if signed else rows
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON lines ({error}); restore it, or start a new run") from error
