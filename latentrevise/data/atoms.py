"""Mixtures in safetensors files, with a digest of what was written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from latentrevise.data.records import atomic_write
from latentrevise.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


def write_atoms(
    path: str | os.PathLike[str],
    mixtures: Mapping[str, tuple[Tensor, Tensor]],
    offsets: Mapping[str, Tensor] | None = None,
) -> None:
    """Mixtures by id to one safetensors file: ``ids [T, A]`` (as int32) and ``weights [T, A]`` (as float32); and, of
    those that left the hull, the offset ``[T, d]`` (as float32)."""
    import torch
    from safetensors.torch import save_file

    tensors = {}
    for name, (ids, weights) in mixtures.items():
        if ids.ndim != 2 or ids.shape != weights.shape:
            raise ValueError(
                f"mixture {name}: ids {tuple(ids.shape)}, weights {tuple(weights.shape)}, wanted one [T, A]"
            )
        tensors[f"{name}.ids"] = ids.detach().to("cpu", torch.int32).contiguous()
        tensors[f"{name}.weights"] = weights.detach().to("cpu", torch.float32).contiguous()
    for name, offset in (offsets or {}).items():
        tensors[f"{name}.offset"] = offset.detach().to("cpu", torch.float32).contiguous()
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, {"sha256": _digest(tensors)})


def read_atoms(path: str | os.PathLike[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """What ``write_atoms`` wrote: id -> (ids int32 ``[T, A]``, weights float32 ``[T, A]``). Raises InputError."""
    tensors = _read_tensors(path)
    names = [key.removesuffix(".ids") for key in tensors if key.endswith(".ids")]
    unpaired = [n for n in names if f"{n}.weights" not in tensors]
    if unpaired:
        raise InputError(f"{path}: mixture {unpaired[0]} has ids but no weights; delete the file and run again")
    return {name: (tensors[f"{name}.ids"], tensors[f"{name}.weights"]) for name in names}


def read_offsets(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The offsets that ``write_atoms`` wrote, by id: float32 ``[T, d]``. Raises InputError."""
    tensors = _read_tensors(path)
    return {key.removesuffix(".offset"): tensors[key] for key in tensors if key.endswith(".offset")}


def _read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  # it is no mapping
            told = (stored.metadata() or {}).get("sha256")
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error}); delete it and run again") from error
    if told is not None and told != _digest(tensors):
        raise InputError(f"{path}: its content is not what was written (its digest differs); delete it and run again")
    return tensors


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)} ".encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()
