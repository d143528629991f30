"""Specification of :func:`latentrevise.kernels.vertex_oracle`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..numerics import accumulation_dtype

BLOCK = 32768  # table rows scored at a time: [T, V] is never whole


def vertex_oracle(
    G: Tensor, E: Tensor, allowed: Tensor | None, Q2: Tensor | None, W2: Tensor | None, candidates: Tensor | None
) -> tuple[Tensor, Tensor]:
    dtype, V = accumulation_dtype(G, E, Q2, W2), E.shape[0]
    ids = torch.full((G.shape[0],), V, dtype=torch.int64, device=G.device)
    values = torch.full((G.shape[0],), torch.inf, dtype=dtype, device=G.device)
    for start in range(0, V if candidates is None else candidates.shape[1], BLOCK):
        if candidates is None:
            rows = torch.arange(start, min(start + BLOCK, V), device=G.device).expand(G.shape[0], -1)
            scores = G.to(dtype) @ E[start : start + BLOCK].to(dtype).T
            if Q2 is not None and W2 is not None:
                scores += Q2.to(dtype) @ W2[start : start + BLOCK].to(dtype).T
        else:
            rows = candidates[:, start : start + BLOCK].long()
            scores = torch.einsum("td,tcd->tc", G.to(dtype), E[rows.clamp_min(0)].to(dtype))
            if Q2 is not None and W2 is not None:
                scores += torch.einsum("td,tcd->tc", Q2.to(dtype), W2[rows.clamp_min(0)].to(dtype))
        alive = rows >= 0 if allowed is None else (rows >= 0) & allowed[rows.clamp_min(0)]
        best = torch.minimum(values, scores.masked_fill(~alive, torch.inf).amin(1))  # NaN wins here, as in torch.min
        ids = torch.where((values == best) | values.isnan(), ids, V)
        hit = alive & ((scores == best[:, None]) | (scores.isnan() & best[:, None].isnan()))
        ids = torch.minimum(ids, torch.where(hit, rows, V).amin(1))
        values = best
    return torch.where(ids == V, -1, ids), values
