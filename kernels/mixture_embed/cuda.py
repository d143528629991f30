"""CUDA implementation (csrc/cuda/mixture_embed.cu), launched on the current stream, no synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import Call
from . import _native


def unsupported(call: Call) -> str | None:
    return _native.unsupported(call, (torch.float32, torch.bfloat16, torch.float16))


def mixture_embed(ids: Tensor, weights: Tensor, E: Tensor) -> Tensor:
    return _native.forward("cuda", ids, weights, E)


def mixture_embed_backward(ids: Tensor, grad_z: Tensor, E: Tensor) -> Tensor:
    return _native.backward("cuda", ids, grad_z, E)
