"""CUDA implementation for bfloat16 on Hopper (csrc/cuda/vertex_oracle.cu): tensor copies and wgmma, launched on the
current stream, no synchronisation.

2TVd FLOP in tiles of 128 tokens x 256 table rows; a table tile is read once for two blocks of tokens, 8 bytes a token
and part of the vocabulary are written. Limits: one table, no candidate sets, rows of whole 16-byte chunks. The
automatic choice prefers Triton until a measurement says otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..dispatch import Call, only_dtypes


def unsupported(call: Call) -> str | None:
    if call.arguments & {"Q2", "candidates"}:
        return "it takes one table and no candidate sets"
    if not call.aligned:
        return "rows of the table are not whole 16-byte chunks"
    return only_dtypes(call, (torch.bfloat16,))


def vertex_oracle(
    G: Tensor, E: Tensor, allowed: Tensor | None, Q2: Tensor | None, W2: Tensor | None, candidates: Tensor | None
) -> tuple[Tensor, Tensor]:
    T = G.shape[0]
    ids = torch.empty(T, dtype=torch.int64, device=E.device)
    values = torch.empty(T, dtype=torch.float32, device=E.device)
    tiles, blocks = -(-E.shape[0] // 256), max(1, -(-T // 128))
    if blocks > 1:
        blocks += blocks % 2  # pairs of them are clusters
    processors = torch.cuda.get_device_properties(E.device).multi_processor_count
    splits = max(1, min(tiles, processors // blocks))
    workspace = torch.empty(splits * T, dtype=torch.int64, device=E.device)
    native.call(
        "cuda", "vertex_oracle", E, queries=native.aligned_rows(G), allowed=native.contiguous(allowed), ids=ids,
        values=values, rows=T, splits=splits, workspace=workspace,
    )  # fmt: skip
    return ids, values
