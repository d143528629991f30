"""The compiled libraries: ``_cpu`` and ``_cuda``, loaded once, with the reason when one is missing."""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_DTYPE_NAMES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.int32: "int32",
    torch.int64: "int64",
}
_EMPTY = 64  # an address for tensors without elements, whose own is null, which the libraries read as: none


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run this call; the message says why and what would."""


@cache
def load(backend: str) -> ModuleType:
    """The module of backend ``"cpu"`` or ``"cuda"``.

    Raises:
        ImportError: it was not built, does not load, or was built from earlier sources.
        BackendError: LATENTREVISE_ISA names an instruction set that is unknown or that this CPU does not have.
        RuntimeError: there is no CUDA device.
    """
    module = import_module(f"{__package__}._{backend}")
    if not hasattr(module, "FIELDS"):  # the newest of its attributes
        raise ImportError(f"{module.__file__} is of an earlier version of these sources")
    if backend == "cuda":
        module.device_count()  # raises with the CUDA runtime's own words when there is no device or no driver
        return module
    if (wanted := os.environ.get("LATENTREVISE_ISA")) and module.isa() != wanted:
        known = module.isas().split()
        why = "not supported by this CPU" if wanted in known else f"unknown; choose one of {', '.join(known)}"
        raise BackendError(f"LATENTREVISE_ISA={wanted} is {why}, or leave it unset for the best ({module.isa()})")
    return module


@cache
def unavailable(backend: str) -> str | None:
    """Why the library of ``backend`` cannot be used, or None. Raises what :func:`load` does about a wrong setting."""
    try:
        load(backend)
    except ImportError as error:
        why = _missing(backend, error)
        if backend == "cpu" and (wanted := os.environ.get("LATENTREVISE_ISA")):
            raise BackendError(f"LATENTREVISE_ISA={wanted} asks for the cpu library, and {why}") from error
        return why
    except BackendError:
        raise
    except RuntimeError as error:
        return f"no usable CUDA device: {error}"
    return None


def _missing(backend: str, error: ImportError) -> str:
    remedy = "`LATENTREVISE_CUDA=1 pip install .`" if backend == "cuda" else "`pip install .`"
    remedy += " in a clone (`pip install -e .` to work in it)"
    if not isinstance(error, ModuleNotFoundError):
        return f"the {backend} library does not load here ({error}); build it on this machine with {remedy}"
    others = sorted(path.name for path in Path(__file__).parent.glob(f"_{backend}.*.so"))
    why = f"there is {', '.join(others)}, for another Python" if others else "no file of it in this installation"
    return f"the {backend} library was not built ({why}); build it with {remedy}"


@cache
def _companions(backend: str, function: str) -> dict[str, tuple[str, ...]]:
    """For each field of the struct of ``function`` the fields with its dtype and its row stride, or "" for either."""
    fields = load(backend).FIELDS[function]
    return {x: tuple(x + end if x + end in fields else "" for end in ("_dtype", "_stride")) for x in fields}


def call(backend: str, function: str, table: Tensor, **arguments: Tensor | float | None) -> Any:
    """Run ``function`` of the library of ``backend`` on a table ``[vocab, dim]``.

    The arguments have the names of its struct's fields (csrc/include/latentrevise/kernels.h, the only list of them). A
    tensor is its address, and its dtype and row stride where the struct has fields for these; None is a null pointer.
    """
    companions = _companions(backend, function)
    given: dict[str, float | None] = {"where": where(backend, table.device)}
    given["vocab"], given["dim"] = table.shape
    arguments["table"] = table
    for name, x in arguments.items():
        if not isinstance(x, Tensor):
            given[name] = x
            continue
        given[name] = x.data_ptr() or _EMPTY
        dtype, stride = companions[name]
        if dtype:
            given[dtype] = _dtype_codes(backend)[x.dtype]
        if stride:
            given[stride] = x.stride(0)
    return getattr(load(backend), function)(**given)


@cache
def _dtype_codes(backend: str) -> dict[torch.dtype, int]:
    return {dtype: load(backend).DTYPES[name] for dtype, name in _DTYPE_NAMES.items()}


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def rows(x: Tensor) -> Tensor:
    """``x`` with contiguous rows that do not overlap (a copy only if it has other strides)."""
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def aligned_rows(x: Tensor) -> Tensor:
    """``x`` with contiguous rows that start at multiples of 16 bytes (a copy only if they do not)."""
    x = rows(x)
    fits = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def where(backend: str, device: torch.device) -> int:
    """What a native call needs beside its tensors: the thread count on the CPU, the current raw stream on CUDA."""
    if backend == "cpu":
        return torch.get_num_threads()
    return torch.cuda.current_stream(device).cuda_stream
