"""Triton implementation: the normaliser of each row, then a matmul whose left operand is made from theta in registers.

Identity: ``z = softmax(theta / tau) @ E``, ``dtheta = p * (<dz, E_v> - <dz, z>) / tau``.

FLOPs and bytes: 2*T*V*d, forward and backward each; theta is read once, and again once a block of columns (backward
once, and dtheta written), the table once a block of tokens. Probabilities never reach memory.

1. ``row_normalisers``: a program a row, online softmax in one walk over the row, to ``log sum exp(theta / tau)``.
2. ``mixture_tiles``: ``exp(theta / tau - lse) @ E`` for BM tokens, BN columns and one part of the vocabulary, BK rows
   at a time. The probabilities are already normalised, so parts simply add, in order; there is more than one where
   tokens and columns alone would leave the device idle.
3. ``gradient_tiles``: a [BM, BN] tile of tokens and rows, p made again from theta. grad_z holds values of E's dtype,
   as z does, so one term of it is exact.

Numerics: float32 sums; in bfloat16 a probability has a relative error of 2**-9, and the result is divided by the sum of
the rounded ones, so that it is still a convex combination of rows. Limits: float32 and bfloat16; E is frozen.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import native
from ..dispatch import Call, interpreting_triton, only_dtypes
from ..linear_logprob.triton import LOG2E, name, tiling
from ..vertex_oracle.tiles import split, tile_scores

BLOCK = 4096

# (BM, BN, BK, warps, stages): tokens, columns of the table, rows of the table at a time
MIXTURES = {"bfloat16": (64, 128, 64, 8, 3), "float32": (64, 64, 32, 4, 3)}
# Tokens, rows, columns at a time. Ragged: rows of theta do not start at multiples of 16, so each entry has an address.
GRADIENTS = {
    "bfloat16": (128, 128, 64, 8, 3),
    "bfloat16 ragged": (128, 64, 64, 8, 3),
    "float32": (64, 64, 32, 4, 3),
}


@triton.jit
def row_normalisers(theta, lse, V, theta_stride, inverse_tau, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    v = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        x = tl.load(theta + t * theta_stride + start + v, mask=start + v < V, other=float("-inf")).to(tl.float32)
        x = x * (inverse_tau * LOG2E)
        new = tl.maximum(top, x)
        base = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(top - base) + tl.exp2(x - base)
        top = new
    most = tl.max(top, axis=0)
    base = tl.where(most == float("-inf"), 0.0, most)
    total = tl.sum(total * tl.exp2(top - base), axis=0)
    tl.store(lse + t, (base + tl.log2(total)) / LOG2E)


@triton.jit(do_not_specialize=["T", "token_blocks"])
def mixture_tiles(theta, lse, table, out, sums, T, V, d, theta_stride, table_stride, part_rows, token_blocks,
                  column_blocks, inverse_tau, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                  WIDEN: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    part = program // (token_blocks * column_blocks)
    tokens = (program % token_blocks) * BM + tl.arange(0, BM)
    columns = (program // token_blocks % column_blocks) * BN + tl.arange(0, BN)
    valid_tokens = tokens < T
    inside = columns < d
    log_sum = tl.load(lse + tokens, mask=valid_tokens, other=0.0) * LOG2E
    acc = tl.zeros((BM, BN), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    first = part * part_rows
    last = min(first + part_rows, V)
    tl.assume(first < last)
    for start in range(first, last, BK):
        rows = start + tl.arange(0, BK)
        valid = rows < V
        x = tl.load(
            theta + tokens.to(tl.int64)[:, None] * theta_stride + rows[None, :],
            mask=valid_tokens[:, None] & valid[None, :],
            other=float("-inf"),
        )
        e = tl.load(
            table + rows.to(tl.int64)[:, None] * table_stride + columns[None, :],
            mask=valid[:, None] & inside[None, :],
            other=0.0,
        )
        p = tl.exp2(x.to(tl.float32) * (inverse_tau * LOG2E) - log_sum[:, None]).to(e.dtype)
        total += tl.sum(p.to(tl.float32), axis=1)
        if WIDEN:  # the interpreter multiplies the bits of a bfloat16
            p, e = p.to(tl.float32), e.to(tl.float32)
        acc = tl.dot(p, e, acc, input_precision="tf32x3")
    at = part.to(tl.int64) * T + tokens
    tl.store(out + at[:, None] * d + columns[None, :], acc, mask=valid_tokens[:, None] & inside[None, :])
    tl.store(sums + at, total, mask=valid_tokens)  # the same from each block of columns


@triton.jit(do_not_specialize=["T", "token_blocks"])
def gradient_tiles(grad_z, table, theta, lse, dots, out, T, V, d, grad_stride, table_stride, theta_stride, token_blocks,
                   inverse_tau, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WIDEN: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    tokens = (program % token_blocks) * BM + tl.arange(0, BM)
    rows = (program // token_blocks) * BN + tl.arange(0, BN)
    valid_tokens = tokens < T
    valid = rows < V
    acc = tile_scores(grad_z, table, rows, valid, tokens, valid_tokens, 0, 0, T, d, grad_stride, 0, table_stride, 1, BM,
                      BN, BK, False, WIDEN)  # fmt: skip
    there = valid_tokens[:, None] & valid[None, :]
    x = tl.load(theta + tokens.to(tl.int64)[:, None] * theta_stride + rows[None, :], mask=there, other=0.0)
    log_sum = tl.load(lse + tokens, mask=valid_tokens, other=0.0) * LOG2E
    p = tl.exp2(x.to(tl.float32) * (inverse_tau * LOG2E) - log_sum[:, None])
    grad = p * (acc - tl.load(dots + tokens, mask=valid_tokens, other=0.0)[:, None]) * inverse_tau
    tl.store(out + tokens.to(tl.int64)[:, None] * V + rows[None, :], grad.to(out.dtype.element_ty), mask=there)


def unsupported(call: Call) -> str | None:
    if "E" in call.needs_grad:
        return "E requires a gradient, which only the reference computes"
    return only_dtypes(call, (torch.float32, torch.bfloat16))


def softmax_mixture(theta: Tensor, E: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    theta, T, (V, d) = native.rows(theta), theta.shape[0], E.shape
    lse = torch.empty(T, device=E.device)
    BM, BN, BK, warps, stages = tiling(MIXTURES[name(E.dtype)], E)
    blocks, column_blocks = triton.cdiv(T, BM), triton.cdiv(d, BN)
    parts, part_rows = split(blocks * column_blocks, V, BK, E.device)
    out, sums = torch.empty(parts, T, d, device=E.device), torch.empty(parts, T, device=E.device)
    if T:
        row_normalisers[(T,)](theta, lse, V, theta.stride(0), 1.0 / tau, BLOCK=BLOCK, num_warps=8)
        mixture_tiles[(blocks * column_blocks * parts,)](
            theta, lse, E, out, sums, T, V, d, theta.stride(0), E.stride(0), part_rows, blocks, column_blocks,
            1.0 / tau, BM=BM, BN=BN, BK=BK, WIDEN=interpreting_triton(), num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return (out.sum(0) / sums.sum(0)[:, None]).to(E.dtype), lse


def softmax_mixture_backward(theta: Tensor, E: Tensor, tau: float, lse: Tensor, grad_z: Tensor, dots: Tensor) -> Tensor:
    theta, T, (V, d) = native.rows(theta), theta.shape[0], E.shape
    grad_theta, grad_z = torch.empty(T, V, dtype=theta.dtype, device=E.device), grad_z.to(E.dtype).contiguous()
    ragged = E.dtype == torch.bfloat16 and V % 16 + theta.stride(0) % 16 > 0
    BM, BN, BK, warps, stages = GRADIENTS[name(E.dtype) + " ragged" * ragged]
    blocks = triton.cdiv(T, BM)
    if T:
        gradient_tiles[(blocks * triton.cdiv(V, BN),)](
            grad_z, E, theta, lse, dots.contiguous(), grad_theta, T, V, d, grad_z.stride(0), E.stride(0),
            theta.stride(0), blocks, 1.0 / tau, BM=BM, BN=BN, BK=BK, WIDEN=interpreting_triton(), num_warps=warps,
            num_stages=stages,
        )  # fmt: skip
    return grad_theta
