"""Triton implementation: one bfloat16 pass over the table, reduced where scores are made, then a finaliser.

Identity: ``argmin_v <G_t, E_v>`` is hard attention of T queries over V keys; as the minimum of 64-bit keys (the score's
bits made order-preserving, then the id) it is associative, so neither tiles nor parts can change the result: ties go to
the lowest id, NaN (the lowest key) below everything.

FLOPs and bytes: 2*T*V*d; the table is read once from memory and T / BM times from L2. Bfloat16 queries and table: 8
bytes a token and part are written. Anything else (screening): 12 bytes a token and tile, and what is left is read.

Tiling: a program owns BM tokens and one part of the vocabulary, which it walks in tiles of BN rows and BK columns.
Parts are the slow grid dimension: programs that run together walk the same rows, which then come from L2. Candidate
sets: a program scores CANDIDATES gathered rows of a token, 2*T*C*d FLOPs and bytes, bound by memory.

Numerics: bfloat16 operands are multiplied as they are, with float32 sums. Float32 queries or tables are rounded to
bfloat16 and *screened*: each (token, tile) keeps minimum, argmin and second minimum, and every score that lies within
the bound of :func:`rescore` of the least is made again in float64. So the ids are those of exact arithmetic, whatever
the tensor cores round. A table of bfloat16 is measured once (the norms of its rows), one of float32 rounded each time.
Candidates are scored in float32 throughout.

Limits: float32 and bfloat16; ids below 2**31. A kept measurement is taken for good as long as the table's storage and
autograd's version of it are the same: what writes to it behind autograd's back (``.data``) must clear ``_measured``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .. import native
from ..dispatch import Call, interpreting_triton, only_dtypes
from .tiles import (
    LOWEST,
    NOTHING,
    add_described_scores,
    add_scores,
    describable,
    describe,
    gathered_scores,
    has_copy_engine,
    row_minimum,
    score_keys,
    split,
    tile_scores,
)

NOBODY = tl.constexpr(2**31 - 1)  # no id

# (BM, BN, BK, warps, stages) for few tokens, for many, and for many with tiles loaded through tensor descriptors, which
# Hopper's copy engine serves; benchmarks/tune.py measures others.
CONFIGS = {"few": (16, 128, 64, 4, 4), "many": (128, 128, 32, 8, 4), "described": (128, 256, 64, 8, 4)}
CANDIDATES, BLOCK = 8, 256  # gathered rows, and columns of them, that a program holds
TILES = 512  # whose minima a rescoring program holds


@triton.jit(do_not_specialize=["T", "token_blocks"])
def oracle_parts(x, table, x2, table2, allowed, keys, lows, columns, seconds, T, V, d, d2, x_stride, table_stride,
                 x2_stride, table2_stride, part_rows, token_blocks, HAS_ALLOWED: tl.constexpr, HAS_SECOND: tl.constexpr,
                 SCREEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DESCRIPTORS: tl.constexpr,
                 WIDEN: tl.constexpr):  # fmt: skip
    """The best key of each token in this part; if SCREEN, minimum, its row and second minimum a tile."""
    program = tl.program_id(0)
    part = program // token_blocks
    token = (program % token_blocks) * BM
    tokens = token + tl.arange(0, BM)
    valid_tokens = tokens < T
    column = tl.arange(0, BN)
    best = tl.full((BM,), NOTHING, tl.int64)
    first = part * part_rows
    for start in range(first, min(first + part_rows, V), BN):
        rows = start + column
        valid = rows < V
        acc = tile_scores(x, table, rows, valid, tokens, valid_tokens, start, token, T, d, x_stride, 0, table_stride, 1,
                          BM, BN, BK, DESCRIPTORS, WIDEN)  # fmt: skip
        if HAS_SECOND:
            tl.assume(d2 > 0)
            if DESCRIPTORS:
                acc = add_described_scores(acc, x2, table2, start, token, T, d2, 1, BK, WIDEN)
            else:
                acc = add_scores(acc, x2, table2, rows, valid, tokens, valid_tokens, d2, x2_stride, 0, table2_stride, 1,
                                 BK, WIDEN)  # fmt: skip
        if HAS_ALLOWED:
            valid = valid & (tl.load(allowed + rows, mask=valid, other=0) != 0)
        acc = tl.where(valid[None, :], acc, float("inf"))
        low = row_minimum(acc, WIDEN)
        # The first that is not larger; of a tile with NaN, all infinite or all left out that is any row:
        # the finaliser looks again.
        found = tl.min(tl.where(acc > low[:, None], BN, column[None, :]), axis=1)
        if SCREEN:
            at = tl.cast(start // BN, tl.int64) * T + tokens
            tl.store(lows + at, low, mask=valid_tokens)
            tl.store(columns + at, start + found, mask=valid_tokens)
            rest = tl.where(column[None, :] == found[:, None], float("inf"), acc)
            tl.store(seconds + at, row_minimum(rest, WIDEN), mask=valid_tokens)
        else:
            best = tl.minimum(best, score_keys(low, start + found, valid_tokens))
    if not SCREEN:
        tl.store(keys + part.to(tl.int64) * T + tokens, best, mask=valid_tokens)


@triton.jit(do_not_specialize=["N"])
def round_rows(x, rounded, norms, rests, N, d, x_stride, STORE: tl.constexpr, ROWS: tl.constexpr,
               BLOCK: tl.constexpr):  # fmt: skip
    """Rows rounded to bfloat16; in float64, bounds of the norms of a row, rounded or not, and of what rounding took."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = n < N
    n = n.to(tl.int64)
    total = tl.zeros((ROWS, BLOCK), tl.float64)
    taken = tl.zeros((ROWS, BLOCK), tl.float64)
    for start in range(0, d, BLOCK):
        j = start + tl.arange(0, BLOCK)
        there = valid[:, None] & (j < d)[None, :]
        value = tl.load(x + n[:, None] * x_stride + j[None, :], mask=there, other=0.0).to(tl.float32)
        half = value.to(tl.bfloat16)
        if STORE:
            tl.store(rounded + n[:, None] * d + j[None, :], half, mask=there)
        rest = (value - half.to(tl.float32)).to(tl.float64)  # exact; NaN where bfloat16 overflows
        total += value.to(tl.float64) * value.to(tl.float64)
        taken += rest * rest
    rest = tl.sqrt(tl.sum(taken, axis=1))
    tl.store(norms + n, tl.sqrt(tl.sum(total, axis=1)) + rest, mask=valid)
    tl.store(rests + n, rest, mask=valid)


@triton.jit
def score_bound(tile, there, norm, rest, norms, rests, gamma):
    """Of a token's score with any row of a tile, what rounding can have changed: ``|<g, e> - <g', e'>| <= |g - g'| |e|
    + |g'| |e - e'|`` and the float32 sum's ``gamma |g'| |e'|``; infinite where that sum may overflow."""
    n = tl.load(norms + tile, mask=there, other=0.0)
    bound = rest * n + norm * tl.load(rests + tile, mask=there, other=0.0) + gamma * norm * n
    return tl.where(norm * n < 1e38, bound, bound + float("inf"))


@triton.jit
def tile_bounds(tile, there, t, norm, rest, norms, rests, norm2, rest2, norms2, rests2, gamma,
                HAS_SECOND: tl.constexpr):  # fmt: skip
    bound = score_bound(tile, there, tl.load(norm + t), tl.load(rest + t), norms, rests, gamma)
    if HAS_SECOND:
        bound += score_bound(tile, there, tl.load(norm2 + t), tl.load(rest2 + t), norms2, rests2, gamma)
    # 2**-100: products too small for a float32; the factor: the roundings of the bound itself
    return tl.where(bound == 0, 0.0, bound * (1 + 2.0**-20) + 2.0**-100)


@triton.jit
def row_scores(t, ids, there, x, table, x2, table2, allowed, d, d2, x_stride, table_stride, x2_stride, table2_stride,
               HAS_ALLOWED: tl.constexpr, HAS_SECOND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
               DTYPE: tl.constexpr):  # fmt: skip
    """Scores of token ``t`` with ROWS rows, and which of them are ``there`` and allowed."""
    if HAS_ALLOWED:
        there = there & (tl.load(allowed + ids, mask=there, other=0) != 0)
    score = gathered_scores(x + t * x_stride, table, ids, there, d, table_stride, ROWS, BLOCK, DTYPE)
    if HAS_SECOND:
        score += gathered_scores(x2 + t * x2_stride, table2, ids, there, d2, table2_stride, ROWS, BLOCK, DTYPE)
    return score, there


@triton.jit(do_not_specialize=["T", "tiles"])
def rescore(lows, columns, seconds, norm, rest, norms, rests, norm2, rest2, norms2, rests2, x, table, x2, table2,
            allowed, keys, rescored, T, V, d, d2, x_stride, table_stride, x2_stride, table2_stride, tiles, gamma,
            HAS_ALLOWED: tl.constexpr, HAS_SECOND: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
            ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """A token's key, from the scores that can be the least, made again in float64.

    ``least`` is above the least score. A tile whose minimum less the bound is above it holds nothing; one whose second
    minimum is, holds only its argmin. A bound of 0 (no query, no table) leaves nothing to make again.
    """
    t = tl.program_id(0).to(tl.int64)
    upper = tl.full((BT,), float("inf"), tl.float64)
    for first in range(0, tiles, BT):
        tile = first + tl.arange(0, BT)
        there = tile < tiles
        low = tl.load(lows + tile.to(tl.int64) * T + t, mask=there, other=float("inf")).to(tl.float64)
        bound = tile_bounds(tile, there, t, norm, rest, norms, rests, norm2, rest2, norms2, rests2, gamma, HAS_SECOND)
        most = low + bound
        upper = tl.where(most < upper, most, upper)  # not where it is NaN
    least = tl.min(upper, axis=0)
    best = least * 0 + float("inf")
    best = tl.where(best == best, best, float("inf"))
    best_id = tl.min(tl.full((ROWS,), NOBODY, tl.int32), axis=0)
    nan_id = best_id
    count = best_id * 0
    for first in range(0, tiles, BT):
        tile = first + tl.arange(0, BT)
        there = tile < tiles
        at = tile.to(tl.int64) * T + t
        low = tl.load(lows + at, mask=there, other=float("inf")).to(tl.float64)
        bound = tile_bounds(tile, there, t, norm, rest, norms, rests, norm2, rest2, norms2, rests2, gamma, HAS_SECOND)
        alive = there & ((low - bound > least) == 0)
        exact = alive & (bound == 0) & (low == low)
        known = tl.min(tl.where(exact, low, float("inf")), axis=0)
        known_id = tl.load(columns + at, mask=exact & (low == known), other=NOBODY)
        known_id = tl.min(known_id, axis=0)
        better = tl.where(known < best, 1, tl.where(known == best, tl.where(known_id < best_id, 1, 0), 0)) > 0
        best, best_id = tl.where(better, known, best), tl.where(better, known_id, best_id)
        alive = alive & (exact == 0)
        several = alive & ((tl.load(seconds + at, mask=alive, other=0.0).to(tl.float64) - bound > least) == 0)
        several = several | (alive & ((low != low) | (low == float("inf"))))
        current = first - 1
        for _ in range(tl.sum(alive.to(tl.int32), axis=0)):
            current = tl.min(tl.where(alive & (tile > current), tile, NOBODY), axis=0)
            whole = tl.max(tl.where(tile == current, several.to(tl.int32), 0), axis=0) > 0
            only = tl.load(columns + tl.cast(current, tl.int64) * T + t)
            begin = tl.where(whole, current * BN, only)
            end = tl.where(whole, tl.minimum(current * BN + BN, V), only + 1)
            count += end - begin
            for row in range(begin, end, ROWS):
                ids = (row + tl.arange(0, ROWS)).to(tl.int64)
                score, rows = row_scores(t, ids, ids < end, x, table, x2, table2, allowed, d, d2, x_stride,
                                         table_stride, x2_stride, table2_stride, HAS_ALLOWED, HAS_SECOND, ROWS, BLOCK,
                                         tl.float64)  # fmt: skip
                lowest = tl.min(tl.where(rows & (score == score), score, float("inf")), axis=0)
                lowest_id = tl.min(tl.where(rows & (score == lowest), ids.to(tl.int32), NOBODY), axis=0)
                better = tl.where(
                    lowest < best, 1, tl.where(lowest == best, tl.where(lowest_id < best_id, 1, 0), 0)
                ) > 0  # fmt: skip
                best, best_id = tl.where(better, lowest, best), tl.where(better, lowest_id, best_id)
                nan_id = tl.minimum(nan_id, tl.min(tl.where(rows & (score != score), ids.to(tl.int32), NOBODY), axis=0))
    id = tl.where(nan_id < NOBODY, nan_id, best_id)
    value = tl.where(nan_id < NOBODY, float("nan"), best.to(tl.float32))
    tl.store(keys + t, score_keys(value, id, id < NOBODY))
    tl.store(rescored + t, count)


@triton.jit
def candidate_parts(x, table, x2, table2, candidates, allowed, keys, T, V, C, d, d2, x_stride, table_stride, x2_stride,
                    table2_stride, HAS_ALLOWED: tl.constexpr, HAS_SECOND: tl.constexpr, ROWS: tl.constexpr,
                    BLOCK: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    t = (program % T).to(tl.int64)
    part = (program // T).to(tl.int64)
    c = part * ROWS + tl.arange(0, ROWS)
    ids = tl.load(candidates + t * C + c, mask=c < C, other=-1).to(tl.int64)
    scores, there = row_scores(t, ids, (ids >= 0) & (ids < V), x, table, x2, table2, allowed, d, d2, x_stride,
                               table_stride, x2_stride, table2_stride, HAS_ALLOWED, HAS_SECOND, ROWS, BLOCK,
                               tl.float32)  # fmt: skip
    tl.store(keys + part * T + t, tl.min(score_keys(scores, ids, there), axis=0))


@triton.jit(do_not_specialize=["T", "PARTS"])
def oracle_finish(keys, ids, values, x, table, x2, table2, allowed, T, V, d, d2, x_stride, table_stride, x2_stride,
                  table2_stride, PARTS, HAS_ALLOWED: tl.constexpr, HAS_SECOND: tl.constexpr, FINAL: tl.constexpr,
                  BN: tl.constexpr, BP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Id and value of the best key. Unless FINAL, the row of a NaN is any of its tile, and that of an infinite one any:
    they are looked for again, the first NaN of the tile, or the first row at all."""
    t = tl.program_id(0).to(tl.int64)
    parts = tl.arange(0, BP)
    best = tl.min(tl.load(keys + parts.to(tl.int64) * T + t, mask=parts < PARTS, other=NOTHING), axis=0)
    ordered = (best >> 32).to(tl.int32)
    bits = tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    value = tl.where(ordered == LOWEST, float("nan"), bits.to(tl.float32, bitcast=True))
    value = tl.where(best == NOTHING, float("inf"), value)
    id = tl.where(best == NOTHING, NOBODY, (best & 0xFFFFFFFF).to(tl.int32))
    if not FINAL:
        infinite = value == float("inf")
        begin = tl.where(value != value, id // BN * BN, 0)
        end = tl.where(value != value, tl.minimum(begin + BN, V), tl.where(infinite, V, 0))
        first = id * 0 + NOBODY
        for row in range(begin, end, ROWS):
            rows = (row + tl.arange(0, ROWS)).to(tl.int64)
            score, there = row_scores(t, rows, rows < end, x, table, x2, table2, allowed, d, d2, x_stride, table_stride,
                                      x2_stride, table2_stride, HAS_ALLOWED, HAS_SECOND, ROWS, BLOCK,
                                      tl.float32)  # fmt: skip
            wanted = there & ((score != score) | (value == float("inf")))
            first = tl.minimum(first, tl.min(tl.where(wanted, rows.to(tl.int32), NOBODY), axis=0))
        id = tl.where(infinite, first, tl.where(first < NOBODY, first, id))
    tl.store(ids + t, tl.where(id < NOBODY, id, -1))
    tl.store(values + t, value)


def unsupported(call: Call) -> str | None:
    return only_dtypes(call, (torch.float32, torch.bfloat16))


_measured: dict[tuple, tuple[StorageWeakRef, Tensor, Tensor]] = {}


def rounded(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``x [N, d]`` in bfloat16, and the norms and rests ``[N]`` of :func:`round_rows`."""
    N, d = x.shape
    half = x if x.dtype == torch.bfloat16 else torch.empty(N, d, dtype=torch.bfloat16, device=x.device)
    norms, rests = (torch.empty(N, dtype=torch.float64, device=x.device) for _ in range(2))
    round_rows[(triton.cdiv(N, CANDIDATES),)](
        x, half, norms, rests, N, d, x.stride(0), STORE=half is not x, ROWS=CANDIDATES, BLOCK=BLOCK, num_warps=4
    )
    return half, norms, rests


def rounded_table(E: Tensor, BN: int) -> tuple[Tensor, Tensor, Tensor]:
    """A table in bfloat16 and the largest norm and rest of each tile of BN rows."""

    def tiles(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, -len(x) % BN)).view(-1, BN).amax(1)

    kept = E.dtype == torch.bfloat16 and not E.is_inference() and E.device.type != "meta"
    if not kept:
        half, norms, rests = rounded(E)
        return half, tiles(norms), tiles(rests)
    storage = StorageWeakRef(E.untyped_storage())
    key = (storage.cdata, E.storage_offset(), E.shape, E.stride(), E._version, BN)
    if key not in _measured:
        _, norms, rests = rounded(E)
        found = (storage, tiles(norms), tiles(rests))
        if E.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return E, *found[1:]  # a graph's own memory
        for old in [old for old, (other, *_) in _measured.items() if other.expired() or old[0] == storage.cdata]:
            del _measured[old]
        _measured[key] = found
    return E, *_measured[key][1:]


def screened_keys(
    x: Tensor, E: Tensor, x2: Tensor | None, W2: Tensor | None, allowed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Keys ``[1, T]`` and how many rows were scored again ``[T]``."""
    T, (V, d) = x.shape[0], E.shape
    x = native.rows(x)
    BN = _config(x, E, x2, W2)[1]
    half, norm, rest = rounded(x)
    table, norms, rests = rounded_table(E, BN)
    half2, norm2, rest2, table2, norms2, rests2 = None, norm, rest, None, norms, rests
    if x2 is not None and W2 is not None:
        x2 = native.rows(x2)
        half2, norm2, rest2 = rounded(x2)
        table2, norms2, rests2 = rounded_table(W2, BN)
    _, (lows, columns, seconds), _ = _pass(half, table, half2, table2, allowed, screen=True)
    y, Y = (x, E) if x2 is None or W2 is None else (x2, W2)
    keys = torch.empty(1, T, dtype=torch.int64, device=E.device)
    count = torch.empty(T, dtype=torch.int32, device=E.device)
    # Of the sum of d products, however it is ordered: each addition may cut, not round, and so may the alignment of
    # the sixteen products that a tensor core adds at once.
    gamma = (1.125 * (d + (0 if x2 is None else Y.shape[1])) + 16) * 2.0**-23
    rescore[(T,)](
        lows, columns, seconds, norm, rest, norms, rests, norm2, rest2, norms2, rests2, x, E, y, Y,
        E if allowed is None else allowed, keys, count, T, V, d, Y.shape[1], x.stride(0), E.stride(0), y.stride(0),
        Y.stride(0), lows.shape[0], gamma, HAS_ALLOWED=allowed is not None, HAS_SECOND=x2 is not None, BN=BN, BT=TILES,
        ROWS=CANDIDATES, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return keys, count


def _config(x: Tensor, E: Tensor, x2: Tensor | None, W2: Tensor | None) -> tuple[int, int, int, int, int, bool]:
    """(BM, BN, BK, warps, stages, descriptors) of the pass over these, rounded to bfloat16."""
    if x.shape[0] <= 32:
        return *CONFIGS["few"], False
    described = has_copy_engine(x.device) and all(
        a is None or (a.shape[1] % 8 == 0 if a.dtype == torch.float32 else describable(a)) for a in (x, E, x2, W2)
    )
    return *CONFIGS["described" if described else "many"], described


def _pass(
    x: Tensor, E: Tensor, x2: Tensor | None, W2: Tensor | None, allowed: Tensor | None, *, screen: bool
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], int]:
    """Keys ``[parts, T]``, or if ``screen`` minima, their rows and second minima ``[tiles, T]``; and the parts."""
    T, (V, d) = x.shape[0], E.shape
    BM, BN, BK, warps, stages, described = _config(x, E, x2, W2)
    blocks = triton.cdiv(T, BM)
    parts, part_rows = split(blocks, V, BN, E.device)
    shape = (triton.cdiv(V, BN), T) if screen else (0, 0)
    lows, seconds = (torch.empty(shape, device=E.device) for _ in range(2))
    columns = torch.empty(shape, dtype=torch.int32, device=E.device)
    keys = torch.empty(0 if screen else parts, T, dtype=torch.int64, device=E.device)
    second = x2 is not None and W2 is not None
    y, table2 = (x, E) if x2 is None or W2 is None else (x2, W2)
    operands = [x, E, y, table2]
    if described:
        operands = [describe(a, rows, BK) for a, rows in zip(operands, (BM, BN, BM, BN), strict=True)]
    oracle_parts[(blocks * parts,)](
        *operands, E if allowed is None else allowed, keys, lows, columns, seconds, T, V, d, table2.shape[1],
        x.stride(0), E.stride(0), y.stride(0), table2.stride(0), part_rows, blocks, HAS_ALLOWED=allowed is not None,
        HAS_SECOND=second, SCREEN=screen, BM=BM, BN=BN, BK=BK, DESCRIPTORS=described, WIDEN=interpreting_triton(),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return keys, (lows, columns, seconds), parts


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
    final, BN = True, 1
    if candidates is not None:
        keys, parts = candidate_keys(G, E, Q2, W2, allowed, candidates)
    elif all(a is None or a.dtype == torch.bfloat16 for a in (G, E, Q2, W2)):
        G, Q2 = native.rows(G), None if Q2 is None else native.rows(Q2)
        final, BN = False, _config(G, E, Q2, W2)[1]
        keys, _, parts = _pass(G, E, Q2, W2, allowed, screen=False)
    else:
        keys, _ = screened_keys(G, E, Q2, W2, allowed)
        parts = 1
    second = Q2 is not None and W2 is not None
    y, Y = (G, E) if Q2 is None or W2 is None else (Q2, W2)
    oracle_finish[(T,)](
        keys, ids, values, G, E, y, Y, E if allowed is None else allowed, T, E.shape[0], E.shape[1], Y.shape[1],
        G.stride(0), E.stride(0), y.stride(0), Y.stride(0), parts, HAS_ALLOWED=allowed is not None, HAS_SECOND=second,
        FINAL=final, BN=BN, BP=triton.next_power_of_2(parts), ROWS=CANDIDATES, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return ids, values
