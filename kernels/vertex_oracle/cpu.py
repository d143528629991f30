"""C++ implementation: own micro-kernel over blocks of the table, best vertex kept in registers (csrc/cpu).

2TVd FLOP (2TV(d + d2) with a second pair). Tokens are packed as float32, 16 MiB at a time; for each such chunk the
table is read once, in blocks of up to 128 rows that all of the chunk's tokens are scored for, 32 at a time (fewer on
narrower units), and 12 bytes a token are written. 64 and more tokens are screened by 8-bit products first where the CPU
has them. Candidate sets: 2TCd FLOP over T*C gathered rows. Limits: float32 and bfloat16, V < 2^31.

Not ``torch.mm`` on chunks of the table: which thread, block or part computes a score cannot change a bit of it here,
which a library matmul does not promise, and torch emulates the bfloat16 product on CPUs without one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..dispatch import Call, only_dtypes


def unsupported(call: Call) -> str | None:
    return only_dtypes(call, (torch.float32, torch.bfloat16))


def vertex_oracle(
    G: Tensor, E: Tensor, allowed: Tensor | None, Q2: Tensor | None, W2: Tensor | None, candidates: Tensor | None
) -> tuple[Tensor, Tensor]:
    T = G.shape[0]
    ids, values = torch.empty(T, dtype=torch.int64), torch.empty(T)
    native.call(
        "cpu", "vertex_oracle", E, queries=native.rows(G), queries2=None if Q2 is None else native.rows(Q2), table2=W2,
        dim2=0 if W2 is None else W2.shape[1], allowed=native.contiguous(allowed),
        candidates=native.contiguous(candidates), candidate_count=0 if candidates is None else candidates.shape[1],
        ids=ids, values=values, rows=T,
    )  # fmt: skip
    return ids, values
