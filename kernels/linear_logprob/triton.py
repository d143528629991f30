"""Triton implementation: scaled exponentials of the logits in a bounded workspace, then one matmul with tile scales.

Problem: ``logp`` and ``dlogp/dH = (1 - p_y)(s_y W_y - R)`` with ``R`` the mean of ``s_v W_v`` under the softmax without
the target (s: slope of the head transform), 4*N*V*d FLOP.

1. ``score_tiles``: logits of a [BM, BN] tile, transformed; the target's column is taken out (its exact logit and
   slope are stored). Per row and tile an integer k with ``2**k >= max exp(z)``, the sum of ``x = 2**(z log2(e) - k)``,
   for the entropy the sum of ``x * (z - k ln 2)``; ``x * s`` goes to the workspace in the table's dtype. Exponentials
   in bfloat16 have a relative error of 2**-9 everywhere; logits in bfloat16 would have an absolute one of 0.06 at 20.
2. torch merges the [N, tiles] numbers.
3. ``weighted_rows``: ``R = sum over tiles of 2**(k_tile - k_row) X_tile W_tile``; a power of two scales exactly.

Tokens are worked on in chunks whose workspace is at most WORKSPACE bytes, never fewer than one tile of rows.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import Call, interpreting_triton, only_dtypes
from ..vertex_oracle.triton import add_scores, terms

WORKSPACE = 256 << 20

# scores: (BM, BN, BK, warps, stages); mean rows: (BM, BN, warps, stages), their inner tile is the scores' BN
SCORES = {"bfloat16": (128, 64, 64, 8, 3), "float32": (64, 64, 32, 4, 3)}
MEANS = {"bfloat16": (128, 128, 8, 3), "float32": (64, 64, 8, 3)}

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


@triton.jit
def score_tiles(x, table, bias, targets, exps, exponents, sums, moments, target_logits, target_slopes, N, V, d,
                x_stride, x_term, table_stride, exps_stride, tiles, token_blocks, scale, softcap, inverse_temperature,
                HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, STORE: tl.constexpr, MOMENT: tl.constexpr,
                TERMS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                WIDEN: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    tile = program // token_blocks
    tokens = (program % token_blocks) * BM + tl.arange(0, BM)
    valid_tokens = tokens < N
    rows = tile * BN + tl.arange(0, BN)
    valid = rows < V
    z = tl.zeros((BM, BN), tl.float32)
    z = add_scores(z, x, table, rows, valid, tokens, valid_tokens, d, x_stride, x_term, table_stride, TERMS, BK,
                   WIDEN)  # fmt: skip
    z, slope = transform_tile(z, bias, rows, valid, scale, softcap, inverse_temperature, HAS_BIAS, HAS_SOFTCAP)
    y = tl.load(targets + tokens, mask=valid_tokens, other=-1)
    target = (rows[None, :] == y[:, None]) & valid_tokens[:, None]
    here = (y >= tile * BN) & (y < tile * BN + BN) & valid_tokens
    tl.store(target_logits + tokens, tl.sum(tl.where(target, z, 0.0), axis=1), mask=here)
    tl.store(target_slopes + tokens, tl.sum(tl.where(target, slope, 0.0), axis=1), mask=here)
    z = tl.where(valid[None, :] & (rows[None, :] != y[:, None]), z, float("-inf"))
    top = tl.max(z, axis=1) * LOG2E
    k = tl.where(top == float("-inf"), 0.0, tl.ceil(top))
    p = tl.exp2(z * LOG2E - k[:, None])
    at = tile.to(tl.int64) * N + tokens
    tl.store(exponents + at, tl.where(top == float("-inf"), float("-inf"), k), mask=valid_tokens)
    tl.store(sums + at, tl.sum(p, axis=1), mask=valid_tokens)
    if MOMENT:
        shifted = tl.where(p > 0, p * (z - k[:, None] * LN2), p)
        tl.store(moments + at, tl.sum(shifted, axis=1), mask=valid_tokens)
    if STORE:
        tl.store(
            exps + tokens.to(tl.int64)[:, None] * exps_stride + rows[None, :],
            (p * slope).to(exps.dtype.element_ty),
            mask=valid_tokens[:, None] & valid[None, :],
        )


@triton.jit
def weighted_rows(exps, exponents, row_exponents, table, out, N, V, d, exps_stride, table_stride, tiles, token_blocks,
                  BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WIDEN: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    tokens = (program % token_blocks) * BM + tl.arange(0, BM)
    columns = (program // token_blocks) * BN + tl.arange(0, BN)
    valid_tokens = tokens < N
    inside = columns < d
    top = tl.load(row_exponents + tokens, mask=valid_tokens, other=0.0)
    acc = tl.zeros((BM, BN), tl.float32)
    for tile in range(tiles):
        rows = tile * BK + tl.arange(0, BK)
        valid = rows < V
        x = tl.load(
            exps + tokens.to(tl.int64)[:, None] * exps_stride + rows[None, :],
            mask=valid_tokens[:, None] & valid[None, :],
            other=0.0,
        )
        k = tl.load(exponents + tile * N + tokens, mask=valid_tokens, other=float("-inf"))
        x = (x.to(tl.float32) * tl.exp2(k - top)[:, None]).to(x.dtype)
        w = tl.load(
            table + rows.to(tl.int64)[:, None] * table_stride + columns[None, :],
            mask=valid[:, None] & inside[None, :],
            other=0.0,
        )
        if WIDEN:
            x, w = x.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision="tf32x3")
    at = tokens.to(tl.int64)[:, None] * d + columns[None, :]
    tl.store(out + at, acc, mask=valid_tokens[:, None] & inside[None, :])


def unsupported(call: Call) -> str | None:
    return only_dtypes(call, (torch.float32, torch.bfloat16))


def linear_logprob(
    H: Tensor,
    W: Tensor,
    y: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    temperature: float,
    entropy: bool,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    N, (V, d) = H.shape[0], W.shape
    logp = torch.empty(N, device=H.device)
    entropies = torch.empty(N if entropy else 0, device=H.device)
    gradients = torch.empty(N if gradient else 0, d, device=H.device)
    bias = None if bias is None else bias.contiguous()
    BM = SCORES[str(W.dtype).removeprefix("torch.")][0]
    chunk = max(BM, WORKSPACE // (W.element_size() * V) // BM * BM) if gradient else max(BM, 16384)
    for start in range(0, N, chunk):
        part = slice(start, start + chunk)
        _chunk(
            H[part], W, y[part].contiguous(), bias, scale, softcap, temperature, logp[part],
            entropies[part] if entropy else None, gradients[part] if gradient else None,
        )  # fmt: skip
    return logp, entropies, gradients


def score(
    x: Tensor,
    W: Tensor,
    y: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    temperature: float,
    *,
    exps: Tensor | None = None,
    moment: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Exponents, sums and moments ``[tiles, N]`` without the targets, whose logits and slopes ``[N]`` come last.

    ``x [n, N, d]`` are the terms of the hidden states; a target of -1 leaves nothing out. ``exps`` receives the scaled
    exponentials.
    """
    N, (V, d) = x.shape[1], W.shape
    BM, BN, BK, warps, stages = SCORES[str(W.dtype).removeprefix("torch.")]
    tiles, blocks = triton.cdiv(V, BN), triton.cdiv(N, BM)
    exponents, sums = (torch.empty(tiles, N, device=W.device) for _ in range(2))
    moments = torch.empty(tiles, N, device=W.device) if moment else sums
    target_logit, target_slope = (torch.empty(N, device=W.device) for _ in range(2))
    score_tiles[(blocks * tiles,)](
        x, W, W if bias is None else bias, y, W if exps is None else exps, exponents, sums, moments, target_logit,
        target_slope, N, V, d, x.stride(1), x.stride(0), W.stride(0), 0 if exps is None else exps.stride(0), tiles,
        blocks, float(scale), float(softcap or 1.0), 1.0 / temperature, HAS_BIAS=bias is not None,
        HAS_SOFTCAP=softcap is not None, STORE=exps is not None, MOMENT=moment, TERMS=x.shape[0], BM=BM, BN=BN, BK=BK,
        WIDEN=interpreting_triton(), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return exponents, sums, moments, target_logit, target_slope


def merge(exponents: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(top [N], factors [tiles, N], total [N])``: the sum over tiles is ``2**top * total``, in float64: [tiles, N]
    numbers are nothing beside the matmuls."""
    top = exponents.amax(0)
    top = torch.where(top == -torch.inf, 0.0, top)
    factors = torch.exp2((exponents - top).double())
    return top, factors, (factors * sums).sum(0)


def normalisers(
    x: Tensor, W: Tensor, bias: Tensor | None, scale: float, softcap: float | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """The tiles' exponents ``[tiles, N]`` and ``log sum exp`` of all logits ``[N]``."""
    nobody = torch.full((x.shape[1],), -1, dtype=torch.int64, device=W.device)
    exponents, sums, *_ = score(x, W, nobody, bias, scale, softcap, temperature)
    top, _, total = merge(exponents, sums)
    return exponents, (top.double() * math.log(2.0) + total.log()).float()


def _chunk(
    H: Tensor,
    W: Tensor,
    y: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    temperature: float,
    logp: Tensor,
    entropy: Tensor | None,
    gradient: Tensor | None,
) -> None:
    N, (V, d) = H.shape[0], W.shape
    exps = None if gradient is None else torch.empty(N, V, dtype=W.dtype, device=W.device)
    exponents, sums, moments, target_logit, target_slope = score(
        terms(H, W.dtype), W, y, bias, scale, softcap, temperature, exps=exps, moment=entropy is not None
    )
    top, factors, total = merge(exponents, sums)
    odds = top.double() * math.log(2.0) + total.log() - target_logit.double()
    odds = torch.where(target_logit == torch.inf, torch.nan, odds)  # inf - inf
    logp.copy_(-torch.nn.functional.softplus(odds))
    rest = torch.sigmoid(odds)  # 1 - p_y
    if entropy is not None:
        shift = torch.where(factors > 0, (exponents - top).double(), 0.0) * math.log(2.0)
        moment = (factors * moments + factors * shift * sums).sum(0)
        others = rest * (torch.nn.functional.softplus(-odds) + total.log() - moment / total)
        mine = torch.special.entr(torch.exp(logp.double()))
        entropy.copy_(torch.where(rest > 0, mine + others, mine))
    if gradient is None or exps is None:
        return
    dtype = str(W.dtype).removeprefix("torch.")
    CM, CN, warps, stages = MEANS[dtype]
    blocks = triton.cdiv(N, CM)
    weighted_rows[(blocks * triton.cdiv(d, CN),)](
        exps, exponents, top, W, gradient, N, V, d, exps.stride(0), W.stride(0), len(exponents), blocks,
        BM=CM, BN=CN, BK=SCORES[dtype][1], WIDEN=interpreting_triton(), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    mean = torch.where(total > 0, 1 / total, 0.0).float()
    factor = (rest * (scale / temperature)).float()[:, None]
    gradient.mul_(-factor * mean[:, None]).addcmul_(factor * target_slope[:, None], W[y].float())
