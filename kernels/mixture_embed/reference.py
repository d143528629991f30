"""Specification of :func:`latentrevise.kernels.mixture_embed`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..numerics import accumulation_dtype


def mixture_embed(ids: Tensor, weights: Tensor, E: Tensor) -> Tensor:
    dtype = accumulation_dtype(weights, E)
    rows = E[ids.long()].to(dtype)  # [T, A, d]
    with torch.autocast(E.device.type, enabled=False):
        return torch.einsum("ta,tad->td", weights.to(dtype), rows).to(E.dtype)
