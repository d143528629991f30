"""C++ implementation, a position at a time: combine, score its candidates, update, re-project (csrc/cpu).

4TCd FLOP over rows gathered twice, for the scores and for ``z``; positions are split over threads, nothing is tiled.
``T*C`` scores are kept in between. Limits: float32 and bfloat16, V < 2^31.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..dispatch import Call, only_dtypes
from ..numerics import Combination


def unsupported(call: Call) -> str | None:
    return only_dtypes(call, (torch.float32, torch.bfloat16))


def entropic_step(
    G_gold: Tensor,
    G_away: Tensor | None,
    E: Tensor,
    ids: Tensor,
    weights: Tensor,
    eta: float,
    combination: Combination,
    segments: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    labels, segment = (None, None) if segments is None else segments.unique(return_inverse=True)
    ids, weights, (T, C) = ids.contiguous(), weights.contiguous(), ids.shape
    new_weights, gap = torch.empty_like(weights), torch.empty(T)
    z = torch.empty(T, E.shape[1], dtype=E.dtype)
    native.call(
        "cpu", "entropic_step", E, gold=native.rows(G_gold), away=None if G_away is None else native.rows(G_away),
        ids=ids, weights=weights, segment=segment, segments=0 if labels is None else len(labels),
        new_weights=new_weights, z=z, gap=gap, rows=T, atoms=C, eta=eta, alpha=combination.alpha,
        beta=combination.beta, normalized=combination.combine == "normalized",
    )  # fmt: skip
    return new_weights, z, gap
