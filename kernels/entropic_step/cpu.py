"""C++ implementation, a position at a time: combine, score its candidates, update, re-project (csrc/cpu).

4TCd FLOP over rows gathered twice, for the scores and for ``z``; positions are split over threads, nothing is tiled.
``T*C`` scores are kept in between. Limits: float32 and bfloat16, V < 2^31.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..dispatch import Call, only_dtypes


def unsupported(call: Call) -> str | None:
    return only_dtypes(call, (torch.float32, torch.bfloat16))


def entropic_step(
    G_gold: Tensor,
    G_away: Tensor | None,
    E: Tensor,
    ids: Tensor,
    weights: Tensor,
    eta: float,
    alpha: float,
    beta: float,
    combine: str,
    segments: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    module = native.load("cpu")
    gold, away = native.rows(G_gold), None if G_away is None else native.rows(G_away)
    ids, weights = ids.contiguous(), weights.contiguous()
    labels, segment = (None, None) if segments is None else segments.unique(return_inverse=True)
    T, A = ids.shape
    new_weights, gap = torch.empty_like(weights), torch.empty(T)
    z = torch.empty(T, E.shape[1], dtype=E.dtype)
    module.entropic_step(
        **native.matrix(module, "gold", gold),
        **native.matrix(module, "away", away),
        **native.matrix(module, "table", E),
        ids=ids.data_ptr(),
        ids_dtype=native.dtype_code(module, ids.dtype),
        weights=weights.data_ptr(),
        segment=native.pointer(segment),
        segments=0 if labels is None else len(labels),
        new_weights=new_weights.data_ptr(),
        z=z.data_ptr(),
        gap=gap.data_ptr(),
        rows=T,
        vocab=E.shape[0],
        dim=E.shape[1],
        atoms=A,
        alpha=alpha,
        beta=beta,
        eta=eta,
        normalized=int(combine == "normalized"),
        where=native.where("cpu", E.device),
    )
    return new_weights, z, gap
