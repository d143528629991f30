"""Specification of :func:`latentrevise.kernels.entropic_step`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..mixture_embed.reference import mixture_embed
from ..numerics import Combination, combine_gradients


def entropic_step(
    G_gold: Tensor, G_away: Tensor | None, E: Tensor, ids: Tensor, weights: Tensor, eta: float,
    combination: Combination, segments: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    g = combine_gradients(G_gold, G_away, combination)
    scores = torch.einsum("td,tcd->tc", g, E[ids.long()].to(g.dtype))
    alive = weights > 0
    rel = (scores - (weights * scores).sum(1, keepdim=True)).masked_fill(~alive, 0)
    gap = -rel.amin(1).clamp_max(0)  # the least rel is <= 0 but for rounding: the mean is a convex combination

    scale = rel.abs().amax(1)
    if segments is not None:
        labels, rows = segments.unique(return_inverse=True)
        scale = scale.new_zeros(len(labels)).scatter_reduce(0, rows, scale, "amax")[rows]
    scaled = torch.where(scale[:, None] > 0, (rel + gap[:, None]) / scale[:, None], 0)  # >= 0: exp cannot overflow
    new = weights * torch.exp(-eta * scaled)
    total = new.sum(1, keepdim=True)
    new = torch.where((scale[:, None] > 0) & (total > 0), new / total, weights).to(weights.dtype)
    return new, mixture_embed(ids, new, E), gap
