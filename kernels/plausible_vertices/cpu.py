"""C++ implementation: one pass that keeps the online softmax and lists what its sums so far let through (csrc/cpu).

2TVd FLOP; tiles as in vertex_oracle, the table is read once for every 256 tokens. The sums only grow, so the floor only
rises: the list is a superset of the answer, cut and sorted at the end. Extra memory is proportional to the tokens near
the floor, at most about ``16 / p_min`` a position, 16 bytes each. Limits: float32 and bfloat16, V < 2^31.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..dispatch import Call, only_dtypes
from ..numerics import Transform


def unsupported(call: Call) -> str | None:
    return only_dtypes(call, (torch.float32, torch.bfloat16))


def plausible_vertices(
    H: Tensor,
    W: Tensor,
    log_p_min: float,
    max_candidates: int,
    bias: Tensor | None,
    transform: Transform,
    allowed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    T = H.shape[0]
    ids = torch.empty(T, max_candidates, dtype=torch.int64)
    logps = torch.empty(T, max_candidates)
    counts = torch.empty(T, dtype=torch.int64)
    native.call(
        "cpu", "plausible_vertices", W, queries=native.rows(H), allowed=native.contiguous(allowed),
        bias=None if bias is None else bias.float().contiguous(), ids=ids, logps=logps, counts=counts, rows=T,
        max_candidates=max_candidates, scale=transform.scale, softcap=transform.softcap or 0.0,
        temperature=transform.temperature, log_p_min=log_p_min,
    )  # fmt: skip
    return ids, logps, counts
