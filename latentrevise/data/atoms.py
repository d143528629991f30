"""Mixtures in safetensors files, with a digest of what was written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

from latentrevise.data.parquet import REMEDY
from latentrevise.data.storage import atomic_write, stable_hash
from latentrevise.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class AtomsWriter:
    """Mixtures to one safetensors file as they come: the format wants its header first, so values wait in ``spool``."""

    def __init__(self, spool: IO[bytes]) -> None:
        self._spool = spool
        self._header: dict[str, Any] = {}
        self._digests: dict[str, str] = {}

    def write(self, mixtures: Mapping[str, tuple[Tensor, Tensor]], offsets: Mapping[str, Tensor] | None = None) -> None:
        """Mixtures by id: ``ids [T, A]`` (as int32) and ``weights [T, A]`` (as float32); and, of those that left the
        hull, the offset ``[T, d]`` (as float32)."""
        import torch

        for name, (ids, weights) in mixtures.items():
            if ids.ndim != 2 or ids.shape != weights.shape:
                raise ValueError(
                    f"mixture {name}: ids {tuple(ids.shape)}, weights {tuple(weights.shape)}, wanted one [T, A]"
                )
            self._add(f"{name}.ids", ids, torch.int32)
            self._add(f"{name}.weights", weights, torch.float32)
        for name, offset in (offsets or {}).items():
            self._add(f"{name}.offset", offset, torch.float32)

    def _add(self, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
        tensor = tensor.detach().to("cpu", dtype).contiguous()
        begin, values = self._spool.tell(), tensor.numpy().tobytes()
        self._spool.write(values)
        kind = _KINDS[str(dtype)]
        self._header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [begin, begin + len(values)]}
        self._digests[name] = _digest(tensor)

    def end(self, out: IO[bytes]) -> None:
        """All of it to the file."""
        told = {"__metadata__": {"digest": _digest_of(self._digests)}}
        header = json.dumps(told | self._header).encode()
        header += b" " * (-len(header) % 8)
        out.write(len(header).to_bytes(8, "little") + header)
        self._spool.seek(0)
        shutil.copyfileobj(self._spool, out)


@contextmanager
def atoms_writer(path: str | os.PathLike[str]) -> Iterator[AtomsWriter]:
    """A safetensors file, there when the ``with`` ends without an error. Raises RunError where it cannot be written."""
    with atomic_write(path) as temporary, tempfile.TemporaryFile(dir=temporary.parent) as spool:
        writer = AtomsWriter(spool)
        yield writer
        with temporary.open("wb") as out:
            writer.end(out)


def write_atoms(
    path: str | os.PathLike[str],
    mixtures: Mapping[str, tuple[Tensor, Tensor]],
    offsets: Mapping[str, Tensor] | None = None,
) -> None:
    """Mixtures by id to one safetensors file, see ``AtomsWriter.write``."""
    with atoms_writer(path) as out:
        out.write(mixtures, offsets)


def read_atoms(
    path: str | os.PathLike[str], remedy: str = REMEDY
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """What ``write_atoms`` wrote, by id: (ids int32 ``[T, A]``, weights float32 ``[T, A]``), and offsets float32
    ``[T, d]``. Raises InputError with the remedy."""
    tensors = _read_tensors(path, remedy)
    names = [key.removesuffix(".ids") for key in tensors if key.endswith(".ids")]
    unpaired = [n for n in names if f"{n}.weights" not in tensors]
    if unpaired:
        raise InputError(f"{path}: mixture {unpaired[0]} has ids but no weights; {remedy}")
    offsets = {key.removesuffix(".offset"): tensors[key] for key in tensors if key.endswith(".offset")}
    return {name: (tensors[f"{name}.ids"], tensors[f"{name}.weights"]) for name in names}, offsets


def _read_tensors(path: str | os.PathLike[str], remedy: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  # it is no mapping
            told = (stored.metadata() or {}).get("digest")
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error}); {remedy}") from error
    if told is not None and told != _digest_of({name: _digest(tensor) for name, tensor in tensors.items()}):
        raise InputError(f"{path}: its content is not what was written (its digest differs); {remedy}")
    return tensors


_KINDS = {"torch.int32": "I32", "torch.float32": "F32"}


def _digest(tensor: Tensor) -> str:
    """SHA-256 over type, shape and values."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _digest_of(digests: Mapping[str, str]) -> str:
    """Of the tensors of a file, by name, in whatever order they lie."""
    return stable_hash(dict(digests), 64)
