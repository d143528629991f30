"""The compiled libraries: ``_cpu`` and ``_cuda``, loaded once, with the reason when one is missing."""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch

_DTYPE_NAMES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.int32: "int32",
    torch.int64: "int64",
}


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
    if backend == "cuda":
        module.device_count()  # raises with the CUDA runtime's own words when there is no device or no driver
        return module
    if not hasattr(module, "isas"):  # the newest of its functions
        raise ImportError(f"{module.__file__} is of an earlier version of these sources")
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


def dtype_code(module: ModuleType, dtype: torch.dtype) -> int:
    return module.DTYPES[_DTYPE_NAMES[dtype]]


def matrix(module: ModuleType, name: str, x: torch.Tensor | None) -> dict[str, int | None]:
    """Address, dtype and row stride of a matrix with contiguous rows, as the native call names them."""
    if x is None:
        return {name: None, f"{name}_dtype": module.DTYPES["float32"], f"{name}_stride": 0}
    return {name: x.data_ptr(), f"{name}_dtype": dtype_code(module, x.dtype), f"{name}_stride": x.stride(0)}


def pointer(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def candidates(module: ModuleType, ids: torch.Tensor | None) -> dict[str, int | None]:
    """The arguments that describe ``[T, C]`` candidate sets; an empty set must not look like none."""
    if ids is None:
        return {"candidates": None, "candidates_dtype": module.DTYPES["int64"], "candidate_count": 0}
    address = ids.data_ptr() or torch.zeros(1).data_ptr()
    return {"candidates": address, "candidates_dtype": dtype_code(module, ids.dtype), "candidate_count": ids.shape[1]}


def rows(x: torch.Tensor) -> torch.Tensor:
    """``x`` with contiguous rows that do not overlap (a copy only if it has other strides)."""
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def aligned_rows(x: torch.Tensor) -> torch.Tensor:
    """``x`` with contiguous rows that start at multiples of 16 bytes (a copy only if they do not)."""
    x = rows(x)
    fits = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def where(backend: str, device: torch.device) -> int:
    """What a native call needs beside its tensors: the thread count on the CPU, the current raw stream on CUDA."""
    if backend == "cpu":
        return torch.get_num_threads()
    return torch.cuda.current_stream(device).cuda_stream
