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


def unsupported(call: Call) -> str | None:
    return only_dtypes(call, (torch.float32, torch.bfloat16))


def plausible_vertices(
    H: Tensor,
    W: Tensor,
    log_p_min: float,
    max_candidates: int,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    temperature: float,
    allowed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    module = native.load("cpu")
    H, T = native.rows(H), H.shape[0]
    bias = None if bias is None else bias.float().contiguous()
    allowed = None if allowed is None else allowed.contiguous()
    ids = torch.empty(T, max_candidates, dtype=torch.int64)
    logps = torch.empty(T, max_candidates)
    counts = torch.empty(T, dtype=torch.int64)
    module.plausible_vertices(
        **native.matrix(module, "queries", H),
        **native.matrix(module, "table", W),
        bias=native.pointer(bias),
        allowed=native.pointer(allowed),
        ids=ids.data_ptr(),
        logps=logps.data_ptr(),
        counts=counts.data_ptr(),
        rows=T,
        vocab=W.shape[0],
        dim=W.shape[1],
        max_candidates=max_candidates,
        scale=scale,
        softcap=softcap or 0.0,
        temperature=temperature,
        log_p_min=log_p_min,
        where=native.where("cpu", W.device),
    )
    return ids, logps, counts
