"""Triton implementation: combine, score, spans, update; torch shares the scales of a segment in between.

Identity: ``s_i = <g, E_i>``, ``rel = s - sum w s``, ``w' ~ w exp(-eta rel / scale)``, ``z = sum w' E``.

FLOPs and bytes: 4*T*C*d FLOPs on the candidates' rows, each gathered twice (once for its score, once for ``z``);
bound by memory. The combined gradient (float32) and the scores ``[T, C]`` are written in between.

Tiling: a program scores ROWS candidates of a position; spans and update are a program a position. Segments are sorted
by torch, which does not wait for the device as ``unique`` would.

Numerics: float32. Limits: float32 and bfloat16; C is held by one program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import Call, only_dtypes
from ..hull_step.triton import combine
from ..numerics import Combination
from ..vertex_oracle.tiles import gathered_scores
from ..vertex_oracle.triton import BLOCK, CANDIDATES

SLICE = 1024  # columns of z at a time


@triton.jit
def entropic_scores(g, ids, weights, table, scores, V, d, C, table_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Scores of candidates of positive weight; NaN for one that is no row of the table, 0 for the others."""
    groups = tl.cdiv(C, ROWS)
    program = tl.program_id(0)
    t = (program // groups).to(tl.int64)
    c = (program % groups) * ROWS + tl.arange(0, ROWS)
    id = tl.load(ids + t * C + c, mask=c < C, other=0).to(tl.int64)
    alive = tl.load(weights + t * C + c, mask=c < C, other=0.0) > 0
    inside = (id >= 0) & (id < V)
    s = gathered_scores(g + t * d, table, id, alive & inside, d, table_stride, ROWS, BLOCK, tl.float32)
    tl.store(scores + t * C + c, tl.where(alive, tl.where(inside, s, float("nan")), 0.0), mask=c < C)


@triton.jit
def entropic_spans(scores, weights, rel, gaps, spans, C, BC: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BC)
    w = tl.load(weights + t * C + c, mask=c < C, other=0.0)
    s = tl.load(scores + t * C + c, mask=c < C, other=0.0)
    r = tl.where(w > 0, s - tl.sum(w * s, axis=0), 0.0)
    tl.store(rel + t * C + c, r, mask=c < C)
    nan = tl.sum(tl.where(r == r, 0.0, r), axis=0)  # which minimum and maximum leave out
    tl.store(gaps + t, nan - tl.minimum(tl.min(r, axis=0), 0.0))
    tl.store(spans + t, nan + tl.max(tl.abs(r), axis=0))


@triton.jit
def entropic_update(rel, gaps, scales, ids, weights, table, new_weights, z, V, d, C, eta, table_stride,
                    BC: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BC)
    there = c < C
    w = tl.load(weights + t * C + c, mask=there, other=0.0)
    r = tl.load(rel + t * C + c, mask=there, other=0.0)
    gap = tl.load(gaps + t)
    scale = tl.load(scales + t)
    safe = tl.where(scale > 0, scale, 1.0)
    grown = w * tl.exp(-eta * ((r + gap) / safe))
    total = tl.sum(grown, axis=0)
    moves = tl.where(scale > 0, total, 0.0) > 0
    total = tl.where(moves, total, 1.0)
    tl.store(new_weights + t * C + c, tl.where(moves, grown / total, w), mask=there)
    for start in range(0, d, BLOCK):
        j = start + tl.arange(0, BLOCK)
        acc = tl.zeros((BLOCK,), tl.float32)
        for i in range(C):
            wi = tl.load(weights + t * C + i)
            ri = tl.load(rel + t * C + i)
            ni = tl.where(moves, wi * tl.exp(-eta * ((ri + gap) / safe)) / total, wi)
            id = tl.load(ids + t * C + i).to(tl.int64)
            reach = tl.where(ni != 0, tl.where(id >= 0, tl.where(id < V, d, 0), 0), 0)
            acc += ni * tl.load(table + id * table_stride + j, mask=j < reach, other=0.0).to(tl.float32)
            acc += tl.where(ni != 0, tl.where(reach > 0, 0.0, float("nan")), 0.0)
        tl.store(z + t * d + j, acc.to(z.dtype.element_ty), mask=j < d)


def unsupported(call: Call) -> str | None:
    return only_dtypes(call, (torch.float32, torch.bfloat16))


def dense_labels(segments: Tensor) -> Tensor:
    """Labels as numbers in [0, T); ``unique`` would wait for the device to learn how many there are."""
    ordered, order = segments.sort()
    steps = torch.cat([ordered.new_zeros(1), (ordered[1:] != ordered[:-1]).long()])
    return torch.empty_like(segments).scatter_(0, order, steps.cumsum(0))


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
    (T, C), (V, d) = ids.shape, E.shape
    ids, weights = ids.contiguous(), weights.contiguous()
    scores, rel, new_weights = (torch.empty_like(weights) for _ in range(3))
    gap, scale = torch.empty(T, device=E.device), torch.empty(T, device=E.device)
    z = torch.empty(T, d, dtype=E.dtype, device=E.device)
    if T == 0:
        return new_weights, z, gap
    g = combine(G_gold, G_away, combination)
    BC = triton.next_power_of_2(C)
    entropic_scores[(T * triton.cdiv(C, CANDIDATES),)](
        g, ids, weights, E, scores, V, d, C, E.stride(0), ROWS=CANDIDATES, BLOCK=BLOCK, num_warps=4
    )
    entropic_spans[(T,)](scores, weights, rel, gap, scale, C, BC=BC, num_warps=1)
    if segments is not None:
        rows = dense_labels(segments)
        scale = torch.zeros_like(scale).scatter_reduce(0, rows, scale, "amax")[rows]
    entropic_update[(T,)](
        rel, gap, scale, ids, weights, E, new_weights, z, V, d, C, float(eta), E.stride(0), BC=BC, BLOCK=SLICE,
        num_warps=4,
    )  # fmt: skip
    return new_weights, z, gap
