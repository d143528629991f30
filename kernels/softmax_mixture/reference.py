"""Specification of :func:`latentrevise.kernels.softmax_mixture`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..numerics import accumulation_dtype


def softmax_mixture(theta: Tensor, E: Tensor, tau: float) -> Tensor:
    dtype = accumulation_dtype(theta, E)
    probabilities = torch.softmax(theta.to(dtype) / tau, dim=1)
    with torch.autocast(E.device.type, enabled=False):
        return (probabilities @ E.to(dtype)).to(E.dtype)
