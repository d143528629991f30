"""Triton implementation: scaled exponentials of the logits in a bounded workspace, then one matmul with tile scales.

Identity: ``logp`` and ``dlogp/dH = (1 - p_y)(s_y W_y - R)`` with ``R`` the mean of ``s_v W_v`` under the softmax
without the target (s: slope of the head transform).

FLOPs and bytes: 4*N*V*d FLOPs (2*N*V*d without gradient), and 2*N*V*d more a further bfloat16 term of the hidden
states; the table is read once a chunk of tokens for each half; N*V exponentials are written in its dtype, and read once
a block of columns.

1. ``score_tiles``: a program walks the [BM, BN] tiles of its part of the vocabulary: logits, transformed; the target's
   column is taken out (its exact logit and slope are stored).
   Per row and tile an integer k with ``2**k >= max exp(z)``, the sum of ``x = 2**(z log2(e) - k)``,
   for the entropy the sum of ``x * (z - k ln 2)``; ``x * s`` goes to the workspace in the table's dtype.
2. ``merge_tiles``: a row's tiles, in lanes that are added in fixed order, in float64; log p, entropy, factors.
3. ``weighted_rows``: ``R = sum over tiles of 2**(k_tile - k_row) X_tile W_tile``, in parts of the vocabulary where
   tokens and columns alone would leave the device idle; ``gradient_rows`` adds them in order, and the target's row.

Numerics: exponentials in bfloat16 have a relative error of 2**-9 everywhere; logits in bfloat16 would have an
absolute one of 0.06 at 20. Powers of two scale exactly. Everything is a function of the shapes alone.

Limits: float32 and bfloat16. Tokens are worked on in chunks (``chunks.py``).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import Call, interpreting_triton, only_dtypes
from ..numerics import Transform
from ..vertex_oracle.tiles import describable, describe, has_copy_engine, narrowed, split, tile_scores
from .chunks import MOST_ROWS, chunk_rows

LANES, MERGED, BLOCK = 128, 8, 1024  # of a merging program: tiles and rows at a time; columns of a finishing one

# scores: (BM, BN, BK, warps, stages); plain ones have no bias, softcap or list, whose registers a wider tile needs, and
# load tiles through tensor descriptors where there is Hopper's copy engine. Mean rows: (BM, BN, BK, warps, stages).
SCORES = {"bfloat16 plain": (128, 128, 64, 8, 4), "bfloat16": (128, 64, 64, 8, 3), "float32": (64, 64, 32, 4, 3)}
MEANS = {"bfloat16": (128, 128, 64, 8, 3), "float32": (64, 64, 32, 4, 3)}


def config(x: Tensor, W: Tensor, plain: bool = False) -> tuple[int, int, int, int, int, bool]:
    """(BM, BN, BK, warps, stages, descriptors) of the scores of terms ``x [n, N, d]`` with ``W``."""
    if x.shape[0] > 1:  # three tiles of tokens at once: half the tokens, and warps that each have whole rows of a dot
        return *narrowed((64, 64, 64, 4, 3), W.device), False
    plain = plain and W.dtype == torch.bfloat16 and has_copy_engine(W.device) and W.shape[1] % 8 == 0 and describable(W)
    return *tiling(SCORES[name(W.dtype) + " plain" * plain], W), plain


def tiling(config: tuple[int, int, int, int, int], W: Tensor) -> tuple[int, int, int, int, int]:
    return config if W.dtype == torch.bfloat16 else narrowed(config, W.device)


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2.0))


@triton.jit
def transform_tile(z, bias, rows, valid, scale, softcap, inverse_temperature, HAS_BIAS: tl.constexpr,
                   HAS_SOFTCAP: tl.constexpr):  # fmt: skip
    """Logits of raw scores, and the slope of the head transform without its constant factor."""
    if HAS_BIAS:
        z += tl.load(bias + rows, mask=valid, other=0.0).to(tl.float32)[None, :]
    if HAS_SOFTCAP:
        raw = z * (scale / softcap)
        e = tl.exp(-2.0 * tl.abs(raw))
        tanh = (1.0 - e) / (1.0 + e)
        slope = 4.0 * e / ((1.0 + e) * (1.0 + e))
        z = tl.where(raw > 0, tanh, -tanh) * (softcap * inverse_temperature)
    else:
        z = z * (scale * inverse_temperature)
        slope = tl.full(z.shape, 1.0, tl.float32)
    return z, slope


@triton.jit(do_not_specialize=["N", "token_blocks"])
def score_tiles(x, table, bias, targets, exps, exponents, sums, moments, target_logits, target_slopes, N, V, d,
                x_stride, x_term, table_stride, exps_stride, part_rows, token_blocks, scale, softcap,
                inverse_temperature, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, STORE: tl.constexpr,
                MOMENT: tl.constexpr, TERMS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                DESCRIPTORS: tl.constexpr, WIDEN: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    token = (program % token_blocks) * BM
    tokens = token + tl.arange(0, BM)
    valid_tokens = tokens < N
    y = tl.load(targets + tokens, mask=valid_tokens, other=-1)
    first = (program // token_blocks) * part_rows
    for start in range(first, min(first + part_rows, V), BN):
        rows = start + tl.arange(0, BN)
        valid = rows < V
        z = tile_scores(x, table, rows, valid, tokens, valid_tokens, start, token, N, d, x_stride, x_term, table_stride,
                        TERMS, BM, BN, BK, DESCRIPTORS, WIDEN)  # fmt: skip
        z, slope = transform_tile(z, bias, rows, valid, scale, softcap, inverse_temperature, HAS_BIAS, HAS_SOFTCAP)
        here = (y >= start) & (y < start + BN) & (y < V) & valid_tokens  # of nobody outside the table
        if tl.max(here.to(tl.int32), axis=0) > 0:  # in most tiles nobody's target is
            target = rows[None, :] == y[:, None]
            tl.store(target_logits + tokens, tl.sum(tl.where(target, z, 0.0), axis=1), mask=here)
            if HAS_SOFTCAP:
                tl.store(target_slopes + tokens, tl.sum(tl.where(target, slope, 0.0), axis=1), mask=here)
            else:
                tl.store(target_slopes + tokens, tl.full((BM,), 1.0, tl.float32), mask=here)
            z = tl.where(target, float("-inf"), z)
        if start + BN > V:
            z = tl.where(valid[None, :], z, float("-inf"))
        top = tl.max(z, axis=1) * LOG2E
        k = tl.where(top == float("-inf"), 0.0, tl.ceil(top))
        p = tl.exp2(z * LOG2E - k[:, None])
        at = tl.cast(start // BN, tl.int64) * N + tokens
        tl.store(exponents + at, tl.where(top == float("-inf"), float("-inf"), k), mask=valid_tokens)
        tl.store(sums + at, tl.sum(p, axis=1), mask=valid_tokens)
        if MOMENT:
            shifted = tl.where(p > 0, p * (z - k[:, None] * LN2), p)
            tl.store(moments + at, tl.sum(shifted, axis=1), mask=valid_tokens)
        if STORE:  # whole tiles: the rows of exps end with zeros
            tl.store(
                exps + tokens.to(tl.int64)[:, None] * exps_stride + rows[None, :],
                (p * slope).to(exps.dtype.element_ty),
                mask=valid_tokens[:, None],
            )


@triton.jit
def relative(total, moment, k, top):
    """Sums that are relative to ``2**k``, relative to ``2**top`` with ``top >= k``: an exact power of two, made of
    bits."""
    below = tl.where(k == top, 0.0, k - top)  # both may be -inf
    factor = ((tl.maximum(below, -127.0).to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True).to(tl.float64)
    moment = tl.where(factor > 0, factor * (moment + below.to(tl.float64) * LN2 * total), 0.0)
    return factor * total, moment


@triton.jit
def softplus(x):
    small = tl.exp(-tl.abs(x))
    one = 1.0 + small
    log1p = tl.where(one == 1.0, small, tl.log(one) * small / (one - 1.0))  # the rounding of one cancels
    return tl.where(x > 0, x, 0.0) + log1p


@triton.jit(do_not_specialize=["N", "tiles"])
def merge_tiles(exponents, sums, moments, target_logits, target_slopes, stats, logps, entropies, N, tiles, rate,
                ENTROPY: tl.constexpr, LANES: tl.constexpr, BM: tl.constexpr):  # fmt: skip
    """``stats [4, N]``: the row's k, the factors of the others' mean and of the target's row, the others' logsumexp."""
    tokens = tl.program_id(0) * BM + tl.arange(0, BM)
    valid = tokens < N
    top = tl.full((LANES, BM), float("-inf"), tl.float32)
    total = tl.zeros((LANES, BM), tl.float64)
    moment = tl.zeros((LANES, BM), tl.float64)
    for start in range(0, tiles, LANES):
        tile = start + tl.arange(0, LANES)
        at = tile.to(tl.int64)[:, None] * N + tokens[None, :]
        there = (tile < tiles)[:, None] & valid[None, :]
        k = tl.load(exponents + at, mask=there, other=float("-inf"))
        x = tl.load(sums + at, mask=there, other=0.0).to(tl.float64)
        m = x
        if ENTROPY:
            m = tl.load(moments + at, mask=there, other=0.0).to(tl.float64)
        new = tl.maximum(top, k)
        total, moment = relative(total, moment, top, new)
        x, m = relative(x, m, k, new)
        total, moment, top = total + x, moment + m, new
    most = tl.max(top, axis=0)
    most = tl.where(most == float("-inf"), 0.0, most)
    total, moment = relative(total, moment, top, most[None, :])
    total, moment = tl.sum(total, axis=0), tl.sum(moment, axis=0)
    lse = most.to(tl.float64) * LN2 + tl.log(total)
    target = tl.load(target_logits + tokens, mask=valid, other=0.0).to(tl.float64)
    odds = tl.where(target == float("inf"), float("nan"), lse - target)  # of the others against the target
    logp = -softplus(odds)
    rest = 1.0 / (1.0 + tl.exp(-odds))  # 1 - p_y
    tl.store(logps + tokens, logp.to(tl.float32), mask=valid)
    if ENTROPY:
        mine = tl.where(logp < -745.0, 0.0, -tl.exp(logp) * logp)
        others = tl.where(rest == 0.0, 0.0, rest * (softplus(-odds) + tl.log(total) - moment / total))
        tl.store(entropies + tokens, (mine + others).to(tl.float32), mask=valid)
    slope = tl.load(target_slopes + tokens, mask=valid, other=0.0)
    tl.store(stats + tokens, most, mask=valid)
    tl.store(stats + N + tokens, tl.where(total == 0.0, 0.0, rest * rate / total).to(tl.float32), mask=valid)
    tl.store(stats + 2 * N + tokens, (rest * rate * slope).to(tl.float32), mask=valid)
    tl.store(stats + 3 * N + tokens, lse.to(tl.float32), mask=valid)


@triton.jit(do_not_specialize=["N", "token_blocks"])
def weighted_rows(exps, exponents, row_exponents, table, out, N, V, d, exps_stride, table_stride, part_rows,
                  token_blocks, column_blocks, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                  TILE: tl.constexpr, WIDEN: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    tokens = (program % token_blocks) * BM + tl.arange(0, BM)
    columns = (program // token_blocks % column_blocks) * BN + tl.arange(0, BN)
    part = program // (token_blocks * column_blocks)
    valid_tokens = tokens < N
    inside = columns < d
    top = tl.load(row_exponents + tokens, mask=valid_tokens, other=0.0)
    acc = tl.zeros((BM, BN), tl.float32)
    first = part * part_rows
    last = min(first + part_rows, V)
    tl.assume(first < last)
    for start in range(first, last, BK):
        rows = start + tl.arange(0, BK)
        x = tl.load(  # exps ends with zeros
            exps + tokens.to(tl.int64)[:, None] * exps_stride + rows[None, :], mask=valid_tokens[:, None], other=0.0
        )
        k = tl.load(exponents + tl.cast(start // TILE, tl.int64) * N + tokens, mask=valid_tokens, other=float("-inf"))
        x = (x.to(tl.float32) * tl.exp2(k - top)[:, None]).to(x.dtype)
        w = tl.load(
            table + rows.to(tl.int64)[:, None] * table_stride + columns[None, :],
            mask=(rows < V)[:, None] & inside[None, :],
            other=0.0,
        )
        if WIDEN:
            x, w = x.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision="tf32x3")
    at = (part.to(tl.int64) * N + tokens)[:, None] * d + columns[None, :]
    tl.store(out + at, acc, mask=valid_tokens[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["N", "PARTS"])
def gradient_rows(means, stats, table, targets, out, N, V, d, table_stride, slices, PARTS, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    n = (program // slices).to(tl.int64)
    j = (program % slices) * BLOCK + tl.arange(0, BLOCK)
    mean = tl.zeros((BLOCK,), tl.float32)
    for part in range(PARTS):
        mean += tl.load(means + (part * N + n) * d + j, mask=j < d, other=0.0)
    y = tl.load(targets + n)
    reach = tl.where(y >= 0, tl.where(y < V, d, 0), 0)  # of a target outside the table the factors are NaN
    row = tl.load(table + y * table_stride + j, mask=j < reach, other=0.0).to(tl.float32)
    mean_factor, target_factor = tl.load(stats + N + n), tl.load(stats + 2 * N + n)
    tl.store(out + n * d + j, target_factor * row - mean_factor * mean, mask=j < d)


def terms(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``[n, N, d]`` in ``dtype`` whose sum over n is ``x``: three bfloat16 hold a float32 exactly."""
    if x.dtype == dtype or dtype == torch.float32:
        return x.to(dtype).contiguous()[None]
    parts = []
    for _ in range(3):
        parts.append(x.to(dtype))
        x = torch.where(x.isfinite(), x - parts[-1].to(x.dtype), 0.0)
    return torch.stack(parts)


def unsupported(call: Call) -> str | None:
    return only_dtypes(call, (torch.float32, torch.bfloat16))


def linear_logprob(
    H: Tensor,
    W: Tensor,
    y: Tensor,
    bias: Tensor | None,
    transform: Transform,
    entropy: bool,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    N, d = H.shape[0], W.shape[1]
    logp = torch.empty(N, device=H.device)
    entropies = torch.empty(N if entropy else 0, device=H.device)
    gradients = torch.empty(N if gradient else 0, d, device=H.device)
    bias = None if bias is None else bias.contiguous()
    chunk = chunk_rows(W) if gradient else MOST_ROWS
    for start in range(0, N, chunk):
        part = slice(start, start + chunk)
        _chunk(
            H[part], W, y[part].contiguous(), bias, transform, logp[part],
            entropies[part] if entropy else None, gradients[part] if gradient else None,
        )  # fmt: skip
    return logp, entropies, gradients


def score(
    x: Tensor,
    W: Tensor,
    y: Tensor,
    bias: Tensor | None,
    transform: Transform,
    *,
    exps: Tensor | None = None,
    moment: bool = False,
    plain: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Exponents, sums and moments ``[tiles, N]`` without the targets, whose logits and slopes ``[2, N]`` come last.

    ``x [n, N, d]`` are the terms of the hidden states; a target outside the table leaves nothing out, its logit is NaN.
    ``exps`` receives the scaled exponentials.
    """
    (n, N, d), V, (scale, softcap, temperature) = x.shape, W.shape[0], transform
    BM, BN, BK, warps, stages, described = config(x, W, plain)
    tiles, blocks = triton.cdiv(V, BN), triton.cdiv(N, BM)
    parts, part_rows = split(blocks, V, BN, W.device)
    exponents, sums = (torch.empty(tiles, N, device=W.device) for _ in range(2))
    moments = torch.empty(tiles, N, device=W.device) if moment else sums
    targets = torch.full((2, N), torch.nan, device=W.device)
    queries, table = (describe(x.flatten(0, 1), BM, BK), describe(W, BN, BK)) if described else (x, W)
    score_tiles[(blocks * parts,)](
        queries, table, W if bias is None else bias, y, W if exps is None else exps, exponents, sums, moments,
        targets[0], targets[1], N, V, d, x.stride(1), x.stride(0), W.stride(0), 0 if exps is None else exps.stride(0),
        part_rows, blocks, float(scale), float(softcap or 1.0), 1.0 / temperature, HAS_BIAS=bias is not None,
        HAS_SOFTCAP=softcap is not None, STORE=exps is not None, MOMENT=moment, TERMS=n, BM=BM, BN=BN, BK=BK,
        DESCRIPTORS=described, WIDEN=interpreting_triton(), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return exponents, sums, moments, targets


def merge(scores: tuple[Tensor, ...], rate: float, logp: Tensor, entropy: Tensor | None = None) -> Tensor:
    """What ``score`` gave, merged: fills ``logp`` and ``entropy``, returns the stats of ``merge_tiles``; ``rate`` is
    the constant factor of the transform's slope."""
    exponents, sums, moments, targets = scores
    tiles, N = exponents.shape
    stats = torch.empty(4, N, device=logp.device)
    merge_tiles[(triton.cdiv(N, MERGED),)](
        exponents, sums, moments, targets[0], targets[1], stats, logp, logp if entropy is None else entropy, N, tiles,
        rate, ENTROPY=entropy is not None, LANES=LANES, BM=MERGED, num_warps=4,
    )  # fmt: skip
    return stats


def normalisers(x: Tensor, W: Tensor, bias: Tensor | None, transform: Transform) -> tuple[Tensor, Tensor]:
    """The tiles' exponents ``[tiles, N]`` and ``log sum exp`` of all logits ``[N]``."""
    nobody = torch.full((x.shape[1],), -1, dtype=torch.int64, device=W.device)
    scores = score(x, W, nobody, bias, transform)
    return scores[0], merge(scores, 1.0, logp=torch.empty(x.shape[1], device=W.device))[3]


def _chunk(
    H: Tensor,
    W: Tensor,
    y: Tensor,
    bias: Tensor | None,
    transform: Transform,
    logp: Tensor,
    entropy: Tensor | None,
    gradient: Tensor | None,
) -> None:
    N, (V, d) = H.shape[0], W.shape
    x = terms(H, W.dtype)
    plain = bias is None and transform.softcap is None
    TILE = config(x, W, plain)[1]
    exps = None if gradient is None else torch.empty(N, triton.cdiv(V, TILE) * TILE, dtype=W.dtype, device=W.device)
    scores = score(x, W, y, bias, transform, exps=exps, moment=entropy is not None, plain=plain)
    stats = merge(scores, transform.scale / transform.temperature, logp, entropy)
    if gradient is None or exps is None:
        return
    BM, BN, BK, warps, stages = tiling(MEANS[name(W.dtype)], W)
    blocks, column_blocks = triton.cdiv(N, BM), triton.cdiv(d, BN)
    parts, part_rows = split(blocks * column_blocks, V, BK, W.device)
    means = gradient if parts == 1 else torch.empty(parts, N, d, device=W.device)
    weighted_rows[(blocks * column_blocks * parts,)](
        exps, scores[0], stats, W, means, N, V, d, exps.stride(0), W.stride(0), part_rows, blocks, column_blocks,
        BM=BM, BN=BN, BK=BK, TILE=TILE, WIDEN=interpreting_triton(), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    slices = triton.cdiv(d, BLOCK)
    gradient_rows[(N * slices,)](
        means, stats, W, y, gradient, N, V, d, W.stride(0), slices, parts, BLOCK=BLOCK, num_warps=4
    )
