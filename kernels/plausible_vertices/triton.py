"""Triton implementation: the normaliser, then only those tiles again in which something reaches the floor.

Identity: the tokens with ``log p(v | H_t) >= log p_min``, most probable first; at most ``1 / p_min`` of them.

FLOPs and bytes: 2*T*V*d, at most twice that (and as many again a further bfloat16 term of the hidden states); the
table is read once a chunk of tokens, at most twice.

1. ``score_tiles`` of linear_logprob, without targets: per row and tile an integer k with ``2**k >= max exp(z)`` and the
   sum of ``2**(z log2(e) - k)``; ``merge_tiles`` makes ``log sum exp`` of them in float64.
2. ``list_tiles``: a [BM, BN] tile whose k is below the floor for all its rows is left out before anything is
   multiplied. Elsewhere the scores are computed again, by the same instructions, and what is above the floor goes to
   the row's list as a 64-bit key (falling probability, then rising id) at a place taken with one atomic addition a
   row and tile.
3. torch sorts the keys, which are all different: the order in which they arrived cannot change the result.

Numerics: those of linear_logprob. Limits: float32 and bfloat16; tokens are worked on in chunks whose lists of
``1 / p_min`` places a row take at most WORKSPACE bytes, never fewer than one tile of rows.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from ..dispatch import Call, interpreting_triton, only_dtypes
from ..linear_logprob.triton import LN2, config, normalisers, terms, transform_tile
from ..numerics import Transform
from ..vertex_oracle.tiles import NOTHING, describe, score_keys, tile_scores

WORKSPACE = 64 << 20
MOST_ROWS, FEWEST_ROWS = 4096, 128  # of a chunk: its tiles' k and sums are in memory too


@triton.jit(do_not_specialize=["N", "token_blocks", "capacity"])
def list_tiles(x, table, bias, allowed, exponents, lse, keys, counts, N, V, d, x_stride, x_term, table_stride, capacity,
               token_blocks, scale, softcap, inverse_temperature, log_p_min, HAS_BIAS: tl.constexpr,
               HAS_SOFTCAP: tl.constexpr, HAS_ALLOWED: tl.constexpr, TERMS: tl.constexpr, BM: tl.constexpr,
               BN: tl.constexpr, BK: tl.constexpr, DESCRIPTORS: tl.constexpr, WIDEN: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    tile = program // token_blocks
    tokens = (program % token_blocks) * BM + tl.arange(0, BM)
    valid_tokens = tokens < N
    k = tl.load(exponents + tile.to(tl.int64) * N + tokens, mask=valid_tokens, other=float("-inf"))
    log_sum = tl.load(lse + tokens, mask=valid_tokens, other=0.0)
    reach = (k + 0.01) * LN2 - log_sum >= log_p_min  # k is rounded up, but from a rounded product
    if tl.max(reach.to(tl.int32), axis=0) > 0:
        rows = tile * BN + tl.arange(0, BN)
        valid = rows < V
        z = tile_scores(x, table, rows, valid, tokens, valid_tokens, tile * BN, (program % token_blocks) * BM, N, d,
                        x_stride, x_term, table_stride, TERMS, BM, BN, BK, DESCRIPTORS, WIDEN)  # fmt: skip
        z, _ = transform_tile(z, bias, rows, valid, scale, softcap, inverse_temperature, HAS_BIAS, HAS_SOFTCAP)
        if HAS_ALLOWED:
            valid = valid & (tl.load(allowed + rows, mask=valid, other=0) != 0)
        logp = z - log_sum[:, None]
        above = (logp >= log_p_min) & valid[None, :] & valid_tokens[:, None]
        one = above.to(tl.int32)
        found = tl.sum(one, axis=1)
        first = tl.atomic_add(counts + tokens, found, mask=found > 0)
        place = first[:, None] + tl.cumsum(one, axis=1) - one
        tl.store(
            keys + tokens.to(tl.int64)[:, None] * capacity + place,
            score_keys(-logp, rows[None, :], above),
            mask=above & (place < capacity),
        )


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
    T, (V, d), (scale, softcap, temperature) = H.shape[0], W.shape, transform
    ids = torch.empty(T, max_candidates, dtype=torch.int64, device=H.device)
    logps = torch.empty(T, max_candidates, device=H.device)
    counts = torch.zeros(T, dtype=torch.int32, device=H.device)
    # a thousandth more than can be: the sum of the probabilities is 1 up to rounding
    capacity = min(V, int(1.001 * math.exp(min(-log_p_min, 30.0))) + 1)
    kept = min(capacity, max_candidates)
    chunk = max(FEWEST_ROWS, min(MOST_ROWS, WORKSPACE // (8 * capacity)) // FEWEST_ROWS * FEWEST_ROWS)
    bias = None if bias is None else bias.contiguous()
    allowed = None if allowed is None else allowed.contiguous()
    for start in range(0, T, chunk):
        part = slice(start, start + chunk)
        x, N = terms(H[part], W.dtype), H[part].shape[0]
        BM, BN, BK, warps, stages, described = config(x, W)
        exponents, lse = normalisers(x, W, bias, transform)
        keys = torch.full((N, capacity), NOTHING.value, dtype=torch.int64, device=H.device)
        blocks = triton.cdiv(N, BM)
        queries, table = (describe(x.flatten(0, 1), BM, BK), describe(W, BN, BK)) if described else (x, W)
        list_tiles[(blocks * triton.cdiv(V, BN),)](
            queries, table, W if bias is None else bias, W if allowed is None else allowed, exponents, lse, keys,
            counts[part], N, V, d, x.stride(1), x.stride(0), W.stride(0), capacity, blocks, float(scale),
            float(softcap or 1.0), 1.0 / temperature, log_p_min, HAS_BIAS=bias is not None,
            HAS_SOFTCAP=softcap is not None, HAS_ALLOWED=allowed is not None, TERMS=x.shape[0], BM=BM, BN=BN, BK=BK,
            DESCRIPTORS=described, WIDEN=interpreting_triton(), num_warps=warps, num_stages=stages,
        )  # fmt: skip
        best = keys.topk(kept, dim=1, largest=False, sorted=True).values
        ordered = (best >> 32).int()
        bits = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
        empty, missing = best == NOTHING.value, max_candidates - kept
        ids[part] = pad(torch.where(empty, -1, best & 0xFFFFFFFF), (0, missing), value=-1)
        logps[part] = pad(torch.where(empty, -torch.inf, -bits.view(torch.float32)), (0, missing), value=-torch.inf)
    return ids, logps, counts.long()
