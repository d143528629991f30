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
    ids = torch.full((len(G),), V, device=G.device)
    values = torch.full((len(G),), torch.inf, dtype=dtype, device=G.device)
    queries = torch.cat([x.to(dtype) for x in (G, Q2) if x is not None], 1)
    listed = torch.arange(V, device=G.device)[None] if candidates is None else candidates.long()
    for rows in listed.split(BLOCK, 1):  # [1, n], or [T, n] candidates
        at = rows.clamp(0, V - 1)  # another row than asked for: none, as the padding
        table = torch.cat([x[at].to(dtype) for x in (E, W2) if x is not None], 2)
        scores = queries @ table[0].T if candidates is None else torch.einsum("td,tnd->tn", queries, table)
        alive = rows == at if allowed is None else (rows == at) & allowed[at]
        scores = torch.cat([values[:, None], scores.masked_fill(~alive, torch.inf)], 1)
        rows = torch.cat([ids[:, None], torch.where(alive, rows, V).expand(len(G), -1)], 1)
        values = scores.amin(1)  # NaN wins here, as in torch.min
        ids = torch.where((scores == values[:, None]) | scores.isnan(), rows, V).amin(1)
    return torch.where(ids == V, -1, ids), values
