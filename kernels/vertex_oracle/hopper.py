"""CUDA implementation for bfloat16 on Hopper (csrc/cuda/vertex_oracle_sm90.cu): tensor copies and wgmma.

The keys, and so the ids, are those of the other CUDA form; only on request until a measurement says otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import Call
from . import cuda


def unsupported(call: Call) -> str | None:
    capability = torch.cuda.get_device_capability(call.device)
    if capability != (9, 0):
        return f"needs compute capability 9.0, this is {capability[0]}.{capability[1]}"
    return cuda.unsupported(call)


def vertex_oracle(
    G: Tensor, E: Tensor, allowed: Tensor | None, Q2: Tensor | None, W2: Tensor | None, candidates: Tensor | None
) -> tuple[Tensor, Tensor]:
    return cuda.vertex_oracle(G, E, allowed, Q2, W2, candidates, hopper=True)
