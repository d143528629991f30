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
    (T, A), z = ids.shape, torch.empty((ids.shape[0], E.shape[1]), dtype=E.dtype, device=E.device)
    native.call(backend, "mixture_embed", E, ids=ids, weights=weights, z=z, rows=T, atoms=A)
    return z


def backward(backend: str, ids: Tensor, grad_z: Tensor, E: Tensor) -> Tensor:
    (T, A), grad_weights = ids.shape, torch.empty(ids.shape, dtype=torch.float32, device=E.device)
    native.call(backend, "mixture_embed_backward", E, ids=ids, z=grad_z, grad_weights=grad_weights, rows=T, atoms=A)
    return grad_weights
