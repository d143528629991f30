"""C++ implementation: the gradients are combined while they are packed for the oracle's micro-kernel (csrc/cpu).

2TVd FLOP as in vertex_oracle, its chunks, tiles and screening included, and 4TAd for the gap and the new ``z``, which
gather a token's A + 1 rows and its A rows. Limits: float32 and bfloat16, V < 2^31.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..dispatch import Call, only_dtypes


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
    alpha: float,
    beta: float,
    combine: str,
    allowed: Tensor | None,
    candidates: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    module = native.load("cpu")
    gold, away = native.rows(G_gold), None if G_away is None else native.rows(G_away)
    ids, weights, gamma = ids.contiguous(), weights.contiguous(), gamma.float().contiguous()
    allowed = None if allowed is None else allowed.contiguous()
    candidates = None if candidates is None else candidates.contiguous()
    T, A = ids.shape
    new_ids, new_weights = torch.empty_like(ids), torch.empty_like(weights)
    z, gap = torch.empty(T, E.shape[1], dtype=E.dtype), torch.empty(T)
    vertex = torch.empty(T, dtype=torch.int64)
    module.hull_step(
        **native.matrix(module, "gold", gold),
        **native.matrix(module, "away", away),
        **native.matrix(module, "table", E),
        ids=ids.data_ptr(),
        ids_dtype=native.dtype_code(module, ids.dtype),
        weights=weights.data_ptr(),
        gamma=gamma.data_ptr(),
        allowed=native.pointer(allowed),
        **native.candidates(module, candidates),
        new_ids=new_ids.data_ptr(),
        new_weights=new_weights.data_ptr(),
        z=z.data_ptr(),
        vertex=vertex.data_ptr(),
        gap=gap.data_ptr(),
        rows=T,
        vocab=E.shape[0],
        dim=E.shape[1],
        atoms=A,
        slot=slot,
        alpha=alpha,
        beta=beta,
        normalized=int(combine == "normalized"),
        where=native.where("cpu", E.device),
    )
    return new_ids, new_weights, z, vertex, gap
