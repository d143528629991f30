"""Specification of :func:`latentrevise.kernels.linear_logprob`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..numerics import Transform, accumulation_dtype, transform_logits


def linear_logprob(
    H: Tensor,
    W: Tensor,
    y: Tensor,
    bias: Tensor | None,
    transform: Transform,
    entropy: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(H, W)
    with torch.autocast(H.device.type, enabled=False):
        logits = transform_logits(H.to(dtype) @ W.to(dtype).T, bias, transform)
    logps = logits.log_softmax(1)
    logp = logps.gather(1, y[:, None]).squeeze(1)
    return (logp, -(logps.exp() * logps).sum(1)) if entropy else logp
