"""Specification of :func:`latentrevise.kernels.hull_step`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..mixture_embed.reference import mixture_embed
from ..numerics import Combination, combine_gradients
from ..vertex_oracle.reference import vertex_oracle


def hull_step(
    G_gold: Tensor, G_away: Tensor | None, E: Tensor, ids: Tensor, weights: Tensor, gamma: Tensor, slot: int,
    combination: Combination, allowed: Tensor | None, candidates: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    g = combine_gradients(G_gold, G_away, combination)
    vertex, _ = vertex_oracle(g, E, allowed, None, None, candidates)
    steps = E[ids.long()].to(g.dtype) - E[vertex].to(g.dtype)[:, None]  # [T, A, d]
    gap = (weights.to(g.dtype) * torch.einsum("td,tad->ta", g, steps)).sum(1)

    A, gamma = ids.shape[1], gamma[:, None].to(weights.dtype)
    held = (ids == vertex[:, None]) & (weights > 0)
    first = torch.where(held, torch.arange(A, device=ids.device), A).amin(1, keepdim=True)
    column = torch.where(first < A, first, slot)
    weights = ((1 - gamma) * weights).scatter_add(1, column, gamma)
    ids = torch.where(gamma > 0, ids.scatter(1, column, vertex[:, None].to(ids.dtype)), ids)
    return ids, weights, mixture_embed(ids, weights, E), vertex, gap
