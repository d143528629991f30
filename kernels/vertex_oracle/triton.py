"""Triton implementation: score tiles, reduced where they are to one key a row, then a finaliser over the parts.

Identity: ``argmin_v <G_t, E_v>`` is hard attention of T queries over V keys; as the minimum of 64-bit keys (the score's
bits made order-preserving, then the id) it is associative, so neither tiles nor parts can change the result: ties go to
the lowest id, NaN (the lowest key) below everything.

FLOPs and bytes: 2*T*V*d a bfloat16 term of the queries; the table is read once from memory and T / BM times from L2,
8 bytes a token and part are written.

Tiling: a program owns BM tokens and one part of the vocabulary, which it walks in tiles of BN rows and BK columns.
Parts are the slow grid dimension: programs that run together walk the same rows, which then come from L2. Candidate
sets: a program scores CANDIDATES gathered rows of a token, 2*T*C*d FLOPs and bytes, bound by memory.

Numerics: float32 accumulation; a float32 table is multiplied as three tf32 products; float32 queries against a bfloat16
table are cut into three bfloat16 terms that together are exact, at three times the FLOPs. Candidates are scored in
float32 throughout.

Limits: float32 and bfloat16; ids below 2**31.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import native
from ..dispatch import Call, interpreting_triton, only_dtypes

LOWEST = tl.constexpr(-(2**31))
NOTHING = tl.constexpr(2**63 - 1)

# (BM, BN, BK, warps, stages, descriptors) by dtype of the table and whether there are few tokens; benchmarks/tune.py
# measures others. Descriptors: tiles are loaded through tensor descriptors, which Hopper's copy engine serves.
CONFIGS = {
    ("bfloat16", "few"): (16, 128, 64, 4, 4, False),
    ("bfloat16", "many"): (128, 128, 64, 8, 3, False),
    ("float32", "few"): (16, 128, 32, 4, 3, False),
    ("float32", "many"): (64, 64, 32, 4, 3, False),
}
CANDIDATES, BLOCK = 8, 256  # gathered rows, and columns of them, that a program holds


def config(dtype: torch.dtype, T: int, terms: int = 1, second: bool = False) -> tuple[int, int, int, int, int, bool]:
    BM, BN, BK, warps, stages, described = CONFIGS[str(dtype).removeprefix("torch."), "few" if T <= 32 else "many"]
    # Or registers spill: three query tiles at once, half the tokens; two tables, eight warps and three stages at most.
    BM, warps, stages = min(BM, 64) if terms > 1 else BM, 8 if second else warps, min(stages, 3) if second else stages
    return BM, BN, BK, warps, stages, described


@triton.jit
def score_keys(scores, ids, valid):
    """Order-preserving 64-bit keys of scores and ids."""
    scores = tl.where(scores == 0.0, 0.0, scores)  # -0.0 ties with 0.0
    bits = scores.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ordered = tl.where(scores != scores, LOWEST, ordered)
    keys = (ordered.to(tl.int64) << 32) | ids.to(tl.int64)
    return tl.where(valid, keys, NOTHING)


@triton.jit
def add_scores(acc, x, table, rows, valid_rows, tokens, valid_tokens, d, x_stride, x_term, table_stride,
               TERMS: tl.constexpr, BK: tl.constexpr, WIDEN: tl.constexpr):  # fmt: skip
    """``acc += sum over terms of x_term[tokens] @ table[rows]^T``."""
    k = tl.arange(0, BK)
    for start in range(0, d, BK):
        inside = start + k < d
        e = tl.load(
            table + rows.to(tl.int64)[:, None] * table_stride + (start + k)[None, :],
            mask=valid_rows[:, None] & inside[None, :],
            other=0.0,
        )
        if WIDEN:
            e = e.to(tl.float32)
        for term in tl.static_range(TERMS):
            q = tl.load(
                x + tl.cast(x_term, tl.int64) * term + tokens.to(tl.int64)[:, None] * x_stride + (start + k)[None, :],
                mask=valid_tokens[:, None] & inside[None, :],
                other=0.0,
            )
            if WIDEN:  # the interpreter multiplies the bits of a bfloat16
                q = q.to(tl.float32)
            acc = tl.dot(q, tl.trans(e), acc, input_precision="tf32x3")
    return acc


@triton.jit
def add_described_scores(acc, x, table, row, token, T, d, TERMS: tl.constexpr, BK: tl.constexpr, WIDEN: tl.constexpr):
    """The same from descriptors of ``x [TERMS * T, d]`` and the table; rows from ``row`` and tokens from ``token``."""
    for start in range(0, d, BK):
        e = table.load([row, start])
        if WIDEN:
            e = e.to(tl.float32)
        for term in tl.static_range(TERMS):
            q = x.load([token + term * T, start])
            if WIDEN:
                q = q.to(tl.float32)
            acc = tl.dot(q, tl.trans(e), acc, input_precision="tf32x3")
    return acc


@triton.jit
def oracle_parts(x, table, x2, table2, allowed, keys, T, V, d, d2, x_stride, x_term, table_stride, x2_stride, x2_term,
                 table2_stride, part_rows, token_blocks, HAS_ALLOWED: tl.constexpr, HAS_SECOND: tl.constexpr,
                 TERMS: tl.constexpr, TERMS2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                 BK: tl.constexpr, DESCRIPTORS: tl.constexpr, WIDEN: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    part = program // token_blocks
    tokens = (program % token_blocks) * BM + tl.arange(0, BM)
    valid_tokens = tokens < T
    best = tl.full((BM,), NOTHING, tl.int64)
    first = part * part_rows
    for start in range(first, min(first + part_rows, V), BN):
        rows = start + tl.arange(0, BN)
        valid = rows < V
        acc = tl.zeros((BM, BN), tl.float32)
        if DESCRIPTORS:
            acc = add_described_scores(acc, x, table, start, (program % token_blocks) * BM, T, d, TERMS, BK, WIDEN)
        else:
            acc = add_scores(acc, x, table, rows, valid, tokens, valid_tokens, d, x_stride, x_term, table_stride, TERMS,
                             BK, WIDEN)  # fmt: skip
        if HAS_SECOND:
            acc = add_scores(acc, x2, table2, rows, valid, tokens, valid_tokens, d2, x2_stride, x2_term, table2_stride,
                             TERMS2, BK, WIDEN)  # fmt: skip
        if HAS_ALLOWED:
            valid = valid & (tl.load(allowed + rows, mask=valid, other=0) != 0)
        found = score_keys(acc, rows[None, :], valid[None, :] & valid_tokens[:, None])
        best = tl.minimum(best, tl.min(found, axis=1))
    tl.store(keys + part.to(tl.int64) * T + tokens, best, mask=valid_tokens)


@triton.jit
def gathered_scores(x, table, ids, there, d, table_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Products of one row ``x`` with the rows ``ids`` of the table; 0 where one is not ``there``."""
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, d, BLOCK):
        j = start + tl.arange(0, BLOCK)
        q = tl.load(x + j, mask=j < d, other=0.0).to(tl.float32)
        row = tl.load(
            table + ids[:, None] * table_stride + j[None, :], mask=there[:, None] & (j < d)[None, :], other=0.0
        )
        acc += tl.where(there[:, None], q[None, :] * row.to(tl.float32), 0.0)
    return tl.sum(acc, axis=1)


@triton.jit
def candidate_parts(x, table, x2, table2, candidates, allowed, keys, T, V, C, d, d2, x_stride, table_stride, x2_stride,
                    table2_stride, HAS_ALLOWED: tl.constexpr, HAS_SECOND: tl.constexpr, ROWS: tl.constexpr,
                    BLOCK: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    t = (program % T).to(tl.int64)
    part = (program // T).to(tl.int64)
    c = part * ROWS + tl.arange(0, ROWS)
    ids = tl.load(candidates + t * C + c, mask=c < C, other=-1).to(tl.int64)
    there = (ids >= 0) & (ids < V)
    if HAS_ALLOWED:
        there = there & (tl.load(allowed + ids, mask=there, other=0) != 0)
    scores = gathered_scores(x + t * x_stride, table, ids, there, d, table_stride, ROWS, BLOCK)
    if HAS_SECOND:
        scores += gathered_scores(x2 + t * x2_stride, table2, ids, there, d2, table2_stride, ROWS, BLOCK)
    tl.store(keys + part * T + t, tl.min(score_keys(scores, ids, there), axis=0))


@triton.jit
def oracle_finish(keys, ids, values, T, PARTS, BP: tl.constexpr):
    token = tl.program_id(0)
    parts = tl.arange(0, BP)
    best = tl.min(tl.load(keys + parts.to(tl.int64) * T + token, mask=parts < PARTS, other=NOTHING), axis=0)
    ordered = (best >> 32).to(tl.int32)
    bits = tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    value = tl.where(ordered == LOWEST, float("nan"), bits.to(tl.float32, bitcast=True))
    empty = best == NOTHING
    tl.store(ids + token, tl.where(empty, -1, best & 0xFFFFFFFF))
    tl.store(values + token, tl.where(empty, float("inf"), value))


def unsupported(call: Call) -> str | None:
    return only_dtypes(call, (torch.float32, torch.bfloat16))


def terms(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``[n, T, d]`` in ``dtype`` whose sum over n is ``x``: three bfloat16 hold a float32 exactly."""
    if x.dtype == dtype or dtype == torch.float32:
        return x.to(dtype).contiguous()[None]
    parts = []
    for _ in range(3):
        parts.append(x.to(dtype))
        x = torch.where(x.isfinite(), x - parts[-1].to(x.dtype), 0.0)
    return torch.stack(parts)


def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def has_copy_engine(device: torch.device) -> bool:
    """Whether tensor descriptors are served by hardware; the interpreter has them too."""
    return interpreting_triton() or torch.cuda.get_device_capability(device) >= (9, 0)


def split(blocks: int, V: int, BN: int, device: torch.device) -> tuple[int, int]:
    """(parts, rows a part) of the vocabulary: enough programs to fill the device twice, whole tiles of BN rows."""
    programs = 2 * processors(device)
    tiles = triton.cdiv(V, BN)
    parts = max(1, min(tiles, programs // max(1, blocks)))
    rows = triton.cdiv(tiles, parts) * BN
    return triton.cdiv(V, rows), rows


def describe(x: Tensor, rows: int, columns: int) -> TensorDescriptor | None:
    """A descriptor of blocks of a matrix; None before Hopper, or if rows do not start at multiples of 16 bytes."""
    if not has_copy_engine(x.device):
        return None
    if x.data_ptr() % 16 or x.stride(0) * x.element_size() % 16:
        return None
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns])


def find_keys(x: Tensor, E: Tensor, x2: Tensor | None, W2: Tensor | None, allowed: Tensor | None) -> tuple[Tensor, int]:
    """Keys ``[parts, T]`` of terms ``x [n, T, d]`` (and ``x2``)."""
    T, (V, d) = x.shape[1], E.shape
    BM, BN, BK, warps, stages, described = config(
        E.dtype, T, max(x.shape[0], 0 if x2 is None else x2.shape[0]), x2 is not None
    )
    blocks = triton.cdiv(T, BM)
    parts, part_rows = split(blocks, V, BN, E.device)
    keys = torch.empty(parts, T, dtype=torch.int64, device=E.device)
    y, table2 = (x, E) if x2 is None or W2 is None else (x2, W2)
    queries, table = (describe(x.flatten(0, 1), BM, BK), describe(E, BN, BK)) if described else (None, None)
    described = queries is not None and table is not None
    if not described:
        queries, table = x, E
    oracle_parts[(blocks * parts,)](
        queries, table, y, table2, E if allowed is None else allowed, keys, T, V, d, table2.shape[1], x.stride(1),
        x.stride(0), E.stride(0), y.stride(1), y.stride(0), table2.stride(0), part_rows, blocks,
        HAS_ALLOWED=allowed is not None,
        HAS_SECOND=x2 is not None, TERMS=x.shape[0], TERMS2=y.shape[0], BM=BM, BN=BN, BK=BK,
        DESCRIPTORS=described, WIDEN=interpreting_triton(), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return keys, parts


def candidate_keys(
    G: Tensor, E: Tensor, Q2: Tensor | None, W2: Tensor | None, allowed: Tensor | None, candidates: Tensor
) -> tuple[Tensor, int]:
    """The same for candidate sets ``[T, C]``; an id outside the table counts as padding."""
    G, candidates, (T, C) = native.rows(G), candidates.contiguous(), candidates.shape
    x2, table2 = (G, E) if Q2 is None or W2 is None else (native.rows(Q2), W2)
    parts = max(1, triton.cdiv(C, CANDIDATES))
    keys = torch.empty(parts, T, dtype=torch.int64, device=E.device)
    candidate_parts[(T * parts,)](
        G, E, x2, table2, candidates, E if allowed is None else allowed, keys, T, E.shape[0], C, E.shape[1],
        table2.shape[1], G.stride(0), E.stride(0), x2.stride(0), table2.stride(0), HAS_ALLOWED=allowed is not None,
        HAS_SECOND=Q2 is not None, ROWS=CANDIDATES, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return keys, parts


def vertex_oracle(
    G: Tensor, E: Tensor, allowed: Tensor | None, Q2: Tensor | None, W2: Tensor | None, candidates: Tensor | None
) -> tuple[Tensor, Tensor]:
    T, allowed = G.shape[0], None if allowed is None else allowed.contiguous()
    ids = torch.empty(T, dtype=torch.int64, device=G.device)
    values = torch.empty(T, dtype=torch.float32, device=G.device)
    if T == 0:
        return ids, values
    if candidates is not None:
        keys, parts = candidate_keys(G, E, Q2, W2, allowed, candidates)
    else:
        x2 = None if Q2 is None or W2 is None else terms(Q2, W2.dtype)
        keys, parts = find_keys(terms(G, E.dtype), E, x2, W2, allowed)
    oracle_finish[(T,)](keys, ids, values, T, parts, BP=triton.next_power_of_2(parts), num_warps=1)
    return ids, values
