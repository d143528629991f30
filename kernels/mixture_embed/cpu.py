"""C++ implementation (csrc/cpu/isa/kernels.inl). Rows are split over threads: bitwise the same under any count."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import Call
from . import _native


def unsupported(call: Call) -> str | None:
    return _native.unsupported(call, (torch.float32, torch.bfloat16))


def mixture_embed(ids: Tensor, weights: Tensor, E: Tensor) -> Tensor:
    return _native.forward("cpu", ids, weights, E)


def mixture_embed_backward(ids: Tensor, grad_z: Tensor, E: Tensor) -> Tensor:
    return _native.backward("cpu", ids, grad_z, E)
