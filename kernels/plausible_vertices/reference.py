"""Specification of :func:`latentrevise.kernels.plausible_vertices`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..numerics import Transform, accumulation_dtype, transform_logits

BLOCK = 64  # rows at a time: [T, V] is never whole


def plausible_vertices(
    H: Tensor, W: Tensor, log_p_min: float, max_candidates: int, bias: Tensor | None,
    transform: Transform, allowed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dtype, blocks = accumulation_dtype(H, W), []
    for rows in H.split(BLOCK) if H.shape[0] else [H]:
        logits = transform_logits(rows.to(dtype) @ W.to(dtype).T, bias, transform)
        logp = logits.log_softmax(1)
        above = logp >= log_p_min if allowed is None else (logp >= log_p_min) & allowed
        kept = logp.masked_fill(~above, -torch.inf)
        best, ids = (x[:, :max_candidates] for x in kept.sort(dim=1, descending=True, stable=True))
        ids, missing = ids.masked_fill(best == -torch.inf, -1), max(0, max_candidates - W.shape[0])
        blocks.append((pad(ids, (0, missing), value=-1), pad(best, (0, missing), value=-torch.inf), above.sum(1)))
    ids, logps, counts = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    return ids, logps, counts
