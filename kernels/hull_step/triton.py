"""Triton implementation: combine, the oracle's parts, and one finaliser that merges them and takes the step.

Identity: ``v = argmin <g, E_v>`` for ``g = alpha gold + beta away``, gap ``sum_a w_a <g, E_a - E_v>``, new
``z = (1 - gamma) sum_a w_a E_a + gamma E_v``.

FLOPs and bytes: the oracle's 2*T*V*d and what its screening scores again, and 4*T*A*d. g is written once, in float32;
scores never leave the oracle but for three numbers a token and tile. The finaliser reads A + 1 rows a position.

Tiling: the oracle's; the combination and the finaliser are a program a position, which finds the vertex among the atoms
and sums gap and ``z`` in one walk over ``d``.

Numerics: float32 sums; the vertex is the float64 minimum for g as it is in float32. Limits: float32 and bfloat16;
candidate sets are scored by the oracle's kernel for them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import Call, only_dtypes
from ..numerics import Combination
from ..vertex_oracle.tiles import NOTHING
from ..vertex_oracle.triton import candidate_keys, screened_keys

BLOCK = 1024


@triton.jit
def row_norm(row, d, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, d, BLOCK):
        j = start + tl.arange(0, BLOCK)
        x = tl.load(row + j, mask=j < d, other=0.0).to(tl.float32)
        total += x * x
    return tl.sqrt(tl.sum(total, axis=0))


@triton.jit
def coefficient(row, d, factor, NORMALIZED: tl.constexpr, BLOCK: tl.constexpr):
    """The factor, divided by the row's norm if normalised; 0 for a zero row, NaN for NaN."""
    if NORMALIZED:
        norm = row_norm(row, d, BLOCK)
        factor = tl.where(norm == 0, 0.0, factor / norm)
    return factor


@triton.jit
def combine_rows(gold, away, out, d, gold_stride, away_stride, alpha, beta, HAS_AWAY: tl.constexpr,
                 NORMALIZED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    a = coefficient(gold + t * gold_stride, d, alpha, NORMALIZED, BLOCK)
    if HAS_AWAY:
        b = coefficient(away + t * away_stride, d, beta, NORMALIZED, BLOCK)
    for start in range(0, d, BLOCK):
        j = start + tl.arange(0, BLOCK)
        inside = j < d
        g = a * tl.load(gold + t * gold_stride + j, mask=inside, other=0.0).to(tl.float32)
        if HAS_AWAY:
            g += b * tl.load(away + t * away_stride + j, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + t * d + j, g, mask=inside)


@triton.jit
def finish_step(keys, g, ids, weights, gamma, table, new_ids, new_weights, z, vertices, gaps, T, V, d, A, slot,
                PARTS, table_stride, BP: tl.constexpr, BA: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    parts = tl.arange(0, BP)
    best = tl.min(tl.load(keys + parts.to(tl.int64) * T + t, mask=parts < PARTS, other=NOTHING), axis=0)
    vertex = tl.where(best == NOTHING, -1, best & 0xFFFFFFFF)
    tl.store(vertices + t, vertex)
    row = tl.maximum(vertex, 0) * table_stride
    step = tl.where(vertex >= 0, tl.load(gamma + t), 0.0)

    atom = tl.arange(0, BA)
    there = atom < A
    held = tl.load(ids + t * A + atom, mask=there, other=-1).to(tl.int64)
    weight = tl.load(weights + t * A + atom, mask=there, other=0.0)
    column = tl.min(tl.where(held == vertex, tl.where(weight > 0, atom, BA), BA), axis=0)
    column = tl.where(column < BA, column, slot)
    grown = (1 - step) * weight + tl.where(atom == column, step, 0.0)
    tl.store(new_weights + t * A + atom, grown, mask=there)
    placed = tl.where(atom == column, tl.where(step > 0, vertex, held), held)
    tl.store(new_ids + t * A + atom, placed.to(new_ids.dtype.element_ty), mask=there)

    gap = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, d, BLOCK):
        j = start + tl.arange(0, BLOCK)
        inside = j < d
        low = tl.load(table + row + j, mask=inside, other=0.0).to(tl.float32)
        combined = tl.load(g + t * d + j, mask=inside, other=0.0).to(tl.float32)
        acc = step * low
        for a in range(A):
            id = tl.load(ids + t * A + a).to(tl.int64)
            w = tl.load(weights + t * A + a)
            reach = tl.where(w != 0, tl.where(id >= 0, tl.where(id < V, d, 0), 0), 0)
            e = tl.load(table + id * table_stride + j, mask=j < reach, other=0.0).to(tl.float32)
            e += tl.where(w != 0, tl.where(reach > 0, 0.0, float("nan")), 0.0)  # an atom that is no row
            gap += tl.where(w != 0, w * combined * (e - low), 0.0)
            acc += (1 - step) * w * e
        tl.store(z + t * d + j, acc.to(z.dtype.element_ty), mask=inside)
    tl.store(gaps + t, tl.sum(gap, axis=0))


def unsupported(call: Call) -> str | None:
    return only_dtypes(call, (torch.float32, torch.bfloat16))


def combine(G_gold: Tensor, G_away: Tensor | None, combination: Combination) -> Tensor:
    """The combined gradient ``[T, d]`` in float32, or the one that there is as it came."""
    alpha, beta, kind = combination
    if G_away is None and kind == "sum" and alpha == 1:
        return G_gold.contiguous()
    T, d = G_gold.shape
    out = torch.empty(T, d, device=G_gold.device)
    gold = G_gold if G_gold.stride(1) == 1 else G_gold.contiguous()
    away = gold if G_away is None else G_away if G_away.stride(1) == 1 else G_away.contiguous()
    combine_rows[(T,)](
        gold, away, out, d, gold.stride(0), away.stride(0), float(alpha), float(beta), HAS_AWAY=G_away is not None,
        NORMALIZED=kind == "normalized", BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return out


def hull_step(
    G_gold: Tensor,
    G_away: Tensor | None,
    E: Tensor,
    ids: Tensor,
    weights: Tensor,
    gamma: Tensor,
    slot: int,
    combination: Combination,
    allowed: Tensor | None,
    candidates: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (T, A), d = ids.shape, E.shape[1]
    ids, weights, gamma = ids.contiguous(), weights.contiguous(), gamma.float().contiguous()
    new_ids, new_weights = torch.empty_like(ids), torch.empty_like(weights)
    z, gap = torch.empty(T, d, dtype=E.dtype, device=E.device), torch.empty(T, device=E.device)
    vertex = torch.empty(T, dtype=torch.int64, device=E.device)
    if T == 0:
        return new_ids, new_weights, z, vertex, gap
    allowed = None if allowed is None else allowed.contiguous()
    g = combine(G_gold, G_away, combination)
    if candidates is None:
        (keys, _), parts = screened_keys(g, E, None, None, allowed), 1
    else:
        keys, parts = candidate_keys(g, E, None, None, allowed, candidates)
    finish_step[(T,)](
        keys, g, ids, weights, gamma, E, new_ids, new_weights, z, vertex, gap, T, E.shape[0], d, A, slot, parts,
        E.stride(0), BP=triton.next_power_of_2(parts), BA=triton.next_power_of_2(A), BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return new_ids, new_weights, z, vertex, gap
