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
    T = theta.shape[0]
    z, lse = torch.empty(T, E.shape[1], dtype=E.dtype), torch.empty(T)
    native.call("cpu", "softmax_mixture", E, theta=native.rows(theta), rows=T, tau=tau, lse=lse, z=z)
    return z, lse


def softmax_mixture_backward(theta: Tensor, E: Tensor, tau: float, lse: Tensor, grad_z: Tensor, dots: Tensor) -> Tensor:
    grad_theta = torch.empty(theta.shape, dtype=theta.dtype)
    native.call(
        "cpu", "softmax_mixture_backward", E, theta=native.rows(theta), rows=theta.shape[0], tau=tau, lse=lse,
        grad_z=grad_z, dots=dots, grad_theta=grad_theta,
    )  # fmt: skip
    return grad_theta
