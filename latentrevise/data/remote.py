"""Files behind a URL (``s3://``, ``gs://``, ``hdfs://``, ``file://``) by ``pyarrow.fs``: prompts in, exports out.

A file is copied here to be read, and written here before it is copied there: an object store shows it whole or not at
all. Credentials, region and endpoint are those of the environment (``AWS_ACCESS_KEY_ID``, ...) or of the URL's query.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

import pyarrow as pa
import pyarrow.fs as pfs

from latentrevise.errors import InputError, LatentReviseError, RunError

_FLAT = ("s3", "gcs", "abfs")  # have no folders


def is_url(place: Any) -> TypeGuard[str]:
    return isinstance(place, str) and "://" in place


@contextmanager
def fetched(url: str) -> Iterator[Path]:
    """A copy of a file, or of the files of a folder, as long as the ``with`` lasts. Raises InputError, which names the
    URL; so do errors of what reads the copy."""
    with tempfile.TemporaryDirectory(prefix="latentrevise-") as folder:
        store, path = _found(url)
        local = Path(folder) / PurePosixPath(path).name
        try:
            there = store.get_file_info(path)
            if there.type is pfs.FileType.NotFound:
                raise InputError(f"{url} does not exist; check the URL and the credentials")
            if there.type is pfs.FileType.Directory:
                for one in store.get_file_info(pfs.FileSelector(path)):
                    if one.is_file:
                        _copy(store, one.path, pfs.LocalFileSystem(), local / one.base_name)
            else:
                _copy(store, path, pfs.LocalFileSystem(), local)
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{url} can't be read ({_first(error)}); check the URL and the credentials") from error
        try:
            yield local
        except LatentReviseError as error:
            raise type(error)(str(error).replace(str(local), url)) from error


@contextmanager
def sent(url: str) -> Iterator[Path]:
    """A place to write a file, which is copied to the URL when the ``with`` ends without an error. Raises RunError
    where it cannot be written."""
    with tempfile.TemporaryDirectory(prefix="latentrevise-") as folder:
        store, path = _found(url)
        local = Path(folder) / PurePosixPath(path).name
        yield local
        try:
            if store.type_name not in _FLAT:
                store.create_dir(str(PurePosixPath(path).parent), recursive=True)
            _copy(pfs.LocalFileSystem(), str(local), store, path)
        except (OSError, pa.ArrowException) as error:
            raise RunError(f"cannot write {url} ({_first(error)}); check the URL and the credentials") from error


def _found(url: str) -> tuple[pfs.FileSystem, str]:
    try:
        store, path = pfs.FileSystem.from_uri(url)
    except (ValueError, OSError, pa.ArrowException) as error:
        raise InputError(
            f"{url} is no URL of a file ({_first(error)}); give s3://, gs://, hdfs:// or file://"
        ) from error
    return store, str(path)


def _copy(one: pfs.FileSystem, path: str, other: pfs.FileSystem, to: str | os.PathLike[str]) -> None:
    if isinstance(other, pfs.LocalFileSystem):
        Path(to).parent.mkdir(parents=True, exist_ok=True)
    pfs.copy_files(path, os.fspath(to), source_filesystem=one, destination_filesystem=other)


def _first(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
