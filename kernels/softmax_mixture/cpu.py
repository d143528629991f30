"""C++ implementation: online softmax over blocks of the table, probabilities never leave the cache (csrc/cpu).

2TVd FLOP and TV exponentials, forward and backward. Theta is read once (and its gradient written once), the table once
for every 256 tokens forward and for every 16 MiB of them backward; tiles as in vertex_oracle. Limits: float32 and
bfloat16, a frozen table, V < 2^31.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..dispatch import Call, only_dtypes


def unsupported(call: Call) -> str | None:
    if "E" in call.needs_grad:
        return "E requires a gradient, which only the reference computes"
    return only_dtypes(call, (torch.float32, torch.bfloat16))


def softmax_mixture(theta: Tensor, E: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    module = native.load("cpu")
    z = torch.empty(theta.shape[0], E.shape[1], dtype=E.dtype)
    lse = torch.empty(theta.shape[0])
    module.softmax_mixture(**_arguments(module, native.rows(theta), E, tau, lse), z=z.data_ptr(), where=_threads(E))
    return z, lse


def softmax_mixture_backward(theta: Tensor, E: Tensor, tau: float, lse: Tensor, grad_z: Tensor, dots: Tensor) -> Tensor:
    module = native.load("cpu")
    theta = native.rows(theta)
    grad_theta = torch.empty(theta.shape, dtype=theta.dtype)
    module.softmax_mixture_backward(
        **_arguments(module, theta, E, tau, lse),
        grad_z=grad_z.data_ptr(),
        dots=dots.data_ptr(),
        grad_theta=grad_theta.data_ptr(),
        where=_threads(E),
    )
    return grad_theta


def _arguments(module, theta: Tensor, E: Tensor, tau: float, lse: Tensor) -> dict:  # type: ignore[no-untyped-def]
    return {
        **native.matrix(module, "theta", theta),
        **native.matrix(module, "table", E),
        "rows": theta.shape[0],
        "vocab": E.shape[0],
        "dim": E.shape[1],
        "tau": tau,
        "lse": lse.data_ptr(),
    }


def _threads(E: Tensor) -> int:
    return native.where("cpu", E.device)
