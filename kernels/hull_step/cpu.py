"""C++ implementation: the gradients are combined while they are packed for the oracle's micro-kernel (csrc/cpu).

2TVd FLOP as in vertex_oracle, its chunks, tiles and screening included, and 4TAd for the gap and the new ``z``, which
gather a token's A + 1 rows and its A rows. Limits: float32 and bfloat16, V < 2^31.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..dispatch import Call, only_dtypes
from ..numerics import Combination


def unsupported(call: Call) -> str | None:
    return only_dtypes(call, (torch.float32, torch.bfloat16))


def hull_step(
    G_gold: Tensor,
    G_away: Tensor | None,
    E: Tensor,
    ids: Tensor,
    weights: Tensor,
    gamma: Tensor,
    slot: int,
    combination: Combination,
    allowed: Tensor | None,
    candidates: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    ids, weights, (T, A) = ids.contiguous(), weights.contiguous(), ids.shape
    new_ids, new_weights = torch.empty_like(ids), torch.empty_like(weights)
    z, gap = torch.empty(T, E.shape[1], dtype=E.dtype), torch.empty(T)
    vertex = torch.empty(T, dtype=torch.int64)
    native.call(
        "cpu", "hull_step", E, gold=native.rows(G_gold), away=None if G_away is None else native.rows(G_away), ids=ids,
        weights=weights, gamma=gamma.float().contiguous(), allowed=native.contiguous(allowed),
        candidates=native.contiguous(candidates), candidate_count=0 if candidates is None else candidates.shape[1],
        new_ids=new_ids, new_weights=new_weights, z=z, vertex=vertex, gap=gap, rows=T, atoms=A, slot=slot,
        alpha=combination.alpha, beta=combination.beta, normalized=combination.combine == "normalized",
    )  # fmt: skip
    return new_ids, new_weights, z, vertex, gap
