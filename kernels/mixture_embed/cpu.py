"""C++ implementation (csrc/cpu/isa/mixture_embed.inl). Rows are split over threads: bitwise the same under any count.

2TAd FLOP over T*A gathered rows, each read once, four registers of columns at a time that stay over all atoms; ``z`` is
written once. Backward: the same FLOP and rows, ``T*A`` numbers written. Limits: float32 and bfloat16, float32 weights,
a frozen table.
"""

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
