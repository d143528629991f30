"""The native call, the same for both libraries: they share one C argument struct."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..dispatch import Call


def unsupported(call: Call, dtypes: tuple[torch.dtype, ...]) -> str | None:
    if "E" in call.needs_grad:
        return "E requires a gradient, which only the reference computes"
    if call.dtypes[0] not in dtypes:
        return f"no kernel for a table of {str(call.dtypes[0]).removeprefix('torch.')}"
    if torch.float64 in call.dtypes:
        return "float64 weights are for the reference only"
    return None


def forward(backend: str, ids: Tensor, weights: Tensor, E: Tensor) -> Tensor:
    z = torch.empty((ids.shape[0], E.shape[1]), dtype=E.dtype, device=E.device)
    module, arguments = _arguments(backend, ids, E)
    module.mixture_embed(weights=weights.data_ptr(), z=z.data_ptr(), **arguments)
    return z


def backward(backend: str, ids: Tensor, grad_z: Tensor, E: Tensor) -> Tensor:
    grad_weights = torch.empty(ids.shape, dtype=torch.float32, device=E.device)
    module, arguments = _arguments(backend, ids, E)
    module.mixture_embed_backward(grad_z=grad_z.data_ptr(), grad_weights=grad_weights.data_ptr(), **arguments)
    return grad_weights


def _arguments(backend: str, ids: Tensor, E: Tensor) -> tuple:
    module = native.load(backend)
    return module, {
        "table": E.data_ptr(),
        "table_dtype": native.dtype_code(module, E.dtype),
        "table_stride": E.stride(0),
        "vocab": E.shape[0],
        "dim": E.shape[1],
        "ids": ids.data_ptr(),
        "ids_dtype": native.dtype_code(module, ids.dtype),
        "rows": ids.shape[0],
        "atoms": ids.shape[1],
        "where": native.where(backend, E.device),
    }
